"""Shows how far bf16 and fp16 predictions of a trained network agree with fp32's: python -m benchmarks.agreement --help

"Equal" is the share of all pixels that get the class id they get in fp32; mIoU is that of an evaluation. The aim for
bf16 is 99 % of the pixels equal, and mIoU within 0.2 points, in the headline prediction.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import MODES, Inference
from dataset import registry
from dataset.base import Sample
from dataset.loader import SampleLoader
from prediction.segmenter import load_network
from utils.distributed import pick_device
from utils.errors import InputError, exit_code, required
from utils.files import write_json
from utils.metrics import StageMetrics
from utils.precision import PRECISIONS
from utils.stages import STAGES

DEMO = Path(__file__).parents[1] / "demo"


class Run:
    """The evaluation of one precision.

    Attributes:
        work: segments an image.
        metrics: the scores.
        equal: number of pixels with the reference's class, by prediction.
    """

    def __init__(self, work: Inference, n_class: int) -> None:
        self.work = work
        self.metrics = StageMetrics(work.stage, n_class)
        self.equal = dict.fromkeys(work.stage.predictions, 0)

    def __call__(self, sample: Sample, reference: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Segment and count a sample.

        Args:
            sample: with a label.
            reference: class ids to compare with, by prediction; None if this is the reference.

        Returns:
            (H, W) uint8 class ids by prediction.
        """
        found = self.work(sample)
        self.metrics.update(self.work.settings.to_device(required(sample.label, "label")), found)
        ids = {name: prediction.ids for name, prediction in found.items()}
        for name, other in (reference or ids).items():
            self.equal[name] += int((ids[name] == other).sum())
        return ids


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return `{precision: {prediction: {"equal", "mIoU"}}}`, both 0..1, with checkpoint, mode and number of images."""
    model, header = load_network(options.checkpoint, options.path_g, options.mode, {})
    description = registry.describe(options.dataset, options.data_path)
    split = options.split or description.validation
    if split in description.unlabelled:
        raise InputError(f"--split {split} has no labels, and so no mIoU; take another")
    data = description.open(split, header.size_g, header.classes)
    device, stage = pick_device(options.device), STAGES[header.stage]
    runs = {}
    for precision in PRECISIONS:
        settings = header.settings(device=device, precision=precision)
        runs[precision] = Run(Inference(model, stage.number, settings), len(header.classes))
    pixels = 0
    for (sample,) in SampleLoader(data):
        pixels += sample.image[0].numel()
        reference = None
        for run in runs.values():  # fp32 is the first
            ids = run(sample, reference)
            reference = reference or ids
    return {
        "checkpoint": str(options.checkpoint),
        "mode": stage.number,
        "images": len(data),
        **{
            precision: {
                name: {
                    "equal": run.equal[name] / pixels,
                    "mIoU": run.metrics.matrices[name].mean_iou(header.classes.left_out),
                }
                for name in stage.predictions
            }
            for precision, run in runs.items()
        },
    }


def run(options: argparse.Namespace) -> None:
    """Print the table, and write it as JSON if that is requested."""
    found = compare(options)
    print(f"{found['checkpoint']}, mode {found['mode']}, {found['images']} images")
    print(f"{'':6}{'':10}{'equal, %':>10}{'mIoU, %':>10}{'points':>9}")
    for precision in PRECISIONS:
        for name, values in found[precision].items():
            points = 100 * (values["mIoU"] - found["fp32"][name]["mIoU"])
            print(f"{precision:6}{name:10}{100 * values['equal']:10.3f}{100 * values['mIoU']:10.2f}{points:+9.3f}")
    if options.json:
        write_json(options.json, found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEMO / "saved_models" / "fpn_deepglobe_local2global.pth",
        help="default: the demo's last",
    )
    parser.add_argument("--mode", type=int, choices=MODES, help="default: the checkpoint's; a released file needs it")
    parser.add_argument("--path_g", type=Path, help="stage 1's file, beside a released one of stage 3")
    parser.add_argument("--dataset", choices=registry.NAMES, default="deep_globe", help="default: %(default)s")
    parser.add_argument("--data_path", type=Path, default=DEMO / "data", help="default: the demo's")
    parser.add_argument("--split", help="default: the one that training validates on")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    return exit_code(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
