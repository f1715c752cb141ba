"""Where the logits of overlapping patches are summed, a band of rows at a time."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import PatchGrid, Size

Sink = Callable[[int, Tensor], None]
"""Takes the first row and the scores (n_class, rows, W) of rows that are final, from the top of the image to its
bottom. The tensor is overwritten after the call."""


class Ids:
    """A sink that keeps the class ids of an image: `ids` is (H, W) uint8, on `device`."""

    def __init__(self, size: Size, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.device = device

    @cached_property
    def ids(self) -> Tensor:
        """Made when the first rows come: until then other things may need the memory."""
        return torch.empty(self.size, dtype=torch.uint8, device=self.device)

    def __call__(self, top: int, scores: Tensor) -> None:
        best, ids = scores[0], self.ids[top : top + scores.shape[1]].zero_()
        for k in range(1, len(scores)):  # argmax over the planes; torch's own is ten times slower on a CPU
            ids.masked_fill_(scores[k] > best, k)
            best = torch.maximum(best, scores[k])


class ScoreCanvas:
    """The sum of patch logits, enlarged to the patches' size with torch's `nearest`, where patches overlap.

    Patches come in the grid's order. As soon as no later patch reaches a row, it goes to the sink, so that only one
    band, as high as a patch, is held. The order of additions to each pixel is that of the patches.
    """

    def __init__(self, grid: PatchGrid, sink: Sink) -> None:
        self.grid = grid
        self.sink = sink
        self.row = 0  # of the grid; the band begins where this row of patches does
        self.band: Tensor | None = None  # (n_class, patch height, W)

    def add(self, logits: Tensor, patches: slice) -> None:
        """Add `logits` (n, n_class, h, w) of `patches`."""
        boxes = self.grid.boxes()
        columns = len(self.grid.columns.starts)
        if self.band is None:
            self.band = logits.new_zeros(logits.shape[1], self.grid.patch[0], self.grid.image[1])
        for index, scores in zip(range(len(boxes))[patches], logits.split(1), strict=True):
            if index // columns != self.row:
                self._finish_rows(self.grid.rows.starts[self.row + 1] - self.grid.rows.starts[self.row])
                self.row += 1
            left = boxes[index].left
            enlarged = F.interpolate(scores, size=self.grid.patch, mode="nearest")[0]
            self.band[:, :, left : left + self.grid.patch[1]] += enlarged
        if patches.stop == len(boxes):
            self._finish_rows(self.grid.patch[0])
            self.band = None

    def _finish_rows(self, count: int) -> None:
        self.sink(self.grid.rows.starts[self.row], self.band[:, :count])
        remaining = self.band[:, count:].clone()
        self.band[:, : remaining.shape[1]] = remaining
        self.band[:, remaining.shape[1] :] = 0


def enlarge(logits: Tensor, size: Size, sink: Sink, band: int = 512) -> None:
    """Send whole-image logits (1, n_class, h, w), enlarged to `size` with torch's `nearest`, to `sink` in bands."""
    rows, columns = (_nearest(*lengths).to(logits.device) for lengths in zip(logits.shape[-2:], size, strict=True))
    for top in range(0, size[0], band):
        sink(top, logits[0].index_select(1, rows[top : top + band]).index_select(2, columns))


def _nearest(source: int, target: int) -> Tensor:
    """(target,) int64: the cells that torch's `nearest` reads; asked of torch itself, which counts in float32."""
    cells = torch.arange(source, dtype=torch.float32).view(1, 1, source)
    return F.interpolate(cells, size=target, mode="nearest").view(target).long()
