"""Evaluates a network of GLNet and keeps the confusion matrix of every image: python -m experiments.scores --help

The options are those of `train_deep_globe.py --evaluation`. `--late_fusion` replaces the ensemble of stage 2 by the
mean of the softmaxes of its global and its local prediction: late fusion, if the branches were trained without sharing.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dataset.base import Sample, SegmentationDataset
from dataset.layout import SplitChoice
from dataset.loader import SampleLoader
from dataset.registry import describe
from engine.predictor import Predictor
from evaluation.report import evaluation_record, evaluation_table
from evaluation.run import SegmentsImages, evaluate_images
from imaging.sources import Source
from training import options as command_line
from training.setup import plan_evaluation
from utils.arguments import Parser
from utils.canvas import RESULT_ROWS, Sink
from utils.classes import Classes
from utils.distributed import pick_device
from utils.errors import InputError, exit_code, required
from utils.files import write_json
from utils.memory import keep_freed_memory, peak_memory_mb
from utils.metrics import ConfusionMatrix, StageMetrics
from utils.selection import Coverage

FUSED = ("global", "local")
"""The predictions whose softmaxes late fusion averages."""


class LateFusion:
    """A network of stage 2 or 3 whose ensemble is the mean of the softmaxes of its global and its local prediction."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.stage, self.settings = predictor, predictor.stage, predictor.settings

    def segment(self, image: Source, sinks: Mapping[str, Sink], **images: Any) -> Coverage:
        """Segment one image; the parameters are those of `Predictor.segment`. `sinks` are all predictions of a stage.

        Local scores are means over the patches that cover a pixel, before their softmax.
        """
        totals: list[Tensor] = []  # one, (n_class, H, W), when the first rows are known

        def adding(sink: Sink) -> Sink:
            def take(top: int, scores: Tensor) -> None:
                if not totals:
                    totals.append(scores.new_zeros((len(scores), *image.size), dtype=torch.float32))
                totals[0][:, top : top + scores.shape[1]] += scores.float().softmax(0)
                sink(top, scores)

            return take

        own = {name: adding(sinks[name]) for name in FUSED}
        coverage = self.predictor.segment(image, own, means=True, **images)
        for top in range(0, image.size[0], RESULT_ROWS):
            sinks["ensemble"](top, totals[0][:, top : top + RESULT_ROWS] / len(FUSED))
        return coverage


def score_images(predictor: SegmentsImages, data: SegmentationDataset, classes: Classes) -> dict[str, Any]:
    """Evaluate all images of `data`, which has labels, and print the table of scores.

    Returns:
        The record of `evaluation.report.evaluation_record`, and `matrices`: by prediction and id the confusion
        matrix of an image, row by row; rows are the truth.
    """
    matrices: dict[str, dict[str, list[int]]] = {name: {} for name in predictor.stage.predictions}

    def count(sample: Sample, found: dict[str, Tensor]) -> None:
        label = predictor.settings.to_device(required(sample.label, "label"))
        for name, ids in found.items():
            matrices[name][sample.id] = ConfusionMatrix(len(classes)).update(label, ids).flatten().tolist()

    metrics = StageMetrics(predictor.stage, classes)
    result = evaluate_images(predictor, SampleLoader(data), metrics, on_image=count)
    record = evaluation_record(
        predictor.stage.number,
        classes,
        result.metrics.matrices,
        images=result.images,
        seconds_per_image=result.seconds_per_image,
        peak_memory_mb=peak_memory_mb(predictor.settings.device),
    )
    print(evaluation_table(record))
    return {**record, "matrices": matrices}


def build_parser() -> Parser:
    """Return the parser of `train_deep_globe.py` with `--late_fusion`."""
    parser = command_line.build_parser()
    parser.prog, parser.description = "python -m experiments.scores", (__doc__ or "").splitlines()[0]
    help_ = "mode 2: the mean of both branches' softmaxes takes the ensemble's place"
    parser.group("late fusion")("--late_fusion", action="store_true", help=help_)
    return parser


def work(options: Namespace) -> None:
    """Evaluate, and write `LOG_PATH/TASK_NAME.json`."""
    options.evaluation = True
    command_line.check(options)
    if options.late_fusion and options.mode != 2:
        raise InputError(f"--late_fusion fuses both branches of mode 2 and does nothing in mode {options.mode}")
    keep_freed_memory()
    choice = SplitChoice(options.split_lists, options.hold_out)
    described = describe(options.dataset, options.data_path, choice)
    plan = plan_evaluation(options, described, pick_device(options.device))
    chosen = LateFusion(plan.predictor) if options.late_fusion else plan.predictor
    write_json(options.log_path / f"{options.task_name}.json", score_images(chosen, plan.data, plan.header.classes))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if the input is at fault."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: work(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
