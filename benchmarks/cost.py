"""Computes what a training costs, by encoder: operations, hours at a rate, memory.

Counts the floating point operations of a training step and of an evaluation on fake tensors, two for each multiply-add
of convolutions and matrix products, and divides those of a whole stage by a rate. Nothing is measured: reading images,
memory traffic and small operations are left out, so that real hours are more. In the last row of an encoder are its
millions of parameters and its multiply-adds on one patch, in 1e9. With `--memory`, the peak MB on the device of a
training step with 6 images (mode 2: one, as it computes one after the other) and of inference in mode 3 are counted,
in float32, as the benchmark `memory` counts them.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import BATCH, count_inference, count_training, fake_inference, fake_training
from benchmarks.speed import add_sizes
from models.backbone import build_backbone, check_backbone
from utils.arguments import AddOption, number, whole
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES

TERA = 1e12


def count_operations(mode: int, *, training: bool, side: int, size_g: int, size_p: int, backbone: str) -> int:
    """Return the operations of a training step with one image, or of segmenting it: all predictions of the mode."""
    fake: Any = fake_training if training else fake_inference
    settings = (TrainingSettings if training else Settings)(size_p=size_p)
    tensors = fake(mode, settings, side, size_g=size_g, backbone=backbone)
    with tensors as (_, work, images), FlopCounterMode(display=False) as counter:
        work(images)
    return int(counter.get_total_flops())


def encoder_size(name: str, size: int) -> dict[str, float]:
    """Return the millions of `parameters` of an encoder, and its `gmac` on a patch: 1e9 multiply-adds."""
    with torch.device("meta"), torch.no_grad():
        encoder = build_backbone(name).eval()
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"parameters": parameters / 1e6, "gmac": counter.get_total_flops() / 2e9}


def stage_hours(training: float, inference: float, images: int, validation: int, epochs: int, tflops: float) -> float:
    """Return the hours of a stage, with the validation after each epoch: operations are for one image."""
    return epochs * (images * training + validation * inference) / (tflops * TERA) / 3600


COLUMNS = {
    "encoder": "encoder",
    "stage": "stage",
    "training": "TFLOP per image, training",
    "inference": "evaluation",
    "epochs": "epochs",
    "hours": "hours",
    "parameters": "parameters, millions",
    "gmac": "GMAC per patch",
    "memory": "training step, MB",
    "memory_inference": "inference, MB",
}


def add_options(add: AddOption) -> None:
    add("--tflops", type=number(0.001), default=10.0, metavar="RATE", help="sustained rate (default: %(default)g)")
    add("--images", type=whole(1), default=454, help="training images (default: %(default)s, DeepGlobe)")
    add("--validation", type=whole(0), default=207, help="validation images (default: %(default)s, DeepGlobe)")
    add("--num_epochs", type=whole(1), help="of every stage (default: 120, 50 and 120)")
    add_sizes(add, nargs="+", default=["resnet50"])
    add("--size_g", type=whole(32), default=508, help="of the shrunk image (default: %(default)s)")
    add("--memory", action="store_true", help="also count the memory, with size_g and size_p 508")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each stage of each encoder, and one for all. Raises InputError if there is no such encoder."""
    for name in options.backbone:
        check_backbone(name, options.size_g, options.size_p)
    for name in options.backbone:
        sizes = {"side": options.side, "size_g": options.size_g, "size_p": options.size_p, "backbone": name}
        total = 0.0
        for mode, stage in STAGES.items():
            training, inference = (count_operations(mode, training=which, **sizes) for which in (True, False))
            epochs = options.num_epochs or stage.epochs
            hours = stage_hours(training, inference, options.images, options.validation, epochs, options.tflops)
            total += hours
            row = {"encoder": name, "stage": mode, "training": training / TERA, "inference": inference / TERA}
            if options.memory:
                batch = 1 if mode == 2 else BATCH
                row["memory"] = count_training(mode, "fp32", options.side, batch, name)["device"]
            if options.memory and mode == 3:
                row["memory_inference"] = count_inference(6, "fp32", side=options.side, backbone=name)["device"]
            yield {**row, "epochs": epochs, "hours": hours}
        yield {"encoder": name, "stage": "all", "hours": total, **encoder_size(name, options.size_p)}
