"""The feature pyramid: from backbone maps to ps3, plain or fused with another branch's maps (paper, section 3.2).

There is no activation and no normalisation in it: from (c2..c5) to the logits it is affine.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from models.pyramid import FullPyramid, Levels, Pyramid
from models.resized import add_resized_conv, add_taps, conv, joint_conv, resize, taps_of
from utils.tiling import Size, map_size

PS2_CHANNELS = 128
"""Channels of each level of ps2."""

PS3_CHANNELS = 512
"""Channels of ps3: those of all four levels of ps2."""

INITIAL_STD = 0.01
"""Standard deviation of initial weights, as released."""


class SameConv(nn.Conv2d):
    """A convolution that keeps the size, with initial weights N(0, 0.01) and biases 0."""

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.normal_(self.weight, 0, INITIAL_STD)
        nn.init.zeros_(self.bias)


class LevelConvs(nn.ModuleList):
    """A convolution for each level, coarsest first."""

    def __iter__(self) -> Iterator[SameConv]:
        return cast(Iterator[SameConv], super().__iter__())


class FPN(nn.Module):
    """A feature pyramid.

    In the fused form every convolution reads its own map concatenated with the other branch's map of the same level,
    own first, resized to the own map's size (paper, section 3.2). It is computed as the sum of two convolutions.
    """

    def __init__(self, channels: tuple[int, ...], fused: bool) -> None:
        """Make the layers.

        Args:
            channels: of the backbone's maps, coarsest first.
            fused: whether another branch's pyramid is read, too.
        """
        super().__init__()
        read = 2 if fused else 1
        self.fused = fused
        self.lateral = LevelConvs(SameConv(read * c, 256, 1) for c in channels)
        self.smooth1 = LevelConvs(SameConv(read * 256, 256, 3) for _ in channels)
        self.smooth2 = LevelConvs(SameConv(read * 256, PS2_CHANNELS, 3) for _ in channels)
        self.smooth = SameConv(read * PS3_CHANNELS, PS3_CHANNELS, 3) if fused else None

    def forward(self, c: Levels, other: Pyramid | None = None) -> FullPyramid:
        """Compute the pyramid of backbone maps.

        Args:
            c: c5, c4, c3, c2, (N, C, h, w) each.
            other: the other branch's pyramid, for the fused form only.
        """
        own = self.shared(c, other)
        return FullPyramid(own.c, own.ps0, own.ps1, own.ps2, self._joined(own.ps2, other))

    def shared(self, c: Levels, other: Pyramid | None = None) -> Pyramid:
        """Compute the pyramid without ps3; see `forward`."""
        other_c, other_ps0, other_ps1 = (None, None, None) if other is None else (other.c, other.ps0, other.ps1)
        ps0 = self._top_down(_convolve(self.lateral, c, other_c))
        ps1 = _convolve(self.smooth1, ps0, other_ps0)
        ps2 = _convolve(self.smooth2, ps1, other_ps1)
        return Pyramid(c, ps0, ps1, ps2)

    def _top_down(self, laterals: Levels) -> Levels:
        """Return each lateral plus the resized sum above it; the laterals are overwritten."""
        sums: list[Tensor] = []
        for lateral in laterals:
            total = lateral.add_(resize(sums[-1], map_size(lateral))) if sums else lateral
            # convolutions of resized maps come with their channels last, so their partners should
            sums.append(total.contiguous(memory_format=torch.channels_last) if self.fused else total)
        return tuple(sums)

    def _joined(self, ps2: Levels, other: Pyramid | None) -> Tensor:
        """Return ps3, (N, 512, h / 4, w / 4).

        The levels are resized to p2's size and concatenated, p5 first. In the fused form the result is smoothed.
        """
        size = map_size(ps2[-1])
        if self.smooth is None or other is None:
            return torch.cat([resize(x, size) for x in ps2], dim=1)  # 4 times (N, 128, ...)
        maps, chains = interleaved(ps2, other.ps2)
        return joint_conv(maps, chains, self.smooth.weight.split(PS2_CHANNELS, dim=1), self.smooth.bias)

    def conv_ps3(self, ps2: Levels, weight: Tensor, bias: Tensor, other: Levels | None = None) -> Tensor:
        """Convolve ps3, which is not built.

        In the fused form, where ps3 is itself a convolution, the two kernels are multiplied first, as the prepared form
        does (`models/prepared.py`). The product and the sum over its taps are computed in float32 in any precision.

        Args:
            ps2: (N, 128, h, w) each, coarsest first.
            weight: (K, 512, 3, 3).
            bias: (K,).
            other: the other branch's ps2, for the fused form only.

        Returns:
            (N, K, h / 4, w / 4).
        """
        if self.smooth is None or other is None:
            chains = [[map_size(ps2[-1])]] * len(ps2)
            return joint_conv(ps2, chains, weight.split(PS2_CHANNELS, dim=1), bias)
        taps = taps_of(weight).flatten(1)  # (9 * K, 512)
        with torch.autocast(weight.device.type, enabled=False):
            kernel = torch.tensordot(taps, self.smooth.weight, dims=1)  # (9 * K, 1024, 3, 3)
            shift = taps @ self.smooth.bias
        maps, chains = interleaved(ps2, other)
        scores = add_taps(joint_conv(maps, chains, kernel.split(PS2_CHANNELS, dim=1), shift)) + bias.view(-1, 1, 1)
        return scores.to(ps2[-1].dtype)


def _convolve(layers: LevelConvs, own: Levels, other: Levels | None) -> Levels:
    """Convolve every level of `own`, concatenated with the same level of `other` if there is one."""
    if other is None:
        return tuple(layer(x) for layer, x in zip(layers, own, strict=True))
    outputs = []
    for layer, x, y in zip(layers, own, other, strict=True):
        read_own, read_other = layer.weight.split(x.shape[1], dim=1)
        outputs.append(add_resized_conv(conv(x, read_own, layer.bias), y, read_other, [map_size(x)]))
    return tuple(outputs)


def interleaved(own: Levels, other: Levels) -> tuple[list[Tensor], list[list[Size]]]:
    """Return the maps that ps3 of a fused pyramid reads, and the sizes that each is resized to in turn.

    Args:
        own: the branch's ps2, coarsest first.
        other: the other branch's ps2. Each level is first resized to the own one's size.

    Returns:
        Maps in the order of their concatenation, and for each its chain of sizes, which ends with p2's.
    """
    size = map_size(own[-1])
    maps = [x for level in zip(own, other, strict=True) for x in level]
    chains = [chain for x in own for chain in ([size], [map_size(x), size])]
    return maps, chains
