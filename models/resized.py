"""Convolutions of resized maps, computed without the resized maps.

A 3x3 convolution of a resized map is, for each of its nine taps, a 1x1 convolution, a resize and a shift. The 1x1
convolution commutes with the other two, so it is done at the map's own size. Bilinear resizing, shifting and padding
with zeros are linear in rows and columns separately, so they are one matrix for the rows and one for the columns.
Resizes in a row multiply into one matrix. All of it is exact up to rounding, and has gradients.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Size

Bands = list[tuple[slice, slice]]

BAND_CELLS = 16
"""Cells of a map that is resized, which a product of matrices takes at least at a time."""
SLACK = 1e-3
"""Of a cell: where torch, which counts in float32, may round to the neighbouring one."""
TRANSIENT = 2**22
"""Elements of a transient map, above which `add_resized_conv` takes fewer samples at a time."""


def resize(x: Tensor, size: Size | torch.Size) -> Tensor:
    """Bilinear resize of (N, C, H, W) to `size`, no aligned corners, no antialiasing; `x` itself if it fits."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution that keeps the size, with a square kernel of odd side."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def split_pays(source: Size, target: Size) -> bool:
    """Whether nine taps at `source`'s size cost less than resizing to `target` and convolving there.

    They save work in proportion to the cells, and spend it on the two matrix products.
    """
    return 2 * source[0] * source[1] <= target[0] * target[1]


