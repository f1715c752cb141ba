"""Where the logits of overlapping patches are summed, a band of rows at a time."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Patches, Size

Sink = Callable[[int, Tensor], None]
"""Takes rows that are final, from the top of the image to its bottom: the first row's number, and the rows' scores
(n_class, rows, W), which are overwritten after the call."""

Outside = Callable[[int, int], Tensor]
"""Gives the scores of pixels that no patch covers: of a number of rows, from a first row on, (n_class, rows, W) or of a
shape that is broadcast to it."""

RESULT_ROWS = 512
"""Rows of a result that are passed on at a time."""


class ArgmaxSink:
    """A sink that keeps the class with the highest score of each pixel."""

    def __init__(self, size: Size, device: torch.device | str = "cpu") -> None:
        """Start without ids.

        Args:
            size: of the image, in pixels.
            device: of the scores.
        """
        self.size = size
        self.device = device

    @cached_property
    def ids(self) -> Tensor:
        """The class ids, (H, W) uint8, on the device. Their memory is taken when the first rows come."""
        return torch.empty(self.size, dtype=torch.uint8, device=self.device)

    def __call__(self, top: int, scores: Tensor) -> None:
        best, ids = scores[0], self.ids[top : top + scores.shape[1]].zero_()
        for k in range(1, len(scores)):  # argmax over the planes; torch's own is ten times slower on a CPU
            ids.masked_fill_(scores[k] > best, k)
            best = torch.maximum(best, scores[k])


class ScoreCanvas:
    """Adds the logits of overlapping patches, each enlarged to the patch's size with torch's `nearest`.

    Patches come in their order, which is also the order of additions to each pixel. A row goes to the sink as soon as
    no later patch reaches it, so that only one band, as high as a patch, is held.
    """

    def __init__(self, grid: Patches, sink: Sink, means: bool = False, outside: Outside | None = None) -> None:
        """Start empty.

        Args:
            grid: the image's patches.
            sink: gets the scores (n_class, rows, W).
            means: whether scores are means over the patches that cover a pixel, or sums.
            outside: gives the scores of pixels that no patch covers; None if there are no such pixels.
        """
        self.grid = grid
        self.sink = sink
        self.means, self.outside = means, outside
        self.top = 0  # of the band, in the image
        self.band: Tensor | None = None  # (n_class, patch height, W)

    def add(self, logits: Tensor, patches: slice) -> None:
        """Add the logits of the next patches.

        Args:
            logits: (n, n_class, h, w).
            patches: which patches of the grid, n of them.
        """
        boxes = self.grid.boxes()
        if self.band is None:
            self.band = logits.new_zeros(logits.shape[1], self.grid.patch[0], self.grid.image[1])
        for box, scores in zip(boxes[patches], logits.split(1), strict=True):
            self._finish_rows(self.band, box.top)
            enlarged = F.interpolate(scores, size=self.grid.patch, mode="nearest")[0]
            self.band[:, :, box.left : box.left + box.width] += enlarged
        if patches.stop == len(boxes):
            self._finish_rows(self.band, self.grid.image[0])
            self.band = None

    def _finish_rows(self, band: Tensor, end: int) -> None:
        """Pass the rows above `end` on to the sink, and move the rest of `band` up to its first row."""
        while self.top < end:
            count = min(end - self.top, band.shape[1])
            self.sink(self.top, self._final(band[:, :count]))
            remaining = band[:, count:].clone()
            band[:, : remaining.shape[1]] = remaining
            band[:, remaining.shape[1] :] = 0
            self.top += count

    def _final(self, rows: Tensor) -> Tensor:
        """Return the scores of `rows` (n_class, rows, W), which are sums over patches."""
        if not self.means and self.outside is None:
            return rows
        counts = self.grid.counts(self.top, rows.shape[1]).to(rows.device)
        if self.means:
            rows = rows / counts.clamp(min=1)
        if self.outside is not None:
            rows = torch.where(counts == 0, self.outside(self.top, rows.shape[1]).to(rows), rows)
        return rows


def enlarge(logits: Tensor, size: Size, sink: Sink, band: int = RESULT_ROWS) -> None:
    """Enlarge the logits of a whole image with torch's `nearest` and send them to a sink.

    Args:
        logits: (1, n_class, h, w).
        size: of the image, in pixels.
        sink: gets the enlarged logits.
        band: rows that are sent at a time.
    """
    rows = enlarged_rows(logits, size)
    for top in range(0, size[0], band):
        sink(top, rows(top, band))


def enlarged_rows(logits: Tensor, size: Size) -> Outside:
    """Return a function that gives rows of a whole image's logits, enlarged with torch's `nearest`.

    Args:
        logits: (1, n_class, h, w).
        size: of the image, in pixels.
    """
    rows = _nearest(logits.shape[-2], size[0]).to(logits.device)
    columns = _nearest(logits.shape[-1], size[1]).to(logits.device)

    def give(top: int, count: int) -> Tensor:
        return logits[0].index_select(1, rows[top : top + count]).index_select(2, columns)

    return give


def _nearest(source: int, target: int) -> Tensor:
    """Return the cell of `source` that torch's `nearest` reads for each cell of `target`, (target,) int64.

    The result is computed by torch itself, as torch rounds in float32.
    """
    cells = torch.arange(source, dtype=torch.float32).view(1, 1, source)
    return F.interpolate(cells, size=target, mode="nearest").view(target).long()
