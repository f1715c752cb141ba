"""What training draws: windows of large images, and how samples are turned, enlarged and coloured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.resize import shrink_label
from utils.stretch import RGB
from utils.tiling import Box, Size, map_size
from utils.turns import Turn


@dataclass(frozen=True)
class Windows:
    """Squares that are cut from every image that is longer than they are in either side; others stay whole.

    An epoch draws `count` (`--windows`) of `size` x `size` pixels (`--window`) from each such image.
    """

    size: int
    count: int

    def cuts(self, image: Size) -> bool:
        return max(image) > self.size

    def clip(self, image: Size) -> Size:
        """Return the size of the windows of an image of size `image`; its own where it is not cut."""
        return min(self.size, image[0]), min(self.size, image[1])

    def place(self, image: Size, position: tuple[float, float], scale: float = 1.0) -> tuple[Box, Size]:
        """Return the box of one window and its size when it is enlarged by `scale`: 2 reads half as many rows.

        `position` is where it lies between the first and the last possible row and column, in [0, 1) each. The box is
        no longer than the image in either side; the size is `size` in both, less where the image is too short.
        """
        side = max(1, round(self.size / scale))
        height, width = (min(side, whole) for whole in image)
        top = int(position[0] * (image[0] - height + 1))
        left = int(position[1] * (image[1] - width + 1))
        sizes = (self.size if own == side else min(self.size, enlarged(own, scale)) for own in (height, width))
        return Box(top, left, height, width), (next(sizes), next(sizes))


def enlarged(side: int, scale: float) -> int:
    """Return `side` pixels times `scale`, at least 1."""
    return max(1, round(side * scale))


DRAWN_TURNS = ("all", "mirror", "none")
"""How training images are turned, by `--turns`: mirrored left-right and rotated by quarters, mirrored, not at all."""

LARGEST_SCALE = 1.5
"""Samples are enlarged by a factor between 1 / 1.5 and 1.5, as often below as above 1."""

LARGEST_CHANGE = 0.25
"""Brightness, contrast and saturation are multiplied by factors between 1 - 0.25 and 1 + 0.25 each."""

LARGEST_HUE = 0.03
"""Hues are turned by at most so much of the whole circle of colours."""

_STRIP_PIXELS = 1_000_000
"""How many pixels of an image are in floating point at a time."""


class ColorChange(NamedTuple):
    """Factors of brightness, contrast and saturation, and by which part of the circle hues are turned."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "ColorChange":
        """Draw each uniformly within its bounds."""
        brightness, contrast, saturation = rng.uniform(1 - LARGEST_CHANGE, 1 + LARGEST_CHANGE, 3).tolist()
        return cls(brightness, contrast, saturation, float(rng.uniform(-LARGEST_HUE, LARGEST_HUE)))

    def apply(self, image: Tensor) -> Tensor:
        """Change an image (bands, H, W) uint8, some rows at a time; returns a new one of the same size and type.

        Saturation and hue are those of red, green and blue: they stay where there is another number of bands.
        """
        # torchvision takes as long as torch to import: prediction imports this module, too, and changes no colour
        from torchvision.transforms.v2 import functional as colors

        rgb = len(image) == RGB
        step = max(1, _STRIP_PIXELS // image.shape[2])
        # torchvision takes one band or three, so each band is an image
        changed = torch.cat(
            [colors.adjust_brightness(rows[:, None], self.brightness)[:, 0] for rows in image.split(step, 1)], 1
        )
        # contrast is relative to the mean grey of the whole image
        strips = changed.split(step, 1)
        greys = (colors.rgb_to_grayscale(rows) if rgb else rows.float().mean(0, keepdim=True) for rows in strips)
        mean = float(sum(grey.sum(dtype=torch.float64) for grey in greys)) / changed[0].numel()
        for rows in strips:
            contrasted = rows.float().mul_(self.contrast).add_((1 - self.contrast) * mean).round_().clamp_(0, 255)
            recolored = contrasted.to(torch.uint8)
            if rgb:
                recolored = colors.adjust_hue(colors.adjust_saturation(recolored, self.saturation), self.hue)
            rows.copy_(recolored)
        return changed


@dataclass(frozen=True)
class Draw:
    """How one sample differs from what is on disk.

    Attributes:
        turn: mirrored and rotated.
        position: where a window of a larger image lies, as `Windows.place` takes it.
        scale: by which factor the pixels are enlarged.
        color: None leaves the colours.
    """

    turn: Turn = field(default_factory=Turn)
    position: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    color: ColorChange | None = None

    @classmethod
    def of(cls, key: Sequence[int], turns: str = "all", jitter: bool = False) -> "Draw":
        """Draw from `key` alone: whole numbers that name seed, epoch and sample.

        `turns` is one of `DRAWN_TURNS`, `jitter` whether scale and colours vary: the rest is the same with any.
        """
        rng = np.random.default_rng(key)
        mirrored, quarters = draw_turn(rng)
        top, left = rng.random(2).tolist()
        turn = Turn(mirrored and turns != "none", quarters if turns == "all" else 0)
        if not jitter:
            return cls(turn, (top, left))
        scale = math.exp(rng.uniform(-1, 1) * math.log(LARGEST_SCALE))
        return cls(turn, (top, left), scale, ColorChange.draw(rng))

    def apply(self, image: Tensor, ids: Tensor | None, size: Size) -> tuple[Tensor, Tensor | None]:
        """Return an image (bands, H, W) uint8 and its ids (H, W) uint8, resized to `size`, recoloured, then turned."""
        image, ids = resize(image, ids, size)
        if self.color is not None:
            image = self.color.apply(image)
        return turned(image, self.turn), None if ids is None else turned(ids, self.turn)


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Return `turn.apply(x)` for `x` (..., H, W) uint8 on the CPU, contiguous.

    A quarter turn is a transpose and a flip, mirrored or not. OpenCV transposes several times faster than torch.
    """
    if turn.quarters % 2 == 0:
        return turn.apply(x).contiguous()
    height, width = map_size(x)
    transposed = x.new_empty((*x.shape[:-2], width, height))
    for target, plane in zip(transposed.view(-1, width, height), x.reshape(-1, height, width), strict=True):
        cv2.transpose(plane.numpy(), dst=target.numpy())
    flips = {-2 if turn.quarters == 1 else -1} ^ ({-2} if turn.mirrored else set())
    return transposed.flip(sorted(flips)) if flips else transposed


def draw_turn(rng: np.random.Generator) -> tuple[bool, int]:
    """Mirrored left-right with probability 1/2; then 1, 2 or 3 quarters counterclockwise with probability 1/2."""
    mirrored = rng.random() < 0.5
    return mirrored, int(rng.integers(1, 4)) if rng.random() < 0.5 else 0


def resize(image: Tensor, ids: Tensor | None, size: Size) -> tuple[Tensor, Tensor | None]:
    """Resize an image (bands, H, W) bilinearly, antialiased, and its ids (H, W) to the nearest pixel."""
    if tuple(image.shape[1:]) == size:
        return image, ids
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return resized, None if ids is None else shrink_label(ids, size)
