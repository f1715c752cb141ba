"""Class ids as colours, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.classes import Color
from utils.files import replacing

NO_CLASS: Color = (150, 150, 150)
"""Grey of the ids without a colour, 255 among them; no generic palette has it (their channels are multiples of 32)."""


def colorize(ids: np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """(H, W, 3) uint8 RGB picture of `ids`, (H, W) uint8; ids that `palette` does not reach are grey."""
    colors = np.full((256, 3), NO_CLASS, dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors[ids]


def shrink_for_display(picture: np.ndarray, longest: int, smooth: bool) -> np.ndarray:
    """`picture`, (H, W, 3) uint8, with its longer side cut down to `longest` pixels; smaller ones are left as they are.

    `smooth` averages the pixels that fall together; without it one of them is kept, so that class colours
    do not mix into colours of no class.
    """
    height, width = picture.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size, how))


def save_colors(path: str | Path, ids: np.ndarray, palette: Sequence[Color]) -> None:
    """Write `ids`, (H, W) uint8, as an RGB PNG in the colours of `palette`; see `colorize`.

    Raises InputError, naming `path`, when the file cannot be written.
    """
    with replacing(path) as part:
        Image.fromarray(colorize(ids, palette)).save(part, format="PNG")
