"""The feature pyramid: from backbone maps to ps3, plain or fused with another branch's maps (paper, section 3.2).

There is no activation in it, and as released no normalisation: from (c2..c5) to the logits it is affine. With batch
normalisation it is affine in evaluation, where a norm layer folds into the convolution before it (`SameConv.kernel`).
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.pyramid import FullPyramid, Levels, Pyramid
from models.resized import add_resized_conv, add_taps, conv, joint_conv, resize, taps_of
from utils.errors import required
from utils.tiling import Size, map_size

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

    Attributes:
        norm: the norm layer; None if there is none.
    """

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str = "none") -> None:
        """Make the layers.

        Args:
            inputs: channels that are read.
            outputs: channels that are computed.
            kernel: its side, odd.
            norm: one of `NORMS`.
        """
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.initial_std = INITIAL_STD if norm == "none" else (inputs * kernel**2) ** -0.5
        nn.init.normal_(self.weight, 0, self.initial_std)
        nn.init.zeros_(self.bias)
        self.norm: _BatchNorm | None = None if norm == "none" else nn.BatchNorm2d(outputs)

    @property
    def folds(self) -> bool:
        """Whether a norm layer has fixed statistics, so that it is part of `kernel`."""
        return self.norm is not None and not self.norm.training

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias, with those of a norm layer that is in evaluation mode folded in."""
        norm = self.norm
        if norm is None or norm.training:
            return self.weight, self.bias
        factor = norm.weight * (required(norm.running_var, "running variance") + norm.eps).rsqrt()
        shift = self.bias - required(norm.running_mean, "running mean")
        return self.weight * factor.view(-1, 1, 1, 1), shift * factor + norm.bias

    def normalized(self, x: Tensor) -> Tensor:
        """Return the output of the convolution by `kernel`, (N, outputs, h, w), normalised if a norm layer trains."""
        return x if self.norm is None or self.folds else self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise: (N, inputs, h, w) to (N, outputs, h, w)."""
        return self.normalized(conv(x, *self.kernel()))


class LevelConvs(nn.ModuleList):
    """A convolution for each level, coarsest first."""

    def __iter__(self) -> Iterator[SameConv]:
        return cast(Iterator[SameConv], super().__iter__())


class FPN(nn.Module):
    """A feature pyramid.

    In the fused form every convolution reads its own map concatenated with the other branch's map of the same level,
    own first, resized to the own map's size (paper, section 3.2). It is computed as the sum of two convolutions.
    """

    def __init__(self, channels: tuple[int, ...], fused: bool, width: int = WIDTH, norm: str = "none") -> None:
        """Make the layers.

        Args:
            channels: of the backbone's maps, coarsest first.
            fused: whether another branch's pyramid is read, too.
            width: channels of ps0 and ps1, even.
            norm: one of `NORMS`.
        """
        super().__init__()
        read = 2 if fused else 1
        self.fused = fused
        self.ps2_channels, self.ps3_channels = width // 2, 2 * width
        self.lateral = LevelConvs(SameConv(read * c, width, 1, norm) for c in channels)
        self.smooth1 = LevelConvs(SameConv(read * width, width, 3, norm) for _ in channels)
        self.smooth2 = LevelConvs(SameConv(read * width, self.ps2_channels, 3, norm) for _ in channels)
        self.smooth = SameConv(read * self.ps3_channels, self.ps3_channels, 3, norm) if fused else None

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
        """Return ps3, (N, C, h / 4, w / 4).

        The levels are resized to p2's size and concatenated, p5 first. In the fused form the result is smoothed.
        """
        size = map_size(ps2[-1])
        if self.smooth is None or other is None:
            return torch.cat([resize(x, size) for x in ps2], dim=1)
        maps, chains = interleaved(ps2, other.ps2)
        weight, bias = self.smooth.kernel()
        return self.smooth.normalized(joint_conv(maps, chains, weight.split(self.ps2_channels, dim=1), bias))

    def conv_ps3(self, ps2: Levels, weight: Tensor, bias: Tensor, other: Levels | None = None) -> Tensor:
        """Convolve ps3, which is not built.

        In the fused form, where ps3 is itself a convolution, the two kernels are multiplied first, as the prepared form
        does (`models/prepared.py`). The product and the sum over its taps are computed in float32 in any precision.
        A fused pyramid with norm layers must be in evaluation mode.

        Args:
            ps2: (N, C / 4, h, w) each, coarsest first.
            weight: (K, C, 3, 3), C being the channels of ps3.
            bias: (K,).
            other: the other branch's ps2, for the fused form only.

        Returns:
            (N, K, h / 4, w / 4).
        """
        if self.smooth is None or other is None:
            chains = [[map_size(ps2[-1])]] * len(ps2)
            return joint_conv(ps2, chains, weight.split(self.ps2_channels, dim=1), bias)
        taps = taps_of(weight).flatten(1)  # (9 * K, C)
        with torch.autocast(weight.device.type, enabled=False):
            smooth, smooth_bias = self.smooth.kernel()
            kernel = torch.tensordot(taps, smooth, dims=1)  # (9 * K, 2 * C, 3, 3)
            shift = taps @ smooth_bias
        maps, chains = interleaved(ps2, other)
        scores = add_taps(joint_conv(maps, chains, kernel.split(self.ps2_channels, dim=1), shift)) + bias.view(-1, 1, 1)
        return scores.to(ps2[-1].dtype)


def _convolve(layers: LevelConvs, own: Levels, other: Levels | None) -> Levels:
    """Convolve every level of `own`, concatenated with the same level of `other` if there is one."""
    if other is None:
        return tuple(layer(x) for layer, x in zip(layers, own, strict=True))
    outputs = []
    for layer, x, y in zip(layers, own, other, strict=True):
        weight, bias = layer.kernel()
        read_own, read_other = weight.split(x.shape[1], dim=1)
        outputs.append(layer.normalized(add_resized_conv(conv(x, read_own, bias), y, read_other, [map_size(x)])))
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
