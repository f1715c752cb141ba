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

from utils.tiling import Size, map_size

Bands = list[tuple[slice, slice]]
"""Pieces of a target axis, each with the piece of the source axis that it depends on."""

BAND_CELLS = 16
"""Cells of the source axis that a product of matrices takes at least at a time."""

SLACK = 1e-3
"""The part of a cell within which torch, which computes in float32, may round to the neighbouring cell."""

TRANSIENT = 2**22
"""The most elements of a transient map. `add_resized_conv` takes fewer samples at a time to stay below it."""


def resize(x: Tensor, size: Size) -> Tensor:
    """Return `x` (N, C, H, W) resized bilinearly, without aligned corners or antialiasing; `x` itself if it fits."""
    if map_size(x) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve `x` (N, C, H, W) by `weight` (K, C, k, k) of odd k, keeping the size: (N, K, H, W)."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def split_pays(source: Size, target: Size) -> bool:
    """Return whether nine taps at size `source` cost less than resizing to `target` and convolving there.

    Taps save work in proportion to the cells, but cost two matrix products.
    """
    return 2 * source[0] * source[1] <= target[0] * target[1]


def joint_conv(maps: Sequence[Tensor], chains: Sequence[list[Size]], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Convolve a concatenation of resized maps, which is not built.

    Maps that are resized alike are concatenated at their own size and resized together. Maps of size (H, W), which are
    the largest, are not copied.

    Args:
        maps: (N, C_i, h_i, w_i) each, at least one of them of size (H, W).
        chains: for each map the sizes that it is resized to in turn, the last one (H, W).
        weights: for each map its part of the kernel, (K, C_i, k, k).
        bias: (K,).

    Returns:
        (N, K, H, W).
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
        x, weight = (_joined([parts[i] for i in groups[sizes]]) for parts in (maps, weights))
        total = add_resized_conv(total, x, weight, list(sizes[1:]))
    return total


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the concatenation of `parts` along the channels; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_resized_conv(total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
    """Add to a map the convolution of a resized map.

    Args:
        total: (N, K, H, W); it is overwritten.
        x: (N, C, h, w).
        weight: (K, C, k, k), k being 1 or 3.
        chain: the sizes that `x` is resized to in turn, the last one (H, W).

    Returns:
        (N, K, H, W).
    """
    source, target = map_size(x), map_size(total)
    convolved = weight.shape[-1] == 1 and source[0] * source[1] < target[0] * target[1]
    if convolved:  # a 1x1 convolution commutes with resizing
        x = F.conv2d(x, weight)  # (N, K, h, w)
    elif split_pays(source, target):
        total = total.contiguous(memory_format=torch.channels_last)
        return _AddTaps.apply(total, x, weight, [source, *chain])
    for size in chain:
        x = resize(x, size)
    return total.add_(x if convolved else conv(x, weight))


class _AddTaps(torch.autograd.Function):
    """`add_resized_conv` of a 3x3 kernel as nine 1x1 convolutions at the size of `x`, then resized, shifted and added.

    The taps are larger than the result. With the gradient written here, only the taps of one row of the kernel and of a
    few samples are held at a time.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chain = chain
        ctx.mark_dirty(total)
        (rows, across), bands = tap_matrices(chain, total), _bands(chain)
        cells, kernel = _cells(x.to(total.dtype)), row_taps(weight.to(total.dtype))  # (N, h, w, C), 3 times (3 * K, C)
        for part in _parts(cells, chain, 3 * len(weight)):
            for matrix, taps in zip(rows, kernel, strict=True):
                # (n, h, w, C) to (n, h, w, 3 * K), added to (n, H, W, K)
                _spread_row(_cells(total)[part], torch.matmul(cells[part], taps.t()), matrix, across, bands)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (_, _, h, w), k = x.shape, len(weight)
        (rows, across), bands = tap_matrices(ctx.chain, gradient), _bands(ctx.chain)
        cells, kernel = _cells(x.to(gradient.dtype)), row_taps(weight.to(gradient.dtype))
        from_x = torch.zeros_like(cells) if ctx.needs_input_grad[1] else None  # (N, h, w, C)
        from_rows = [torch.zeros_like(taps, dtype=weight.dtype) for taps in kernel]  # 3 times (3 * K, C)
        for part in _parts(cells, ctx.chain, 3 * k):
            of_part = _cells(gradient[part]).flatten(2)  # (n, H, W * K)
            for matrix, taps, from_row in zip(rows, kernel, from_rows, strict=True):
                down = of_part.new_zeros(len(of_part), h, of_part.shape[2])  # (n, h, W * K)
                for target, source in bands[0]:
                    _add_product(down[:, source], matrix[target, source].t(), of_part[:, target])
                down = down.view(len(of_part) * h, -1, k)  # (n * h, W, K)
                back = down.new_zeros(len(down), w * 3, k)  # (n * h, w * 3, K)
                for target, source in bands[1]:
                    source = slice(3 * source.start, 3 * source.stop)
                    _add_product(back[:, source], across[target, source].t(), down[:, target])
                back = back.view(len(of_part), h, w, 3 * k)
                if from_x is not None:
                    from_x[part] += torch.matmul(back, taps)  # (n, h, w, C)
                if ctx.needs_input_grad[2]:
                    from_row += torch.matmul(back.flatten(0, 2).t(), cells[part].flatten(0, 2))  # (3 * K, C)
        if from_x is not None:
            from_x = from_x.permute(0, 3, 1, 2).to(x.dtype)  # (N, C, h, w)
        return gradient, from_x, _kernel_of_rows(from_rows) if ctx.needs_input_grad[2] else None, None


def _cells(x: Tensor) -> Tensor:
    """Return (N, C, H, W) as contiguous (N, H, W, C); a view if the channels are last in memory already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _parts(cells: Tensor, chain: list[Size], channels: int) -> list[slice]:
    """Return slices of samples, each so small that the transient maps of `_AddTaps` stay below `TRANSIENT`.

    Args:
        cells: (N, h, w, C).
        chain: the size of `cells` and the sizes that it is resized to in turn.
        channels: of the taps of one row of the kernel, 3 * K.
    """
    largest = max(chain[0][0] * max(chain[0][1] * channels, chain[-1][1] * channels // 3), 1)
    step = max(1, TRANSIENT // largest)
    return [slice(start, start + step) for start in range(0, len(cells), step)]


def row_taps(weight: Tensor) -> list[Tensor]:
    """Return, for each row of a kernel (K, C, 3, 3), its taps as one matrix (3 * K, C), the taps outermost."""
    return [row.permute(2, 0, 1).flatten(0, 1) for row in weight.unbind(2)]


def _kernel_of_rows(rows: list[Tensor]) -> Tensor:
    """Return the kernel (K, C, 3, 3) whose `row_taps` are `rows`."""
    taps = torch.stack(rows).unflatten(1, (3, -1))  # (3 rows, 3 columns, K, C)
    return taps.permute(2, 3, 0, 1)


def add_taps(taps: Tensor) -> Tensor:
    """Shift each of nine taps by its place in the kernel, and add them.

    Args:
        taps: (N, 9 * K, H, W), the places outermost, row by row.

    Returns:
        (N, K, H, W) float32.
    """
    n, channels, h, w = taps.shape
    k = channels // 9
    total = taps.new_zeros((n, k, h + 2, w + 2), dtype=torch.float32)
    for place, tap in enumerate(taps.split(k, dim=1)):
        row, column = divmod(place, 3)
        total[:, :, 2 - row : 2 - row + h, 2 - column : 2 - column + w] += tap
    return total[:, :, 1:-1, 1:-1]


def taps_of(weight: Tensor) -> Tensor:
    """Return the taps of a kernel (K, C, 3, 3) as one 1x1 convolution (9 * K, C, 1, 1), the places outermost."""
    return torch.cat(row_taps(weight))[..., None, None]


def resize_and_add_taps(taps: list[Tensor], chain: list[Size]) -> Tensor:
    """Resize taps, shift each by its place in the kernel, and add them. Differentiable.

    Args:
        taps: for each row of the kernel (N, 3 * K, h, w), its three taps outermost.
        chain: the size of the taps, and the sizes that they are resized to in turn.

    Returns:
        (N, K, H, W) of the chain's last size, channels last in memory.
    """
    n, channels, _, _ = taps[0].shape
    (rows, across), bands = tap_matrices(chain, taps[0]), _bands(chain)
    total = taps[0].new_zeros((n, *chain[-1], channels // 3))  # (N, H, W, K)
    for matrix, tap in zip(rows, taps, strict=True):
        _spread_row(total, _cells(tap), matrix, across, bands)
    return total.permute(0, 3, 1, 2)


def _spread_row(total: Tensor, taps: Tensor, matrix: Tensor, across: Tensor, bands: tuple[Bands, Bands]) -> None:
    """Resize, shift and add the taps of one row of a kernel.

    Args:
        total: (n, H, W, K); the taps are added to it.
        taps: (n, h, w, 3 * K).
        matrix: (H, h), of this row; see `tap_matrices`.
        across: (W, w * 3).
        bands: see `_bands`.
    """
    (n, h, w, _), (_, _, width, k) = taps.shape, total.shape
    taps = taps.view(n * h, w * 3, k)
    x = taps.new_zeros(n * h, width, k)  # resized across
    for target, source in bands[1]:
        source = slice(3 * source.start, 3 * source.stop)
        _add_product(x[:, target], across[target, source], taps[:, source])
    x = x.view(n, h, width * k)
    for target, source in bands[0]:  # (H, h) by (n, h, W * K)
        _add_product(total.flatten(2)[:, target], matrix[target, source], x[:, source])


def _add_product(total: Tensor, matrix: Tensor, x: Tensor) -> None:
    """Add `matrix` (a, b) times each of `x` (n, b, c) to `total` (n, a, c)."""
    total.baddbmm_(matrix.expand(len(x), -1, -1), x)


def _bands(chain: list[Size]) -> tuple[Bands, Bands]:
    """Return, for rows and columns, pieces of the chain's last size, each with the piece of the first that it reads.

    Outside these pieces the matrices of `tap_matrices` are 0, so that products piece by piece save most of the work.
    """
    rows, columns = (_axis_bands([size[axis] for size in chain]) for axis in (0, 1))
    return rows, columns


def _axis_bands(lengths: list[int]) -> Bands:
    """Return the pieces of one axis, whose lengths along the chain are `lengths`."""
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
    """Return the matrices that resize and shift taps.

    Args:
        chain: the size of the taps, and the sizes that they are resized to in turn.
        like: a tensor of the device and type of the matrices.

    Returns:
        For each row of a kernel a matrix (H, h); and one matrix (W, w * 3) for the three taps of a row at once, those
        of a cell side by side.
    """
    rows, columns = (_axis_matrices([size[axis] for size in chain], like) for axis in (0, 1))
    return rows, torch.stack(columns, dim=2).flatten(1)


def _axis_matrices(lengths: list[int], like: Tensor) -> list[Tensor]:
    """Return three matrices (last, first): resizes along `lengths` in turn, then a zero-padded shift by -1, 0 or 1."""
    exact = torch.promote_types(like.dtype, torch.float32)  # rounded to a lower precision once, at the end
    x = torch.eye(lengths[0], dtype=exact, device=like.device).view(lengths[0], 1, lengths[0], 1)
    for length in lengths[1:]:
        x = resize(x, (length, 1))
    padded = F.pad(x.view(lengths[0], lengths[-1]).t(), (0, 0, 1, 1)).to(like.dtype)
    return [padded[tap : tap + lengths[-1]] for tap in range(3)]
