"""`--evaluation`: segmenting one split of a data set, and reporting the scores."""

import argparse
import logging
from pathlib import Path

import numpy as np
from torch import Tensor

import helper
from dataset.base import Sample, SegmentationDataset
from dataset.loader import SampleLoader
from engine.predictor import Predictor
from models.header import Header
from training.memory import peak_memory_mb
from training.report import evaluation_record, evaluation_table
from utils.distributed import Ranks
from utils.errors import InputError
from utils.files import check_writable, write_json
from utils.metrics import StageMetrics
from utils.visualize import save_colors


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
    """Evaluate one split: print the scores and write them as JSON; write the predictions if they are requested.

    Args:
        options: resolved.
        predictor: segments the images.
        header: of the network.
        data: the split.
        labelled: whether the split has labels; without any only predictions are written.
        ranks: the processes. Each writes the predictions of its images; the main one writes the report.
    """
    stage, settings = predictor.stage, predictor.settings

    def save(sample: Sample, found: dict[str, Tensor]) -> None:
        if options.save_predictions:
            ids: np.ndarray = found[stage.headline].cpu().numpy()
            save_colors(options.save_predictions / f"{sample.id}_mask.png", ids, header.classes.palette)

    check_writable(options.log_path)
    if options.save_predictions:
        refuse_data_folder(options.save_predictions, data)
    own = range(ranks.rank, len(data), ranks.world)
    loader = SampleLoader(data, sampler=own, num_workers=options.num_workers, pin=settings.device.type == "cuda")
    metrics = StageMetrics(stage, header.classes)
    title = f"evaluate {options.split}"
    result = helper.evaluate(predictor, loader, metrics, on_image=save, title=title, ranks=ranks)
    if not ranks.main:
        return
    if options.save_predictions:
        logging.info(f"Predictions: {options.save_predictions}")
    if not labelled:
        return
    record = evaluation_record(
        stage.number,
        header.classes,
        result.metrics.matrices,
        images=result.images,
        seconds_per_image=result.seconds_per_image,
        peak_memory_mb=peak_memory_mb(settings.device),
        coverage=result.coverage if predictor.selects_patches else None,
    )
    target = options.log_path / f"{options.task_name}.json"
    print(evaluation_table(record))
    write_json(target, record)
    logging.info(f"The same as JSON: {target}")
