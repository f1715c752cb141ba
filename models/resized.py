"""Convolutions of resized maps, computed without the resized maps.

A 3x3 convolution of a resized map is, for each of its nine taps, a 1x1 convolution, a resize and a shift. The 1x1
convolution commutes with the other two, so it is done at the map's own size. Bilinear resizing, shifting and padding
with zeros are linear in rows and columns separately, so they are one matrix for the rows and one for the columns.
Resizes in a row multiply into one matrix. All of it is exact up to rounding, and has gradients.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Size


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


def joint_conv(maps: Sequence[Tensor], chains: Sequence[list[Size]], weights: Sequence[Tensor]) -> Tensor:
    """The convolution of a concatenation: the sum of each map's `resized_conv`.

    Maps that are resized alike are concatenated, at their own size, and share the work of resizing.
    """
    groups: dict[tuple[Size, ...], list[int]] = defaultdict(list)
    for i, (x, chain) in enumerate(zip(maps, chains, strict=True)):
        sizes = [tuple(x.shape[-2:]), *chain]
        groups[tuple(size for size, _ in groupby(sizes))].append(i)
    total = None
    for sizes, members in groups.items():
        x, weight = (torch.cat([parts[i] for i in members], dim=1) for parts in (maps, weights))
        part = resized_conv(x, weight, list(sizes[1:]) or [sizes[0]])
        total = part if total is None else total + part
    return total


def resized_conv(x: Tensor, weight: Tensor, chain: list[Size]) -> Tensor:
    """(N, K, H, W): `x` (N, C, h, w) resized to each size of `chain` in turn, then convolved by `weight` (K, C, k, k).

    k is 1 or 3.
    """
    source = tuple(x.shape[-2:])
    if weight.shape[-1] == 1 and source[0] * source[1] < chain[-1][0] * chain[-1][1]:
        x, weight = F.conv2d(x, weight), None
    elif split_pays(source, chain[-1]):
        return spread([F.conv2d(x, taps) for taps in row_taps(weight)], [source, *chain])
    for size in chain:
        x = resize(x, size)
    return x if weight is None else conv(x, weight)


def row_taps(weight: Tensor) -> list[Tensor]:
    """For each row of a kernel (K, C, 3, 3), its taps as one 1x1 convolution (3 * K, C, 1, 1), the taps outermost."""
    return [row.permute(2, 0, 1).flatten(0, 1)[..., None, None] for row in weight.unbind(2)]


def spread(taps: list[Tensor], chain: list[Size]) -> Tensor:
    """Resize taps along the sizes of `chain` (the first is their own), shift each by its place, and add.

    `taps`: for each row of the kernel (N, 3 * K, h, w), its three taps outermost. Returns (N, K, H, W) of the chain's
    last size, channels last in memory.
    """
    n, channels, h, w = taps[0].shape
    k = channels // 3
    rows, columns = (_tap_matrices([size[axis] for size in chain], taps[0]) for axis in (0, 1))
    across = torch.stack(columns, dim=2).flatten(1)  # (W, w * 3): the three taps of a cell lie side by side in memory
    total = None
    for matrix, tap in zip(rows, taps, strict=True):
        x = tap.permute(0, 2, 3, 1).reshape(n * h, w * 3, k)
        x = torch.matmul(across, x).view(n, h, -1)  # (n, h, W * K)
        if total is None:
            total = torch.matmul(matrix, x)
        else:  # in place: these maps are large, and the product does not need its result for gradients
            total.baddbmm_(matrix.expand(n, -1, -1), x)
    return total.view(n, len(rows[0]), len(columns[0]), k).permute(0, 3, 1, 2)


def _tap_matrices(lengths: list[int], like: Tensor) -> list[Tensor]:
    """Three (last, first) matrices: the resizes of `lengths` in turn, and a zero-padded shift by -1, 0 or 1."""
    exact = torch.promote_types(like.dtype, torch.float32)  # rounded to a lower precision once, at the end
    x = torch.eye(lengths[0], dtype=exact, device=like.device).view(lengths[0], 1, lengths[0], 1)
    for length in lengths[1:]:
        x = resize(x, (length, 1))
    padded = F.pad(x.view(lengths[0], lengths[-1]).t(), (0, 0, 1, 1)).to(like.dtype)
    return [padded[tap : tap + lengths[-1]] for tap in range(3)]
