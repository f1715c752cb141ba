"""Computes what encoders cost.

For each encoder a line of the table in docs/performance.md: parameters of one encoder; multiply-adds of one encoder on
a patch of 508 x 508; and the peak memory of inference in mode 3 and of a training step of each mode, for 2448 x 2448
images in float32, as the benchmark `memory` counts them. Nothing is computed on numbers, and no GPU is needed.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import BATCH, SIDE, count_inference, count_training
from benchmarks.workload import MODES
from models.backbone import backbone_name, build_backbone, check_backbone
from utils.arguments import AddOption, whole

SIZE = 508
"""Sides of a patch and of the shrunk image, in pixels."""

ENCODERS = (
    "resnet18",
    "resnet50",
    "timm/resnext50_32x4d",
    "timm/efficientnet_b0",
    "timm/convnext_tiny",
    "timm/swin_tiny_patch4_window7_224",
)


def encoder_size(name: str, size: int = SIZE) -> dict[str, float]:
    """Return the millions of `parameters` of an encoder, and its `gmac` on a patch: 1e9 multiply-adds."""
    with torch.device("meta"), torch.no_grad():
        encoder = build_backbone(name).eval()
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"parameters": parameters / 1e6, "gmac": counter.get_total_flops() / 2e9}


def count_memory(name: str, side: int = SIDE) -> dict[str, float]:
    """Return the MB on the device of `inference` in mode 3, and of a training step of each mode, `train_mode1` to 3.

    Mode 2 computes one image after the other, so that one image is enough to count it.
    """
    found = {"inference": count_inference(6, "fp32", side=side, backbone=name)["device"]}
    for mode, batch in ((1, BATCH), (2, 1), (3, BATCH)):
        found[f"train_mode{mode}"] = count_training(mode, "fp32", side, batch, name)["device"]
    return found


COLUMNS = {
    "encoder": "encoder",
    "parameters": "parameters, millions",
    "gmac": "GMAC per patch",
    "inference": "inference, mode 3, MB",
    **{f"train_mode{mode}": f"training step, mode {mode}, MB" for mode in MODES},
}


def add_options(add: AddOption) -> None:
    """Add the options of this benchmark."""
    add("--backbones", type=backbone_name, nargs="+", default=ENCODERS, metavar="NAME", help="(default: six)")
    add("--side", type=whole(64), default=SIDE, help="of an image, in pixels (default: %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each encoder. Raises InputError if there is no such encoder."""
    for name in options.backbones:
        check_backbone(name, SIZE, SIZE)
    for name in options.backbones:
        yield {"encoder": name, **encoder_size(name), **count_memory(name, options.side)}