def joint_conv(maps: Sequence[Tensor], chains: Sequence[list[Size]], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """The convolution of a concatenation, each map resized along its chain; at least one has the size asked for.

    Maps that are resized alike are concatenated, at their own size, and share the work of resizing. Those that need
    none are the largest, and are not copied.
    """
    groups: dict[tuple[Size, ...], list[int]] = defaultdict(list)
    for i, (x, chain) in enumerate(zip(maps, chains, strict=True)):
        sizes = [tuple(x.shape[-2:]), *chain]
        groups[tuple(size for size, _ in groupby(sizes))].append(i)
    total = None
    for sizes in sorted(groups, key=len):
        if len(sizes) == 1:
            for i in groups[sizes]:
                total = conv(maps[i], weights[i], bias) if total is None else total.add_(conv(maps[i], weights[i]))
        else:
            x, weight = (torch.cat([parts[i] for i in groups[sizes]], dim=1) for parts in (maps, weights))
            total = add_resized_conv(total, x, weight, list(sizes[1:]))
    return total


def add_resized_conv(total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
    """`total` (N, K, H, W) plus the convolution by `weight` (K, C, k, k) of `x` (N, C, h, w), resized first.

    `x` is resized to each size of `chain` in turn, the last one (H, W). k is 1 or 3. `total` is changed.
    """
    source, target = tuple(x.shape[-2:]), tuple(total.shape[-2:])
    if weight.shape[-1] == 1 and source[0] * source[1] < target[0] * target[1]:
        x, weight = F.conv2d(x, weight), None
    elif split_pays(source, target):
        total = total.contiguous(memory_format=torch.channels_last)
        return _AddTaps.apply(total, x, weight, [source, *chain])
    for size in chain:
        x = resize(x, size)
    return total.add_(x if weight is None else conv(x, weight))


class _AddTaps(torch.autograd.Function):
    """`add_resized_conv` of a 3x3 kernel as nine 1x1 convolutions at the size of `x`, then resized, shifted and added.

    Written with its gradient, so that of the taps, which are larger than the result, only those of one row of the
    kernel and of a few samples live at a time.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chain = chain
        ctx.mark_dirty(total)
        (rows, across), bands = tap_matrices(chain, total), _bands(chain)
        x, kernel = _cells(x.to(total.dtype)), row_taps(weight.to(total.dtype))
        for part in _parts(x, chain, 3 * len(weight)):
            for matrix, taps in zip(rows, kernel, strict=True):
                _spread_row(_cells(total)[part], torch.matmul(x[part], taps.t()), matrix, across, bands)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (_, _, h, w), k = x.shape, len(weight)
        (rows, across), bands = tap_matrices(ctx.chain, gradient), _bands(ctx.chain)
        cells, kernel = _cells(x.to(gradient.dtype)), row_taps(weight.to(gradient.dtype))
        from_x = torch.zeros_like(cells) if ctx.needs_input_grad[1] else None
        from_weight = [torch.zeros_like(taps, dtype=weight.dtype) for taps in kernel]
        for part in _parts(cells, ctx.chain, 3 * k):
            theirs = _cells(gradient[part]).flatten(2)  # (n, H, W * K)
            for matrix, taps, total in zip(rows, kernel, from_weight, strict=True):
                down = theirs.new_zeros(len(theirs), h, theirs.shape[2])
                for target, source in bands[0]:
                    _add_product(down[:, source], matrix[target, source].t(), theirs[:, target])
                down = down.view(len(theirs) * h, -1, k)
                back = down.new_zeros(len(down), w * 3, k)
                for target, source in bands[1]:
                    source = slice(3 * source.start, 3 * source.stop)
                    _add_product(back[:, source], across[target, source].t(), down[:, target])
                back = back.view(len(theirs), h, w, 3 * k)
                if from_x is not None:
                    from_x[part] += torch.matmul(back, taps)
                if ctx.needs_input_grad[2]:
                    total += torch.matmul(back.flatten(0, 2).t(), cells[part].flatten(0, 2))
        if from_x is not None:
            from_x = from_x.permute(0, 3, 1, 2).to(x.dtype)
        # (3 rows, 3 columns, K, C) to (K, C, 3, 3)
        from_weight = torch.stack(from_weight).view(3, 3, k, -1).permute(2, 3, 0, 1)
        return gradient, from_x, from_weight if ctx.needs_input_grad[2] else None, None


def _cells(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C) with neighbouring channels side by side; a view where they lie so already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _parts(cells: Tensor, chain: list[Size], channels: int) -> list[slice]:
    """Slices of samples, so few that the transient maps of `_AddTaps` stay small."""
    largest = max(chain[0][0] * max(chain[0][1] * channels, chain[-1][1] * channels // 3), 1)
    step = max(1, TRANSIENT // largest)
    return [slice(start, start + step) for start in range(0, len(cells), step)]


def row_taps(weight: Tensor) -> list[Tensor]:
    """For each row of a kernel (K, C, 3, 3), its taps as one matrix (3 * K, C), the taps outermost."""
    return [row.permute(2, 0, 1).flatten(0, 1) for row in weight.unbind(2)]


def add_taps(taps: Tensor) -> Tensor:
    """Shift nine taps (N, 9 * K, H, W), the places outermost, each by its place, and add: (N, K, H, W) float32."""
    n, channels, h, w = taps.shape
    k = channels // 9
    total = taps.new_zeros((n, k, h + 2, w + 2), dtype=torch.float32)
    for place, tap in enumerate(taps.split(k, dim=1)):
        row, column = divmod(place, 3)
        total[:, :, 2 - row : 2 - row + h, 2 - column : 2 - column + w] += tap
    return total[:, :, 1:-1, 1:-1]


def taps_of(weight: Tensor) -> Tensor:
    """The taps of a kernel (K, C, 3, 3), as one 1x1 convolution (9 * K, C, 1, 1), the places outermost, row by row."""
    return torch.cat(row_taps(weight))[..., None, None]


def resize_and_add_taps(taps: list[Tensor], chain: list[Size]) -> Tensor:
    """Resize taps along the sizes of `chain` (the first is their own), shift each by its place, and add.

    `taps`: for each row of the kernel (N, 3 * K, h, w), its three taps outermost. Returns (N, K, H, W) of the chain's
    last size, channels last in memory. Has gradients.
    """
    n, channels, _, _ = taps[0].shape
    (rows, across), bands = tap_matrices(chain, taps[0]), _bands(chain)
    total = taps[0].new_zeros(n, *chain[-1], channels // 3)
    for matrix, tap in zip(rows, taps, strict=True):
        _spread_row(total, _cells(tap), matrix, across, bands)
    return total.permute(0, 3, 1, 2)


def _spread_row(total: Tensor, taps: Tensor, matrix: Tensor, across: Tensor, bands: tuple[Bands, Bands]) -> None:
    """Add to `total` (n, H, W, K) the `taps` (n, h, w, 3 * K) of one row of a kernel; see `tap_matrices`."""
    (n, h, w, _), (_, _, width, k) = taps.shape, total.shape
    taps = taps.view(n * h, w * 3, k)
    x = taps.new_zeros(n * h, width, k)
    for target, source in bands[1]:
        source = slice(3 * source.start, 3 * source.stop)
        _add_product(x[:, target], across[target, source], taps[:, source])
    x = x.view(n, h, width * k)
    for target, source in bands[0]:
        _add_product(total.flatten(2)[:, target], matrix[target, source], x[:, source])


def _add_product(total: Tensor, matrix: Tensor, x: Tensor) -> None:
    """Add `matrix` (a, b) times each of `x` (n, b, c) to `total` (n, a, c)."""
    total.baddbmm_(matrix.expand(len(x), -1, -1), x)


def _bands(chain: list[Size]) -> tuple[Bands, Bands]:
    """For rows and for columns: pieces of the chain's last size, each with the piece of the first that it reads.

    Elsewhere the matrices of `tap_matrices` are 0, so that products by pieces save most of the work of long ones.
    """
    return tuple(_axis_bands([size[axis] for size in chain]) for axis in (0, 1))


def _axis_bands(lengths: list[int]) -> Bands:
    count = max(1, min(lengths[0] // BAND_CELLS, lengths[-1]))
    edges = [i * lengths[-1] // count for i in range(count + 1)]
    bands = []
    for first, last in pairwise(edges):
        low, high = max(first - 1, 0), min(last, lengths[-1] - 1)  # the cells at both ends, shifted by a tap
        for source, target in reversed(list(pairwise(lengths))):
            centers = ((cell + 0.5) * source / target - 0.5 for cell in (low, high))
            low, high = (math.floor(center + slack) for center, slack in zip(centers, (-SLACK, SLACK), strict=True))
            low, high = max(low, 0), min(high + 1, source - 1)
        bands.append((slice(first, last), slice(low, high + 1)))
    return bands


def tap_matrices(chain: list[Size], like: Tensor) -> tuple[list[Tensor], Tensor]:
    """The matrices that resize along `chain` and shift: for each row of a kernel (H, h), and one (W, w * 3).

    The latter takes the three taps of a row at once; those of a cell lie side by side.
    """
    rows, columns = (_axis_matrices([size[axis] for size in chain], like) for axis in (0, 1))
    return rows, torch.stack(columns, dim=2).flatten(1)


def _axis_matrices(lengths: list[int], like: Tensor) -> list[Tensor]:
    """Three (last, first) matrices: the resizes of `lengths` in turn, and a zero-padded shift by -1, 0 or 1."""
    exact = torch.promote_types(like.dtype, torch.float32)  # rounded to a lower precision once, at the end
    x = torch.eye(lengths[0], dtype=exact, device=like.device).view(lengths[0], 1, lengths[0], 1)
    for length in lengths[1:]:
        x = resize(x, (length, 1))
    padded = F.pad(x.view(lengths[0], lengths[-1]).t(), (0, 0, 1, 1)).to(like.dtype)
    return [padded[tap : tap + lengths[-1]] for tap in range(3)]
