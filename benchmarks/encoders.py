"""Computes what encoders cost: python -m benchmarks.encoders [--backbones NAME ...] [--json FILE]

For each encoder a line of the table in docs/performance.md: parameters of one encoder; multiply-adds of one encoder on
a patch of 508 x 508; and the peak memory of inference in mode 3 and of a training step of each mode, for 2448 x 2448
images in float32, as benchmarks.memory counts them. Nothing is computed on numbers, and no GPU is needed.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import BATCH, SIDE, count_inference, count_training
from models.backbone import backbone_name, build_backbone, check_backbone
from utils.errors import exit_code
from utils.files import write_json

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


def run(options: argparse.Namespace) -> None:
    """Print a line of a Markdown table for each encoder. Raises InputError if there is no such encoder."""
    for name in options.backbones:
        check_backbone(name, SIZE, SIZE)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    table: dict[str, dict[str, float]] = {}
    print("| encoder | parameters, millions | GMAC per patch | inference, MB | training step, modes 1 / 2 / 3, MB |")
    print("|---|---|---|---|---|")
    for name in options.backbones:
        found = table[name] = {**encoder_size(name), **count_memory(name, options.side)}
        steps = " / ".join(f"{found[f'train_mode{mode}']:.0f}" for mode in (1, 2, 3))
        line = f"| `{name}` | {found['parameters']:.1f} | {found['gmac']:.1f} | {found['inference']:.0f} | {steps} |"
        print(line, flush=True)
    if options.json:
        write_json(options.json, table)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoders", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbones", type=backbone_name, nargs="+", default=ENCODERS, metavar="NAME", help="(default: six)")
    add("--side", type=int, default=SIDE, metavar="N", help="of an image, in pixels (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
