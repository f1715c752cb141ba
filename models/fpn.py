"""The feature pyramid: from backbone maps to ps3, plain or fused with another branch's maps.

There is no activation and no normalisation in it: from (c2..c5) to the logits it is affine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.pyramid import Levels, Pyramid
from models.resized import add_resized_conv, conv, joint_conv, resize
from utils.tiling import Size

PS2_CHANNELS = 128
PS3_CHANNELS = 512
INITIAL_STD = 0.01


def initial_conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A same-size convolution with weights N(0, 0.01) and biases 0."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, 0, INITIAL_STD)
    nn.init.zeros_(layer.bias)
    return layer


class FPN(nn.Module):
    """Pyramid over the backbone maps of `channels` (coarsest first).

    In the fused form every convolution reads its own map concatenated with the other branch's map of the same level,
    own first, resized to it where it differs (paper, section 3.2). It is computed as the sum of two convolutions.
    """

    def __init__(self, channels: tuple[int, ...], fused: bool) -> None:
        super().__init__()
        read = 2 if fused else 1
        self.fused = fused
        self.lateral = nn.ModuleList(initial_conv(read * c, 256, 1) for c in channels)
        self.smooth1 = nn.ModuleList(initial_conv(read * 256, 256, 3) for _ in channels)
        self.smooth2 = nn.ModuleList(initial_conv(read * 256, PS2_CHANNELS, 3) for _ in channels)
        self.smooth = initial_conv(read * 512, PS3_CHANNELS, 3) if fused else nn.Identity()

    def forward(self, c: Levels, other: Pyramid | None = None, ps3: bool = True) -> Pyramid:
        """The pyramid of backbone maps `c`; `other` is the other branch's, in the fused form only.

        `ps3=False` leaves ps3 out, where nobody reads it.
        """
        theirs = other.levels if self.fused else (None,) * 4
        ps0 = self._top_down(self._layer(self.lateral, c, theirs[0]))
        ps1 = self._layer(self.smooth1, ps0, theirs[1])
        ps2 = self._layer(self.smooth2, ps1, theirs[2])
        last = self._joined(ps2, theirs[3]) if ps3 else None  # (N, 512, h/4, w/4)
        return Pyramid(c, ps0, ps1, ps2, last)

    def _layer(self, layers: nn.ModuleList, own: Sequence[Tensor], other: Levels | None) -> Levels:
        """One convolution on every level."""
        if not self.fused:
            return tuple(layer(x) for layer, x in zip(layers, own, strict=True))
        outputs = []
        for layer, x, y in zip(layers, own, other, strict=True):
            read_own, read_other = layer.weight.split(x.shape[1], dim=1)
            outputs.append(add_resized_conv(conv(x, read_own, layer.bias), y, read_other, [tuple(x.shape[-2:])]))
        return tuple(outputs)

    def _top_down(self, laterals: Levels) -> Levels:
        """Each lateral plus the resized sum above it. The laterals become the sums, where no copy is made of them."""
        sums: list[Tensor] = []
        for lateral in laterals:
            total = lateral.add_(resize(sums[-1], lateral.shape[-2:])) if sums else lateral
            # convolutions of resized maps come with their channels last, so their partners should
            sums.append(total.contiguous(memory_format=torch.channels_last) if self.fused else total)
        return tuple(sums)

    def _joined(self, own: Levels, other: Levels | None) -> Tensor:
        """ps3: the levels resized to p2's size and concatenated, p5 first; in the fused form smoothed."""
        size = tuple(own[-1].shape[-2:])
        if not self.fused:
            return torch.cat([resize(x, size) for x in own], dim=1)
        maps, chains = interleaved(own, other)
        return joint_conv(maps, chains, self.smooth.weight.split(PS2_CHANNELS, dim=1), self.smooth.bias)

    def conv_ps3(self, ps2: Levels, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution of the plain form's ps3 by `weight` (K, 512, 3, 3), which does not need ps3 itself."""
        chains = [[tuple(ps2[-1].shape[-2:])]] * len(ps2)
        return joint_conv(ps2, chains, weight.split(PS2_CHANNELS, dim=1), bias)


def interleaved(own: Levels, other: Levels) -> tuple[list[Tensor], list[list[Size]]]:
    """What ps3 of a fused pyramid reads, in its order, and for each map the sizes that it is resized to in turn."""
    size = tuple(own[-1].shape[-2:])
    maps = [x for level in zip(own, other, strict=True) for x in level]
    chains = [chain for x in own for chain in ([size], [tuple(x.shape[-2:]), size])]
    return maps, chains
