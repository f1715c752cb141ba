"""Seams: class borders on borders of patches, which blending removes."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from builders import build_sample, build_settings, forward, shared_model
from torch import Tensor

from utils.canvas import UPSAMPLES, ArgmaxSink, ScoreCanvas
from utils.tiling import BLENDS, Axis, PatchGrid

pytestmark = pytest.mark.slow

CHOICES = list(product(BLENDS, UPSAMPLES))


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


def test_blending_removes_the_lattice_of_a_random_network() -> None:
    """Class borders on patch borders, as a multiple of chance. In blocks every class border is one of cells, as is
    every patch border, so that the multiple is large without any seam."""
    found, grid = forward(shared_model(), 2, build_sample((101, 131)), build_settings())
    ratios = {}
    for blend, upsample in CHOICES:
        counted = Seams()
        ids = ArgmaxSink(grid.image)
        ScoreCanvas(grid, ids, blend=blend, upsample=upsample).add(found.local, slice(0, len(grid)))
        counted.update(ids.ids, grid)
        ratios[blend, upsample] = counted.to_record()["ratio"]
    for blend in ("linear", "gaussian"):
        assert ratios[blend, "nearest"] < 0.7 * ratios["none", "nearest"]
        assert ratios[blend, "bilinear"] < 1.4 < 2 < ratios["none", "bilinear"]


def test_seams_are_counted_against_chance() -> None:
    grid = PatchGrid.cover((100, 100), 60, 20)  # patches at 0 and 40: borders at 40 and 60
    ids = torch.zeros(100, 100, dtype=torch.uint8)
    ids[:, 40:] = 1
    ids[:, 50:] = 2
    found = Seams()
    found.update(ids, grid)
    assert found == Seams(pairs=2 * 99 * 100, lines=2 * 2 * 100, borders=200, seams=100)
    assert found.to_record() == pytest.approx({"share": 0.5, "chance": 2 / 99, "ratio": 0.5 / (2 / 99)})
    one = Seams()
    one.update(ids, PatchGrid.cover((100, 100), 100, 20))
    assert one.to_record() == {"share": 0, "chance": 0, "ratio": 0}
