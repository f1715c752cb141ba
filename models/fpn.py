"""The feature pyramid: from backbone maps to ps3, plain or fused with another branch's maps.

There is no activation and no normalisation in it: from (c2..c5) to the logits it is affine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pyramid import Levels, Pyramid
from utils.tiling import Size

PS3_CHANNELS = 512
INITIAL_STD = 0.01


def resize(x: Tensor, size: Size | torch.Size) -> Tensor:
    """Bilinear resize of (N, C, H, W) to `size`, no aligned corners, no antialiasing; `x` itself if it fits."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def initial_conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A same-size convolution with weights N(0, 0.01) and biases 0."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, 0, INITIAL_STD)
    nn.init.zeros_(conv.bias)
    return conv


class FPN(nn.Module):
    """Pyramid over the backbone maps of `channels` (coarsest first).

    In the fused form every convolution reads its own map concatenated with the other branch's map of the same
    level, own first, resized to it where it differs (paper, section 3.2).
    """

    def __init__(self, channels: tuple[int, ...], fused: bool) -> None:
        super().__init__()
        read = 2 if fused else 1
        self.fused = fused
        self.lateral = nn.ModuleList(initial_conv(read * c, 256, 1) for c in channels)
        self.smooth1 = nn.ModuleList(initial_conv(read * 256, 256, 3) for _ in channels)
        self.smooth2 = nn.ModuleList(initial_conv(read * 256, 128, 3) for _ in channels)
        self.smooth = initial_conv(read * 512, PS3_CHANNELS, 3) if fused else nn.Identity()

    def forward(self, c: Levels, other: Pyramid | None = None, ps3: bool = True) -> Pyramid:
        """The pyramid of backbone maps `c`; `other` is the other branch's, in the fused form only.

        `ps3=False` leaves ps3 out, where nobody reads it.
        """
        theirs = other.levels if self.fused else (None,) * 4
        ps0: list[Tensor] = []
        for conv, x in zip(self.lateral, self._joined(c, theirs[0]), strict=True):
            lateral = conv(x)
            ps0.append(resize(ps0[-1], lateral.shape[-2:]) + lateral if ps0 else lateral)
        ps1 = [conv(x) for conv, x in zip(self.smooth1, self._joined(ps0, theirs[1]), strict=True)]
        ps2 = [conv(x) for conv, x in zip(self.smooth2, self._joined(ps1, theirs[2]), strict=True)]
        pyramid = Pyramid(c, tuple(ps0), tuple(ps1), tuple(ps2))
        if not ps3:
            return pyramid
        size = ps2[-1].shape[-2:]  # of p2, the finest
        joined = torch.cat([resize(x, size) for x in self._joined(ps2, theirs[3])], dim=1)
        return Pyramid(*pyramid.levels, ps3=self.smooth(joined))  # (N, 512, h/4, w/4)

    def _joined(self, own: Levels | list[Tensor], theirs: Levels | None) -> list[Tensor]:
        if theirs is None:
            return list(own)
        return [torch.cat([x, resize(y, x.shape[-2:])], dim=1) for x, y in zip(own, theirs, strict=True)]
