"""Computes what a training costs: python -m benchmarks.cost [--tflops RATE]

Counts the floating point operations of a training step and of an evaluation on fake tensors, two for each multiply-add
of convolutions and matrix products, and divides those of a whole stage by a rate. Nothing is measured: reading images,
memory traffic and small operations are left out, so that real hours are more.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fake_work import fake_inference, fake_training
from models.backbone import backbone_name, check_backbone
from utils.arguments import Parser, number, whole
from utils.errors import exit_code
from utils.settings import Settings, TrainingSettings
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
    settings, backbone = TrainingSettings(size_p=geometry.size_p), geometry.backbone
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


def run(options: argparse.Namespace) -> None:
    """Print a line for each stage."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    check_backbone(options.backbone, options.size_g, options.size_p)
    geometry = Geometry(options.side, options.size_g, options.size_p, options.backbone)
    print(f"Computed, not measured: {options.side} x {options.side} pixels, patches of {options.size_p},")
    print(f"{options.images} training and {options.validation} validation images, {options.tflops:g} TFLOP/s.")
    print("stage  TFLOP/image, training  evaluation  epochs  hours")
    total = 0.0
    for mode, stage in STAGES.items():
        training, inference = training_operations(mode, geometry), inference_operations(mode, geometry)
        epochs = options.num_epochs or stage.epochs
        hours = stage_hours(training, inference, options.images, options.validation, epochs, options.tflops)
        total += hours
        print(f"{mode:5}{training / TERA:23.3f}{inference / TERA:12.3f}{epochs:8}{hours:7.1f}", flush=True)
    print(f"all{total:52.1f}")


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(prog="python -m benchmarks.cost", description="Compute the operations and hours of a training.")
    add = parser.group("options")
    add("--tflops", type=number(0.001), default=10.0, metavar="RATE", help="sustained rate (default: %(default)g)")
    add("--images", type=whole(1), default=454, help="training images (default: %(default)s, DeepGlobe)")
    add("--validation", type=whole(0), default=207, help="validation images (default: %(default)s, DeepGlobe)")
    add("--num_epochs", type=whole(1), help="of every stage (default: 120, 50 and 120)")
    add("--side", type=whole(64), default=2448, help="of an image, in pixels (default: %(default)s)")
    add("--size_g", type=whole(32), default=508, help="of the shrunk image (default: %(default)s)")
    add("--size_p", type=whole(51), default=508, help="of a patch (default: %(default)s)")
    add("--backbone", type=backbone_name, default="resnet50", metavar="NAME", help="(default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
