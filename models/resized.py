"""Convolutions of resized maps, computed without the resized maps.

A 3x3 convolution of a resized map is, for each of its nine taps, a 1x1 convolution, a resize and a shift. The 1x1
convolution commutes with the other two, so it is done at the map's own size. Bilinear resizing, shifting and padding
with zeros are linear in rows and columns separately, so they are one matrix for the rows and one for the columns.
Resizes in a row multiply into one matrix. All of it is exact up to rounding, and has gradients.

Of these matrices only a band around the diagonal is not 0, so an axis is cut into pieces, each with the piece of the
source that it reads. Columns come first, all rows of the kernel at once where memory allows: a batched product with a
contiguous result, which is copied to its place. Then the rows, whose columns and channels are one long axis, are added
to the result by large products. Smaller pieces save arithmetic, larger ones save calls.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from models.pyramid import fitted, resize
from utils.tiling import Size, map_size

Bands = tuple[tuple[slice, slice, Tensor], ...]
"""Pieces of a target axis, each with the piece of the source axis that it depends on, and with the matrix (cells of the
target, cells of the source, 3) that resizes and shifts the three taps of each cell."""

BAND_CELLS = 16
"""Cells of the source axis that a product of matrices takes at least at a time."""

SLACK = 1e-3
"""The part of a cell within which torch, which computes in float32, may round to the neighbouring cell."""

TRANSIENT = 5 * 2**20
"""The most elements of transient maps. `add_resized_conv` takes fewer samples at a time to stay below it."""

TRANSIENT_CHANNELS = 192
"""Without gradients, transient maps may have as many elements as a map of this many channels at the result's size, if
that is more than `TRANSIENT`. Calls are fewer then, and the peak of memory, which is elsewhere, is the same."""


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve `x` (N, C, H, W) by `weight` (K, C, k, k) of odd k, keeping the size: (N, K, H, W)."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def split_pays(source: Size, target: Size) -> bool:
    """Return whether nine taps at size `source` cost less than resizing to `target` and convolving there.

    Taps save work in proportion to the cells, but cost two matrix products.
    """
    return 2 * source[0] * source[1] <= target[0] * target[1]


def joint_conv(maps: Sequence[Tensor], chains: Sequence[list[Size]], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Convolve a concatenation of resized maps, which is not built: (N, K, H, W).

    Maps that are resized alike are concatenated at their own size and resized together. Maps of size (H, W), which are
    the largest, are not copied.

    Args:
        maps: (N, C_i, h_i, w_i) each, at least one of them of size (H, W).
        chains: for each map the sizes that it is resized to in turn, the last one (H, W).
        weights: for each map its part of the kernel, (K, C_i, k, k).
        bias: (K,).
    """
    groups: dict[tuple[Size, ...], list[int]] = defaultdict(list)
    for i, (x, chain) in enumerate(zip(maps, chains, strict=True)):
        groups[tuple(size for size, _ in groupby([map_size(x), *chain]))].append(i)
    fitting, *others = sorted(groups, key=len)  # by the number of sizes: the first group has but one
    first, *more = groups[fitting]
    total = conv(maps[first], weights[first], bias)
    for i in more:
        total = total.add_(conv(maps[i], weights[i]))
    for sizes in others:
        own = groups[sizes]
        x, weight = (x[own[0]] if len(own) == 1 else torch.cat([x[i] for i in own], dim=1) for x in (maps, weights))
        total = add_resized_conv(total, x, weight, list(sizes[1:]))
    return total


