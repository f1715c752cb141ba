"""Measures whether errors are rarer where a prediction is certain: python -m experiments.unsure --help

Segments the labelled images of a split as `predict.py --uncertainty` does, and compares the ensemble with the labels:
the share of all pixels, and of these the wrong ones, where global and local prediction agree and where they do not, and
by the entropy of the ensemble. Pixels without a label are left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.strip import add_data_and_network, open_both_branches, open_split
from imaging.sources import MemorySource
from prediction.scenes import Rows, segment_scenes
from prediction.segmenter import Segmenter
from training.options import task_name
from utils.arguments import Parser
from utils.classes import IGNORED
from utils.errors import InputError, exit_code, required
from utils.files import check_writable
from utils.results import RESULTS, command_of, write_results
from utils.run_record import device_name, git_commit, now
from utils.tables import as_markdown

BINS = 4
"""Equal parts of the range of a byte."""

WIDTH = 256 // BINS


def count_pixels(segmenter: Segmenter, image: Tensor, label: Tensor) -> Tensor:
    """Segment an image and count its labelled pixels.

    Args:
        segmenter: of stage 2 or 3.
        image: (bands, H, W) uint8.
        label: (H, W) uint8 class ids, 255 without a label.

    Returns:
        (2, BINS, 2) int64: by whether the branches disagree, the part of the range of the entropy, and whether the
        ensemble is wrong.
    """
    counts = torch.zeros(2 * BINS * 2, dtype=torch.int64)

    def emit(top: int, rows: Rows) -> None:
        entropy, disagreement = required(rows.uncertainty, "uncertainty").long()
        truth = label[top : top + len(rows.ids)]
        index = ((disagreement > 127) * BINS + entropy // WIDTH) * 2 + (rows.ids != truth)
        counts.add_(index[truth != IGNORED].bincount(minlength=len(counts)))

    segment_scenes(segmenter.predictor, MemorySource(image), emit, scene_size=segmenter.scene_size, uncertainty=True)
    return counts.view(2, BINS, 2)


def summarize(counts: Tensor) -> list[dict[str, Any]]:
    """Return the rows of the table: `pixels`, their share of all, 0..1, and the share of wrong ones, None of none."""
    bounds = [f"entropy {WIDTH * k} to {WIDTH * (k + 1) - 1}" for k in range(BINS)]
    parts = {
        "all": counts.sum((0, 1)),
        "global and local agree": counts[0].sum(0),
        "they disagree": counts[1].sum(0),
        **dict(zip(bounds, counts.sum(0), strict=True)),
    }
    total = int(counts.sum())
    return [
        {
            "pixels": name,
            "share": float(part.sum()) / total,
            "wrong": float(part[1] / part.sum()) if part.sum() else None,
        }
        for name, part in parts.items()
    ]


def page(record: dict[str, Any]) -> str:
    """Return the table of a record, with the command that made it."""
    cells = [
        [row["pixels"], *("-" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("share", "wrong"))]
        for row in record["rows"]
    ]
    about = f"`{record['command']}` on {record['date']}, commit {record['commit']}, {record['images']} images"
    return f"{about}\n\n{as_markdown(['pixels', 'share, %', 'of these wrong, %'], cells)}"


def run(options: argparse.Namespace) -> None:
    """Count the pixels of all images and write the table."""
    check_writable(options.output)
    segmenter = open_both_branches(options)
    data = open_split(options, segmenter)
    counts = torch.zeros(2, BINS, 2, dtype=torch.int64)
    for index in tqdm(range(len(data)), unit="image", dynamic_ncols=True):
        image, label = data.read(index)
        if label is None:
            raise InputError(f"{data.id(index)} has no label: name another --split")
        counts += count_pixels(segmenter, image, label)
    if not counts.any():
        raise InputError("no pixel of the split has a label")
    record = {
        "command": command_of("experiments.unsure"),
        "date": now(),
        "commit": git_commit(),
        "device": device_name(segmenter.predictor.settings.device),
        "images": len(data),
        "rows": summarize(counts),
    }
    write_results(options.output / f"unsure_{options.name or options.dataset}.json", record, page(record))
    print(page(record))


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m experiments.unsure",
        description="Compare a prediction with labels where it is certain and where it is not.",
    )
    add = parser.group("result")
    add("--name", type=task_name, help="of the results, unsure_NAME.json (default: the data set's)")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="of the results (default: experiments/results)")
    add_data_and_network(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
