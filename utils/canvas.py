"""Where the logits of overlapping patches are summed, a band of rows at a time."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Box, Patches, Size, map_size

Sink = Callable[[int, Tensor], None]
"""Takes rows that are final, from the top of the image to its bottom: the first row's number, and the rows' scores
(n_class, rows, W), which are overwritten after the call."""

BoxScores = Callable[[Box], Tensor]
"""Gives the scores of the pixels of a box, (n_class, height, width) or of a shape that is broadcast to it."""

RESULT_ROWS = 512
"""Rows of a result that are passed on at a time."""

UPSAMPLES = ("nearest", "bilinear")
"""How logits are enlarged to pixels, by `--upsample`: modes of torch's `interpolate`, with corners not aligned."""


class ArgmaxSink:
    """A sink that keeps the class with the highest score of each pixel of an image of `size` pixels."""

    def __init__(self, size: Size, device: torch.device | str = "cpu") -> None:
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


class FiniteScores:
    """Whether logits are finite numbers. They are summed on their device; only `ok` waits for it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Add logits, of any shape: a NaN or an infinity stays in the sum."""
        own = logits.sum(dtype=torch.float32)
        self._sum = own if self._sum is None else self._sum + own

    def ok(self) -> bool:
        """Return whether all logits were finite."""
        return self._sum is None or bool(self._sum.isfinite())


class ScoreCanvas:
    """Adds the logits of overlapping patches, each enlarged to the patch's size and weighted.

    Patches come in their order, which is also the order of additions to each pixel. A row goes to the sink as soon as
    no later patch reaches it, so that only one band, as high as a patch, is held.
    """

    def __init__(
        self,
        grid: Patches,
        sink: Sink,
        means: bool = False,
        outside: BoxScores | None = None,
        *,
        blend: str = "none",
        upsample: str = "nearest",
        check: FiniteScores | None = None,
    ) -> None:
        """Start empty.

        The `sink` gets scores (n_class, rows, W), weighted sums over the patches that cover a pixel, or with `means`
        their means. `outside` gives the scores of pixels that no patch covers; `check` gets the logits.
        """
        self.grid, self.sink, self.means, self.outside = grid, sink, means, outside
        self.blend, self.upsample, self.check = blend, upsample, check
        self.window: Tensor | None = None  # (patch height, patch width), the weights; None if they are 1
        self.top = 0  # of the band, in the image
        self.band: Tensor | None = None  # (n_class, patch height, W)

    def add(self, logits: Tensor, patches: slice) -> None:
        """Add the logits (n, n_class, h, w) of the next n patches."""
        if self.check is not None:
            self.check.add(logits)
        boxes = self.grid.boxes()
        if self.band is None:
            self.band = logits.new_zeros(logits.shape[1], self.grid.patch[0], self.grid.image[1])
            self.window = None if self.blend == "none" else self.grid.window(self.blend).to(logits.device)
        for box, scores in zip(boxes[patches], logits.split(1), strict=True):
            self._finish_rows(self.band, box.top)
            enlarged = F.interpolate(scores, size=self.grid.patch, mode=self.upsample)[0]
            if self.window is not None:
                enlarged = enlarged * self.window
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
        """Return the scores of `rows` (n_class, rows, W), which are weighted sums over patches."""
        if not self.means and self.outside is None:
            return rows
        weights = self.grid.weights(self.top, rows.shape[1], self.blend).to(rows.device)
        if self.means:
            rows = rows / weights.masked_fill(weights == 0, 1)
        if self.outside is not None:
            band = Box(self.top, 0, *map_size(rows))
            rows = torch.where(weights == 0, self.outside(band).to(rows), rows)
        return rows


def enlarge(logits: Tensor, size: Size, sink: Sink, band: int = RESULT_ROWS, upsample: str = "nearest") -> None:
    """Enlarge the logits (1, n_class, h, w) of an image of `size` pixels and send `band` rows at a time to a sink."""
    scores = enlarged_boxes(logits, size, upsample)
    for top in range(0, size[0], band):
        sink(top, scores(Box(top, 0, min(band, size[0] - top), size[1])))


def enlarged_boxes(logits: Tensor, size: Size, upsample: str = "nearest") -> BoxScores:
    """Return a function that gives boxes of a whole image's logits (1, n_class, h, w), enlarged to `size` pixels."""
    rows, columns = (
        _positions(source, target, upsample).to(logits.device)
        for source, target in zip(map_size(logits), size, strict=True)
    )
    read = _read_between if upsample == "bilinear" else lambda x, where, axis: x.index_select(axis, where.long())

    def give(box: Box) -> Tensor:
        read_rows = read(logits[0], rows[box.top : box.top + box.height], 1)
        return read(read_rows, columns[box.left : box.left + box.width], 2)

    return give


def _positions(source: int, target: int, upsample: str) -> Tensor:
    """Return what torch reads of `source` cells for each of `target`, (target,) float32; 2.5 is between cells 2 and 3.

    The result is computed by torch itself, as torch rounds in float32.
    """
    cells = torch.arange(source, dtype=torch.float32).view(1, 1, source, 1)
    return F.interpolate(cells, size=(target, 1), mode=upsample).view(target)


def _read_between(x: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Return `x` read at `positions` along an axis, linearly between two cells."""
    low = positions.long()
    high = (low + 1).clamp_(max=x.shape[axis] - 1)
    share = (positions - low).view([-1 if k == axis else 1 for k in range(x.dim())])
    first = x.index_select(axis, low)
    step = x.index_select(axis, high).sub_(first).mul_(share)  # in place: bands of large images are large
    return first.add_(step)
