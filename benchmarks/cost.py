"""Computes what a training costs: operations of a step, and hours at a rate.

Counts the floating point operations of a training step and of an evaluation on fake tensors, two for each multiply-add
of convolutions and matrix products, and divides those of a whole stage by a rate. Nothing is measured: reading images,
memory traffic and small operations are left out, so that real hours are more.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fake_accelerator import fake_inference, fake_training
from benchmarks.workload import add_sizes
from models.backbone import check_backbone
from utils.arguments import AddOption, number, whole
from utils.settings import Settings
from utils.stages import STAGES

TERA = 1e12


@dataclass(frozen=True)
class Geometry:
    """Images of side x side pixels, shrunk to `size_g` and cut into patches of `size_p`."""

    side: int
    size_g: int
    size_p: int
    backbone: str


def training_operations(mode: int, geometry: Geometry) -> int:
    """Return the operations of a training step with one image."""
    settings, backbone = Settings(size_p=geometry.size_p), geometry.backbone
    with (
        fake_training(mode, settings, geometry.side, size_g=geometry.size_g, backbone=backbone) as (_, step, samples),
        FlopCounterMode(display=False) as counter,
    ):
        step(samples)
    return int(counter.get_total_flops())


def inference_operations(mode: int, geometry: Geometry) -> int:
    """Return the operations of segmenting one image, all predictions of the mode."""
    settings, backbone = Settings(size_p=geometry.size_p), geometry.backbone
    with (
        fake_inference(mode, settings, geometry.side, size_g=geometry.size_g, backbone=backbone) as (_, work, sample),
        FlopCounterMode(display=False) as counter,
    ):
        work(sample)
    return int(counter.get_total_flops())


def stage_hours(training: float, inference: float, images: int, validation: int, epochs: int, tflops: float) -> float:
    """Return the hours of a stage, with the validation after each epoch.

    Args:
        training, inference: operations for one image.
        images, validation: how many images each has.
        epochs: of the stage.
        tflops: 1e12 operations per second.
    """
    return epochs * (images * training + validation * inference) / (tflops * TERA) / 3600


COLUMNS = {
    "stage": "stage",
    "training": "TFLOP per image, training",
    "inference": "evaluation",
    "epochs": "epochs",
    "hours": "hours",
}


def add_options(add: AddOption) -> None:
    """Add the options of this benchmark."""
    add("--tflops", type=number(0.001), default=10.0, metavar="RATE", help="sustained rate (default: %(default)g)")
    add("--images", type=whole(1), default=454, help="training images (default: %(default)s, DeepGlobe)")
    add("--validation", type=whole(0), default=207, help="validation images (default: %(default)s, DeepGlobe)")
    add("--num_epochs", type=whole(1), help="of every stage (default: 120, 50 and 120)")
    add_sizes(add)
    add("--size_g", type=whole(32), default=508, help="of the shrunk image (default: %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each stage, and one for all."""
    check_backbone(options.backbone, options.size_g, options.size_p)
    geometry = Geometry(options.side, options.size_g, options.size_p, options.backbone)
    total = 0.0
    for mode, stage in STAGES.items():
        training, inference = training_operations(mode, geometry), inference_operations(mode, geometry)
        epochs = options.num_epochs or stage.epochs
        hours = stage_hours(training, inference, options.images, options.validation, epochs, options.tflops)
        total += hours
        row = {"stage": mode, "training": training / TERA, "inference": inference / TERA}
        yield {**row, "epochs": epochs, "hours": hours}
    yield {"stage": "all", "hours": total}
