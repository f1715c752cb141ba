"""`--evaluation`: segmenting one split of a data set, and reporting the scores."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import helper
from dataset.base import Sample, SegmentationDataset
from dataset.loader import SampleLoader
from dataset.registry import Description
from engine.predictor import Predictor
from models.header import Header
from models.restore import restore
from training import limits, records, setup
from training.html_report import Report, write_report
from training.memory import peak_memory_mb
from training.report import evaluation_record, evaluation_table
from training.report_images import ReportImages
from training.state import options_record
from utils.distributed import Ranks
from utils.errors import InputError, shortened
from utils.files import check_writable, write_json
from utils.metrics import StageMetrics
from utils.precision import not_finite
from utils.stages import STAGES, Stage
from utils.turns import TURNS
from utils.visualize import save_colors


def prepare_evaluation(
    options: argparse.Namespace, described: Description, device: torch.device
) -> tuple[Predictor, Header, SegmentationDataset]:
    """Return the predictor of the checkpoint that the options name, its network's header, and the images.

    Args:
        options: resolved in place.
        described: the data set.
        device: of the network.

    Raises:
        InputError: a file cannot be used, or options do not fit it.
    """
    stage = STAGES[options.mode]
    files = setup.read_checkpoints(options)
    described = setup.take_over_split(options, files, described)
    header = setup.resolve(options, files, described)
    settings = setup.build_settings(options, header, device)
    data = setup.open_data(options, described, options.split, header)
    data.share = header.share
    limits.check_images(data, None)
    # the prepared network is a copy; the files' tensors and the plain network are freed
    file = files.pop(stage.reads)
    model = restore(file, header, files.pop("path_g", None))
    del file
    context = header.context()
    if context is not None:
        logging.info(f"{options.model_path / getattr(options, stage.reads)}: {context}")
    predictor = Predictor.prepare(model, stage, settings, header.size_g, TURNS[options.tta], context)
    return predictor, header, data


def refuse_data_folder(folder: Path, data: SegmentationDataset) -> None:
    """Raise InputError if predictions, which have the labels' names, would overwrite the data set's own files."""
    pairs = (pair for item in data.items for pair in item.pairs())
    own = {path.parent.resolve() for pair in pairs for path in pair if path is not None}
    if folder.resolve() in own:
        raise InputError(f"--save_predictions {folder} would overwrite the labels there; name another folder")


def run_evaluation(
    options: argparse.Namespace,
    predictor: Predictor,
    header: Header,
    data: SegmentationDataset,
    labelled: bool,
    ranks: Ranks,
) -> None:
    """Evaluate one split: print the scores, write them as JSON; write predictions and a report if they are requested.

    Args:
        options: resolved.
        predictor: segments the images.
        header: of the network.
        data: the split.
        labelled: whether the split has labels; without any only predictions and the report's pictures are written.
        ranks: the processes. Each writes the predictions of its images; the main one writes everything else.

    Raises:
        InputError: scores are not finite numbers, or a file cannot be written.
    """
    stage, settings, started = predictor.stage, predictor.settings, records.now()
    images = ReportImages(header.classes, stage.headline, labelled, len(data), ranks) if options.report else None

    def save(sample: Sample, found: dict[str, Tensor]) -> None:
        if options.save_predictions:
            ids: np.ndarray = found[stage.headline].cpu().numpy()
            save_colors(options.save_predictions / f"{sample.id}_mask.png", ids, header.classes.palette)
        if images is not None:
            images.add(sample, found)

    seen = None if header.trained_on is None else header.trained_on.count(data.hashes())
    if seen:
        logging.warning(f"{seen} of {len(data)} images were trained on: their scores say nothing of other images")
    check_writable(options.log_path)
    if options.save_predictions:
        refuse_data_folder(options.save_predictions, data)
    if options.report and ranks.main:
        check_writable(options.report)
    own = range(ranks.rank, len(data), ranks.world)
    loader = SampleLoader(data, sampler=own, num_workers=options.num_workers, pin=settings.device.type == "cuda")
    metrics = StageMetrics(stage, header.classes)
    title = f"evaluate {options.split}"
    result = helper.evaluate(predictor, loader, metrics, on_image=save, title=title, ranks=ranks)
    if result.not_finite:
        raise InputError(
            f"the network's scores of {len(result.not_finite)} of {result.images} images ("
            f"{shortened(result.not_finite)}) are {not_finite(settings.precision)}"
        )
    if images is not None:
        images.gather(ranks)
    if not ranks.main:
        return
    if labelled and not result.metrics.has_labels():
        logging.warning(f"no pixel of split {options.split} has a class: there are no scores, and none are written")
        labelled = False
    if options.save_predictions:
        logging.info(f"Predictions: {options.save_predictions}")
    record = {
        "dataset": options.dataset,
        "split": options.split,
        "checkpoint": str(getattr(options, stage.reads)),
        "device": settings.device.type,
        **{name: getattr(header, name) for name in ("size_g", "size_p", "min_overlap", "normalize", "scale")},
        "images_trained_on": seen,
        "shared_maps": header.share,
        **{name: getattr(options, name) for name in ("precision", "tta", "refine_share", "blend", "upsample")},
        **evaluation_record(
            stage.number,
            header.classes,
            result.metrics.matrices,
            images=result.images,
            seconds_per_image=result.seconds_per_image,
            peak_memory_mb=peak_memory_mb(settings.device),
            coverage=result.coverage if predictor.selects_patches else None,
        ),
    }
    if labelled:
        target = options.log_path / f"{options.task_name}.json"
        print(evaluation_table(record))
        write_json(target, record)
        logging.info(f"The same as JSON: {target}")
    if images is not None:
        report = Report(
            title=options.task_name,
            data=f"{options.dataset}, split {options.split}",
            stage=stage,
            classes=header.classes,
            record=record,
            counts=result.metrics.matrices[stage.headline].counts.cpu().numpy() if labelled else None,
            images=images,
            run=evaluation_run(options, stage, header, settings.device, ranks, started),
        )
        logging.info(f"Report: {write_report(options.report, report)}")


def evaluation_run(
    options: argparse.Namespace, stage: Stage, header: Header, device: torch.device, ranks: Ranks, started: str
) -> Mapping[str, Any]:
    """Return what a report says of the run, in plain values: the checkpoint, the network, options, versions."""
    run = records.run_record(options_record(options), device, ranks.world, started, [])
    network = {
        name: value for name, value in vars(header).items() if name not in ("stage", "classes") and value is not None
    }
    return {
        "checkpoint": str(options.model_path / getattr(options, stage.reads)),
        "network": ", ".join(f"{name} {value}" for name, value in network.items()),
        "precision": options.precision,
        "test-time augmentation": options.tta,
        "blend": options.blend,
        "upsample": options.upsample,
        **{name: run[name] for name in ("started", "device", "processes", "system", "git_commit", "command")},
        "options": run["options"],
        "versions": run["versions"],
    }
