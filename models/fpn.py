"""The feature pyramid: from backbone maps to ps3, plain or fused with another branch's maps (paper, section 3.2).

This is the definition: maps are resized, concatenated and convolved. Training computes the same in less time and memory
(`models/efficient.py`), and so does inference (`models/prepared.py`); both are checked against it.

There is no activation in the pyramid, and as released no normalisation: from (c2..c5) to the logits it is affine.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.pyramid import FullPyramid, Levels, Pyramid, resize
from utils.tiling import map_size

WIDTH = 256
"""Channels of ps0 and ps1, as released. ps2 has half as many in each level, ps3 twice as many."""

MOST_WIDTH = 2048
"""Bound of `--pyramid_width`; a damaged checkpoint must not ask for terabytes."""

NORMS = ("none", "batch")
"""What follows each convolution of a pyramid: nothing, as released, or batch normalisation."""

INITIAL_STD = 0.01
"""Standard deviation of initial weights, as released."""


class SameConv(nn.Conv2d):
    """A convolution that keeps the size, alone or with batch normalisation after it.

    Alone, its initial weights are N(0, 0.01). With a norm layer only the direction of a kernel counts, so that steps of
    one size turn small weights faster; the initial weights are N(0, 1 / fan-in) then. Biases start at 0.
    """

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str = "none") -> None:
        """Make the layers, from `inputs` to `outputs` channels; `kernel` is odd, `norm` one of `NORMS`."""
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.initial_std = INITIAL_STD if norm == "none" else (inputs * kernel**2) ** -0.5
        nn.init.normal_(self.weight, 0, self.initial_std)
        nn.init.zeros_(self.bias)
        self.norm: _BatchNorm | None = None if norm == "none" else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise: (N, inputs, h, w) to (N, outputs, h, w)."""
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class LevelConvs(nn.ModuleList):
    """A convolution for each level, coarsest first."""

    def __iter__(self) -> Iterator[SameConv]:
        return cast(Iterator[SameConv], super().__iter__())


class FPN(nn.Module):
    """A feature pyramid.

    In the fused form every convolution reads its own map concatenated with the other branch's map of the same level,
    own first, resized to the own map's size (paper, section 3.2).
    """

    def __init__(self, channels: tuple[int, ...], fused: bool, width: int = WIDTH, norm: str = "none") -> None:
        """Make the layers for a backbone's maps, coarsest first; ps0 and ps1 have `width` channels, an even number."""
        super().__init__()
        read = 2 if fused else 1
        self.fused = fused
        self.ps2_channels, self.ps3_channels = width // 2, 2 * width
        self.lateral = LevelConvs(SameConv(read * c, width, 1, norm) for c in channels)
        self.smooth1 = LevelConvs(SameConv(read * width, width, 3, norm) for _ in channels)
        self.smooth2 = LevelConvs(SameConv(read * width, self.ps2_channels, 3, norm) for _ in channels)
        self.smooth = SameConv(read * self.ps3_channels, self.ps3_channels, 3, norm) if fused else None

    def forward(self, c: Levels, other: Pyramid | None = None) -> FullPyramid:
        """Compute the pyramid of c5, c4, c3, c2, (N, C, h, w) each; `other` is for the fused form only.

        ps3 is all levels of ps2, resized to p2's size and concatenated, p5 first. In the fused form the other branch's
        ps2 of each level follows the own one, and the result is smoothed.
        """
        other_c, other_ps0, other_ps1 = (None, None, None) if other is None else (other.c, other.ps0, other.ps1)
        ps0: list[Tensor] = []
        for lateral in _convolve(self.lateral, c, other_c):
            ps0.append(lateral + resize(ps0[-1], map_size(lateral)) if ps0 else lateral)
        ps1 = _convolve(self.smooth1, tuple(ps0), other_ps0)
        ps2 = _convolve(self.smooth2, ps1, other_ps1)
        maps = ps2 if other is None else [_fuse(x, y) for x, y in zip(ps2, other.ps2, strict=True)]
        ps3 = torch.cat([resize(x, map_size(ps2[-1])) for x in maps], dim=1)  # (N, C, h / 4, w / 4)
        return FullPyramid(c, tuple(ps0), ps1, ps2, ps3 if self.smooth is None else self.smooth(ps3))


def _convolve(layers: LevelConvs, own: Levels, other: Levels | None) -> Levels:
    """Convolve every level of `own`, fused with the same level of `other` if there is one."""
    if other is not None:
        own = tuple(_fuse(x, y) for x, y in zip(own, other, strict=True))
    return tuple(layer(x) for layer, x in zip(layers, own, strict=True))


def _fuse(own: Tensor, other: Tensor) -> Tensor:
    """Return `own` (N, C, h, w) concatenated with `other`, resized to it."""
    return torch.cat([own, resize(other, map_size(own))], dim=1)
