"""Measures seams at patch borders under each --blend and --upsample: python -m benchmarks.seams --help

Seams are class borders on borders of patches: their share of all class borders beside the share that chance gives,
which is that of patch borders among all pairs of neighbouring pixels. In blocks of 4 pixels (nearest) every class
border is a border of cells, as is every patch border, so that their share is above chance without any seam. Where there
are labels, mIoU and the boundary IoU (Cheng et al., CVPR 2021) are measured too: the IoU of the pixels within a few
pixels of their class's border. Images are segmented whole, not in scenes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.agreement import DEMO
from dataset import registry
from dataset.loader import SampleLoader
from engine.predictor import Predictor
from imaging.image_file import View, open_image
from imaging.sources import MemorySource, Source, load_in_memory
from models.header import Header
from prediction.segmenter import load_network
from utils.arguments import Parser, whole
from utils.canvas import UPSAMPLES, ArgmaxSink
from utils.classes import IGNORED
from utils.distributed import pick_device
from utils.errors import InputError, exit_code
from utils.files import write_json
from utils.metrics import ConfusionMatrix
from utils.stages import STAGES
from utils.tiling import BLENDS, Axis, PatchGrid

TOLERANCE = 3
"""Pixels, by default, within which a pixel belongs to a border."""


@dataclass
class Seams:
    """Counts pairs of neighbouring pixels, over images.

    Attributes:
        pairs: all pairs.
        lines: those on both sides of a patch border.
        borders: those of two classes.
        seams: those of two classes on both sides of a patch border.
    """

    pairs: int = 0
    lines: int = 0
    borders: int = 0
    seams: int = 0

    def update(self, ids: Tensor, grid: PatchGrid) -> None:
        """Count the pairs of an image, with class ids (H, W), cut into `grid`."""
        for labels, axis in ((ids, grid.rows), (ids.T, grid.columns)):
            differs, lines = labels[1:] != labels[:-1], patch_lines(axis)
            self.pairs += differs.numel()
            self.lines += int(lines.sum()) * differs.shape[1]
            self.borders += int(differs.sum())
            self.seams += int(differs[lines.to(differs.device)].sum())

    def to_record(self) -> dict[str, float]:
        """Return the share of class borders that are seams, the share by chance, and the first over the second."""
        share, chance = self.seams / max(1, self.borders), self.lines / max(1, self.pairs)
        return {"share": share, "chance": chance, "ratio": share / chance if chance else 0.0}


def patch_lines(axis: Axis) -> Tensor:
    """Return between which pixels of an axis and the next ones a patch starts or ends, (side - 1,) bool."""
    lines = torch.zeros(axis.side + 1, dtype=torch.bool)
    starts = torch.tensor(axis.starts)
    lines[starts] = lines[starts + axis.patch] = True
    return lines[1:-1]


class BoundaryIou:
    """The IoU of the pixels of each class near its borders, over images.

    Attributes:
        tolerance: how near, in pixels.
        hit, union: (n_class,) pixels.
    """

    def __init__(self, n_class: int, tolerance: int) -> None:
        self.tolerance = tolerance
        self.hit, self.union = np.zeros(n_class, np.int64), np.zeros(n_class, np.int64)

    def update(self, truth: np.ndarray, guess: np.ndarray) -> None:
        """Count an image: ids (H, W) uint8. Pixels whose true id is 255 are left out and make no border."""
        ignored = truth == IGNORED
        for k in range(len(self.hit)):
            own, other = (self._near_border(ids == k, ignored) for ids in (truth, guess))
            self.hit[k] += np.count_nonzero(own & other)
            self.union[k] += np.count_nonzero(own | other)

    def _near_border(self, mask: np.ndarray, ignored: np.ndarray) -> np.ndarray:
        """Return the pixels of `mask` (H, W) near others that are not ignored; the edge of the image does not count."""
        inside = cv2.erode((mask | ignored).astype(np.uint8), np.ones((3, 3), np.uint8), iterations=self.tolerance)
        near: np.ndarray = mask & ~ignored & (inside == 0)
        return near

    def mean(self, left_out: Sequence[int]) -> float:
        """Return the mean over all classes but `left_out`, 0..1. As in mIoU, a class without any pixel counts 0."""
        iou = self.hit / np.maximum(1, self.union)
        return float(np.mean([iou[k] for k in range(len(iou)) if k not in left_out]))


class Measured:
    """The measures of one prediction under one choice of options."""

    def __init__(self, header: Header, tolerance: int) -> None:
        self.left_out, n_class = header.classes.left_out, len(header.classes)
        self.seams, self.matrix, self.boundary = Seams(), ConfusionMatrix(n_class), BoundaryIou(n_class, tolerance)

    def update(self, ids: Tensor, label: Tensor | None, grid: PatchGrid) -> None:
        """Count an image: ids and label (H, W) uint8, and its patches."""
        self.seams.update(ids, grid)
        if label is not None:
            self.matrix.update(label, ids)
            self.boundary.update(label.numpy(), ids.numpy())

    def to_record(self, labelled: bool) -> dict[str, float]:
        """Return the measures by name, 0..1, and without labels those of seams alone."""
        scores = {"mIoU": self.matrix.mean_iou(self.left_out), "boundary_iou": self.boundary.mean(self.left_out)}
        return {**self.seams.to_record(), **(scores if labelled else {})}


def images(options: argparse.Namespace, header: Header) -> Iterator[tuple[Source, Tensor | None]]:
    """Yield each image with its label (H, W) uint8, None without labels. Raises InputError if one cannot be read."""
    view = View.parse(header.bands, header.stretch)
    for path in options.input or ():
        with open_image(path, view) as source:
            yield load_in_memory(source), None
    if options.input:
        return
    described = registry.describe(options.dataset, options.data_path)
    data = described.open(options.split or described.validation, header.size_g, header.classes)
    data.view = view
    for (sample,) in SampleLoader(data, sampler=range(min(len(data), options.limit or len(data)))):
        yield MemorySource(sample.image), sample.label


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the measures: `label`, those of the labels' own borders, and `runs`, a record for each choice of options.

    Raises InputError if a file cannot be used.
    """
    model, header = load_network(options.checkpoint, options.path_g, options.mode, {})
    stage, settings = STAGES[header.stage], header.settings(device=pick_device(options.device))
    if settings.selection is not None:
        raise InputError(f"{options.checkpoint} is coarse to fine: its patches do not cover the image; take another")
    predictor = Predictor.prepare(model, stage, settings, header.size_g)
    blends = tuple(BLENDS) if stage.number > 1 else ("none",)
    runs = {
        (blend, upsample): {name: Measured(header, options.tolerance) for name in stage.predictions}
        for blend in blends
        for upsample in UPSAMPLES
    }
    count, labels, labelled = 0, Seams(), False
    for source, label in images(options, header):
        grid = PatchGrid.cover(source.size, header.size_p, header.min_overlap)
        count, labelled = count + 1, label is not None
        if label is not None:
            labels.update(label, grid)
        for (blend, upsample), measured in runs.items():
            sinks = {name: ArgmaxSink(source.size, settings.device) for name in measured}
            one = replace(predictor, settings=replace(settings, blend=blend, upsample=upsample))
            one.segment(source, sinks)
            for name, sink in sinks.items():
                measured[name].update(sink.ids.cpu(), label, grid)
    return {
        "checkpoint": str(options.checkpoint),
        "mode": stage.number,
        "images": count,
        "tolerance": options.tolerance,
        **({"label": labels.to_record()} if labelled else {}),
        "runs": [
            {
                "blend": blend,
                "upsample": upsample,
                **{name: one.to_record(labelled) for name, one in measured.items()},
            }
            for (blend, upsample), measured in runs.items()
        ],
    }


