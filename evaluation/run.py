"""`--evaluation`: segmenting one split of a data set, and reporting the scores."""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.base import Sample, SegmentationDataset
from dataset.loader import SampleLoader
from engine.predictor import Predictor
from evaluation.html_report import Report, write_report
from evaluation.report import evaluation_record, evaluation_table
from evaluation.report_images import ReportImages
from imaging.sources import MemorySource, Source
from models.header import Header
from utils.canvas import ArgmaxSink, FiniteScores, Sink
from utils.distributed import ALONE, Ranks
from utils.errors import InputError, required, shortened
from utils.files import check_writable, write_json
from utils.memory import peak_memory_mb
from utils.metrics import StageMetrics
from utils.precision import not_finite
from utils.run_record import now, options_record, run_record
from utils.selection import Coverage
from utils.settings import Settings
from utils.stages import Stage
from utils.visualize import save_colors


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, of all images of all processes; each process has the same.

    Attributes:
        metrics: the scores of each prediction.
        images: how many images were segmented.
        seconds_per_image: mean time to segment and count one image, without decoding.
        process_seconds_per_image: mean processor time of the same, of all threads of a process together.
        coverage: the part of the images that was computed at full resolution.
        complete: False if the evaluation was stopped before its end.
        not_finite: ids of the images whose scores were not finite numbers.
    """

    metrics: StageMetrics
    images: int
    seconds_per_image: float
    process_seconds_per_image: float = 0.0
    coverage: Coverage = field(default_factory=Coverage)
    complete: bool = True
    not_finite: tuple[str, ...] = ()


class SegmentsImages(Protocol):
    """What an evaluation needs of a network; `Predictor` has it."""

    @property
    def stage(self) -> Stage:
        """Names the predictions."""
        ...

    @property
    def settings(self) -> Settings:
        """The device."""
        ...

    def segment(
        self,
        image: Source,
        sinks: Mapping[str, Sink],
        *,
        global_image: Tensor | None = None,
        shared: Tensor | None = None,
        check: FiniteScores | None = None,
    ) -> Coverage:
        """Segment one image; see `Predictor.segment`."""
        ...


def evaluate_images(
    predictor: SegmentsImages,
    loader: Iterable[list[Sample]],
    metrics: StageMetrics,
    *,
    on_image: Callable[[Sample, dict[str, Tensor]], None] | None = None,
    title: str = "evaluate",
    ranks: Ranks = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Segment every image of `loader` and count it against its label.

    Args:
        predictor: segments the images.
        loader: batches of samples with whole images; of several processes each gets its part of the images.
        metrics: counts the predictions.
        on_image: gets each sample of this process and its predictions by name, (H, W) uint8 ids on the device. It is
            not called for an image whose scores are not finite numbers.
        title: of the progress bar.
        ranks: the processes that evaluate together.
        should_stop: is called after each image; if it returns True, this process stops.
    """
    settings = predictor.settings
    seconds, process_seconds, images, stopped, coverage = 0.0, 0.0, 0, False, Coverage()
    not_finite: list[str] = []
    bar = tqdm(loader, desc=title, unit="image", dynamic_ncols=True, disable=not ranks.main)
    for sample in (sample for batch in bar for sample in batch):
        start, process_start = time.perf_counter(), time.process_time()
        source = MemorySource(required(sample.image, "image"))
        found = {name: ArgmaxSink(source.size, settings.device) for name in predictor.stage.predictions}
        check = FiniteScores()
        coverage += predictor.segment(
            source, found, global_image=sample.global_image, shared=sample.shared, check=check
        )
        if sample.label is not None:
            metrics.update(settings.to_device(sample.label), found)
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        seconds += time.perf_counter() - start
        process_seconds += time.process_time() - process_start
        images += 1
        bar.set_postfix(mIoU=f"{100 * metrics.mean_iou():.1f}")
        if not check.ok():
            not_finite.append(sample.id)
        elif on_image is not None:
            on_image(sample, {name: prediction.ids for name, prediction in found.items()})
        if stopped := should_stop():
            break
    parts = ranks.gather((seconds, process_seconds, images, stopped, coverage, not_finite))
    for counts in metrics.sums():
        ranks.sum_([counts])
    total = sum(part[2] for part in parts)
    return Evaluation(
        metrics,
        images=total,
        seconds_per_image=sum(part[0] for part in parts) / max(total, 1),
        process_seconds_per_image=sum(part[1] for part in parts) / max(total, 1),
        coverage=sum((part[4] for part in parts), Coverage()),
        complete=not any(part[3] for part in parts),
        not_finite=tuple(id_ for part in parts for id_ in part[5]),
    )


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
    stage, settings, started = predictor.stage, predictor.settings, now()
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
    result = evaluate_images(predictor, loader, metrics, on_image=save, title=title, ranks=ranks)
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
    run = run_record(options_record(options), device, ranks.world, started, [])
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