def add_resized_conv(total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
    """Return `total` (N, K, H, W), to which the convolution of a resized map `x` (N, C, h, w) is added in place.

    `weight` is (K, C, k, k), k being 1 or 3; `chain` are the sizes that `x` is resized to in turn, the last one (H, W).
    """
    source, target = map_size(x), map_size(total)
    convolved = weight.shape[-1] == 1 and source[0] * source[1] < target[0] * target[1]
    if convolved:  # a 1x1 convolution commutes with resizing
        x = F.conv2d(x, weight)  # (N, K, h, w)
    elif split_pays(source, target):
        total = total.contiguous(memory_format=torch.channels_last)
        return _AddTaps.apply(total, x, weight, [source, *chain])
    for size in chain:
        x = fitted(x, size)
    return total.add_(x if convolved else conv(x, weight))


class _AddTaps(torch.autograd.Function):
    """`add_resized_conv` of a 3x3 kernel as nine 1x1 convolutions at the size of `x`, then resized, shifted and added.

    The taps are larger than the result. With the gradient written here, only those of a few samples are held at a time.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chain = chain
        ctx.mark_dirty(total)
        sums = _cells(total)  # (N, H, W, K)
        weight = weight.to(total.dtype)
        room = 0 if any(ctx.needs_input_grad) else TRANSIENT_CHANNELS * sums[..., 0].numel()
        for part, rows in _parts(len(x), chain, len(weight), max(TRANSIENT, room)):
            cells = x[part].to(total.dtype).contiguous(memory_format=torch.channels_last)
            _spread(sums[part], _cells(F.conv2d(cells, _taps_of_rows(weight, rows))), chain, rows)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        cells = x.to(gradient.dtype).contiguous(memory_format=torch.channels_last)
        sums, weight_read = _cells(gradient), weight.to(gradient.dtype)  # (N, H, W, K) and (K, C, 3, 3)
        from_x = torch.zeros_like(cells) if ctx.needs_input_grad[1] else None
        from_kernel = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        # half of the limit is for copies that `_gather` makes
        for part, rows in _parts(len(x), ctx.chain, len(weight), TRANSIENT // 2):
            kernel = _taps_of_rows(weight_read, rows)
            taps = _gather(sums[part], ctx.chain, rows).permute(0, 3, 1, 2)  # (n, 3 * R * K, h, w)
            # convolutions, because in float32 they are faster than products of matrices on some CPUs
            if from_x is not None:
                from_x[part] += F.conv2d(taps, kernel.transpose(0, 1))
            if from_kernel is not None:
                found = conv2d_weight(cells[part], list(kernel.shape), taps)  # (3 * R * K, C, 1, 1)
                from_kernel[:, :, rows] += found.view(3, -1, *weight.shape[:2]).permute(2, 3, 1, 0)
        return gradient, None if from_x is None else from_x.to(x.dtype), from_kernel, None


def _taps_of_rows(weight: Tensor, rows: slice) -> Tensor:
    """Return R rows of a kernel (K, C, 3, 3) as one 1x1 convolution (3 * R * K, C, 1, 1): by column, R taps each."""
    return weight[:, :, rows].permute(3, 2, 0, 1).flatten(0, 2)[..., None, None]


def _cells(x: Tensor) -> Tensor:
    """Return (N, C, H, W) as contiguous (N, H, W, C); a view if the channels are last in memory already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _parts(count: int, chain: list[Size], k: int, limit: int) -> list[tuple[slice, slice]]:
    """Return slices of `count` samples, each with each slice of the kernel's rows that is computed at a time.

    All rows at a time are faster, but take three times as much of each sample; where that is more than half of the
    limit, rows go singly. `limit` is how many elements the taps, of size `chain[0]` and K = `k` channels, and what is
    resized of them have at most, unless they are of one sample and row.
    """
    (h, w), width = chain[0], chain[-1][1]
    of_row = max(h * (3 * w + width) * k, 1)
    rows = [slice(0, 3)] if 6 * of_row <= limit else [slice(row, row + 1) for row in range(3)]
    step = max(1, limit * len(rows) // (3 * of_row))
    return [(slice(start, start + step), of_kernel) for start in range(0, count, step) for of_kernel in rows]


def add_taps(taps: Tensor) -> Tensor:
    """Shift nine taps, (N, 9 * K, H, W), the places outermost, by their places, and add them: (N, K, H, W) float32."""
    n, channels, h, w = taps.shape
    k = channels // 9
    total = taps.new_zeros((n, k, h + 2, w + 2), dtype=torch.float32)
    for place, tap in enumerate(taps.split(k, dim=1)):
        row, column = divmod(place, 3)
        total[:, :, 2 - row : 2 - row + h, 2 - column : 2 - column + w] += tap
    return total[:, :, 1:-1, 1:-1]


def taps_of(weight: Tensor) -> Tensor:
    """Return the taps of a kernel (K, C, 3, 3) as one 1x1 convolution (9 * K, C, 1, 1), row by row of the kernel."""
    return weight.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None]


def resize_and_add_taps(taps: Tensor, chain: list[Size]) -> Tensor:
    """Resize nine taps, shift each by its place in the kernel, and add them. Differentiable.

    `taps` are (N, 9 * K, h, w), the places outermost, row by row. `chain` is their size, then the sizes that they are
    resized to in turn. Return (N, K, H, W) of the last size, channels last in memory.
    """
    by_column = taps.unflatten(1, (3, 3, -1)).permute(0, 4, 5, 2, 1, 3)  # (N, h, w, 3, 3, K)
    return _Spread.apply(by_column.flatten(3), chain).permute(0, 3, 1, 2)


class _Spread(torch.autograd.Function):
    """`_spread` into zeros, (N, h, w, 9 * K) to (N, H, W, K), with its gradient."""

    @staticmethod
    def forward(ctx: Any, taps: Tensor, chain: list[Size]) -> Tensor:
        ctx.chain = chain
        total = taps.new_zeros(len(taps), *chain[-1], taps.shape[-1] // 9)
        _spread(total, taps.contiguous(), chain, slice(0, 3))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient.contiguous(), ctx.chain, slice(0, 3)), None


def _spread(total: Tensor, taps: Tensor, chain: list[Size], rows: slice) -> None:
    """Resize taps, shift each by its place in the kernel, and add them to `total` (n, H, W, K).

    First across, then down. `taps` are (n, h, w, 3 * R * K), of R `rows` of the kernel: column by column, R taps each.
    `chain` is their size, then the sizes that they are resized to in turn.
    """
    (n, h, w, channels), (_, _, width, k) = taps.shape, total.shape
    count = channels // (3 * k)
    down, across = _bands(chain, total)
    taps = taps.view(n * h, w * 3, count * k)
    x = taps.new_empty(n, h, count, width, k)
    for target, source, matrix in across:
        product = torch.bmm(matrix.flatten(1).expand(n * h, -1, -1), taps[:, _times(source, 3)])  # (n * h, W', R * K)
        x[:, :, :, target] = product.view(n, h, -1, count, k).transpose(2, 3)
    x = x.view(n, h * count, width * k)
    for target, source, matrix in down:
        of_rows = matrix[:, :, rows].flatten(1).expand(n, -1, -1)
        total.flatten(2)[:, target].baddbmm_(of_rows, x[:, _times(source, count)])


def _gather(total: Tensor, chain: list[Size], rows: slice) -> Tensor:
    """Return the gradient of `taps` in `_spread` from that of `total`: the transposed products in reverse order."""
    (n, _, width, k), (h, w) = total.shape, chain[0]
    count = rows.stop - rows.start
    down, across = _bands(chain, total)
    x = total.new_zeros(n, h * count, width * k)
    for target, source, matrix in down:
        of_rows = matrix[:, :, rows].flatten(1).t().expand(n, -1, -1)
        x[:, _times(source, count)].baddbmm_(of_rows, total.flatten(2)[:, target])
    x = x.view(n, h, count, width, k)
    taps = total.new_zeros(n * h, w * 3, count * k)
    for target, source, matrix in across:
        part = x[:, :, :, target].transpose(2, 3).reshape(n * h, -1, count * k)  # (n * h, W', R * K)
        taps[:, _times(source, 3)] += torch.bmm(matrix.flatten(1).t().expand(n * h, -1, -1), part)
    return taps.view(n, h, w, 3 * count * k)


def _times(cells: slice, count: int) -> slice:
    return slice(count * cells.start, count * cells.stop)


def _bands(chain: list[Size], like: Tensor) -> tuple[Bands, Bands]:
    """Return the bands of rows and of columns, on the device and in the type of `like`; see `axis_bands`."""
    rows, columns = (axis_bands(tuple(size[axis] for size in chain), like.dtype, like.device) for axis in (0, 1))
    return rows, columns


@functools.lru_cache(maxsize=256)
def axis_bands(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Bands:
    """Return the bands of one axis with these `lengths` along the chain."""
    with torch.inference_mode(False):  # kept tensors are read in training, too
        matrix = _axis_matrix(lengths, dtype, device)
    count = max(1, min(lengths[0] // BAND_CELLS, lengths[-1]))
    edges = [i * lengths[-1] // count for i in range(count + 1)]
    bands = []
    for first, last in pairwise(edges):
        low, high = max(first - 1, 0), min(last, lengths[-1] - 1)  # the cells at both ends, shifted by a tap
        for source, target in reversed(list(pairwise(lengths))):
            centers = ((cell + 0.5) * source / target - 0.5 for cell in (low, high))
            low, high = (math.floor(center + slack) for center, slack in zip(centers, (-SLACK, SLACK), strict=True))
            low, high = max(low, 0), min(high + 1, source - 1)
        rows, columns = slice(first, last), slice(low, high + 1)
        bands.append((rows, columns, matrix[rows, columns].contiguous()))
    return tuple(bands)


def _axis_matrix(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (last, first, 3) that resizes and shifts the three taps of each cell along one axis.

    The taps are resized to the `lengths` in turn, then shifted by -1, 0 or 1 and padded with zeros.
    """
    exact = torch.promote_types(dtype, torch.float32)  # rounded to a lower precision once, at the end
    x = torch.eye(lengths[0], dtype=exact, device=device).view(lengths[0], 1, lengths[0], 1)
    for length in lengths[1:]:
        x = resize(x, (length, 1))
    padded = F.pad(x.view(lengths[0], lengths[-1]).t(), (0, 0, 1, 1)).to(dtype)  # (last + 2, first)
    return padded.unfold(0, 3, 1)