def table(found: dict[str, Any]) -> str:
    """Return the record of `measure` as lines of text. The global prediction, which has no patches, is not blended."""
    names = STAGES[found["mode"]].predictions
    columns = {"share": "on borders, %", "chance": "by chance, %", "ratio": "ratio"}
    columns |= {"mIoU": "mIoU, %", "boundary_iou": f"boundary IoU within {found['tolerance']} pixels, %"}
    columns = {key: title for key, title in columns.items() if key in found["runs"][0][names[0]]}
    rows = [("prediction", "blend", "upsample", *columns.values())]
    if "label" in found:
        rows.append(("label", "", "", *_cells(found["label"], columns)))
    for name in names:
        for run in found["runs"]:
            if name != "global" or run["blend"] == "none":
                rows.append((name, run["blend"], run["upsample"], *_cells(run[name], columns)))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cells(record: dict[str, float], columns: dict[str, str]) -> list[str]:
    """Return the values of a record under `columns`, as text: ratios as they are, all else in per cent."""
    scale = {"ratio": 1}
    return [f"{scale.get(key, 100) * record[key]:.2f}" if key in record else "" for key in columns]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m benchmarks.seams",
        description="Measure seams at patch borders, and class borders, under each --blend and --upsample.",
    )
    add = parser.group("network")
    default = DEMO / "saved_models" / "fpn_deepglobe_local2global.pth"
    add("--checkpoint", type=Path, default=default, metavar="FILE", help="(default: the demo's last)")
    add("--mode", type=int, choices=(1, 2, 3), help="(default: the checkpoint's; a released file needs it)")
    add("--path_g", type=Path, metavar="FILE", help="stage 1's file, beside a released one of stage 3")
    add("--device", help="(default: cuda where there is one, else cpu)")
    add = parser.group("images")
    add("--input", type=Path, nargs="+", metavar="IMAGE", help="images without labels, instead of a data set's")
    add("--dataset", choices=registry.NAMES, default="deep_globe", help="(default: %(default)s)")
    add("--data_path", type=Path, default=DEMO / "data", help="the data set's folder (default: the demo's)")
    add("--split", help="(default: the one that training validates on)")
    add("--limit", type=whole(1), metavar="N", help="the first N images of the split only (default: all)")
    add = parser.group("measures")
    add(
        "--tolerance",
        type=whole(1),
        default=TOLERANCE,
        metavar="PIXELS",
        help="how near its class's border a pixel is that the boundary IoU counts (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table, and write it as JSON if that is requested."""
    found = measure(options)
    print(f"{found['checkpoint']}, mode {found['mode']}, {found['images']} images")
    print(table(found))
    if options.json:
        write_json(options.json, found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
