"""Where the logits of overlapping patches are summed, a band of rows at a time."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Patches, Size

Sink = Callable[[int, Tensor], None]
"""Takes the first row and the scores (n_class, rows, W) of rows that are final, from the top of the image to its
bottom. The tensor is overwritten after the call."""


RESULT_ROWS = 512
"""Rows of a result that are passed on at a time."""


class ArgmaxSink:
    """A sink that keeps the class with the highest score: `ids` is (H, W) uint8, on `device`."""

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

    Patches come in their order. As soon as no later patch reaches a row, it goes to the sink, so that only one
    band, as high as a patch, is held. The order of additions to each pixel is that of the patches. With `means` the
    sums are divided by how many patches cover a pixel. `outside` are the scores of pixels that no patch covers, by
    class; without them, all must be covered.
    """

    def __init__(
        self, grid: Patches, sink: Sink, means: bool = False, outside: tuple[float, ...] | None = None
    ) -> None:
        self.grid = grid
        self.sink = sink
        self.means, self.outside = means, outside
        self.top = 0  # of the band, in the image
        self.band: Tensor | None = None  # (n_class, patch height, W)

    def add(self, logits: Tensor, patches: slice) -> None:
        """Add `logits` (n, n_class, h, w) of `patches`."""
        boxes = self.grid.boxes()
        if self.band is None:
            self.band = logits.new_zeros(logits.shape[1], self.grid.patch[0], self.grid.image[1])
        for box, scores in zip(boxes[patches], logits.split(1), strict=True):
            self._finish_rows(box.top)
            enlarged = F.interpolate(scores, size=self.grid.patch, mode="nearest")[0]
            self.band[:, :, box.left : box.left + box.width] += enlarged
        if patches.stop == len(boxes):
            self._finish_rows(self.grid.image[0])
            self.band = None

    def _finish_rows(self, end: int) -> None:
        """Pass on the rows above `end`, and let the band begin there."""
        while self.top < end:
            count = min(end - self.top, self.band.shape[1])
            self.sink(self.top, self._final(self.band[:, :count]))
            remaining = self.band[:, count:].clone()
            self.band[:, : remaining.shape[1]] = remaining
            self.band[:, remaining.shape[1] :] = 0
            self.top += count

    def _final(self, rows: Tensor) -> Tensor:
        if not self.means and self.outside is None:
            return rows
        counts = self.grid.counts(self.top, rows.shape[1]).to(rows.device)
        for plane, score in zip(rows, self.outside or (), strict=False):
            plane.masked_fill_(counts == 0, score)
        return rows / counts.clamp_(min=1) if self.means else rows


def enlarge(logits: Tensor, size: Size, sink: Sink, band: int = RESULT_ROWS) -> None:
    """Send whole-image logits (1, n_class, h, w), enlarged to `size` with torch's `nearest`, to `sink` in bands."""
    rows, columns = (_nearest(*lengths).to(logits.device) for lengths in zip(logits.shape[-2:], size, strict=True))
    for top in range(0, size[0], band):
        sink(top, logits[0].index_select(1, rows[top : top + band]).index_select(2, columns))


def _nearest(source: int, target: int) -> Tensor:
    """(target,) int64: the cells that torch's `nearest` reads; asked of torch itself, which counts in float32."""
    cells = torch.arange(source, dtype=torch.float32).view(1, 1, source)
    return F.interpolate(cells, size=target, mode="nearest").view(target).long()
