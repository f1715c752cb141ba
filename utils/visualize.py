"""Class ids as colours, for people to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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


def pictures(
    image: Tensor, label: Tensor | None, found: Mapping[str, Tensor], palette: Sequence[Color], longest: int
) -> dict[str, np.ndarray]:
    """`image`, `mask` and, as released, `prediction` (the ensemble), `prediction_local` and `prediction_global`.

    RGB pictures with sides of at most `longest` pixels, of `image` (3, H, W) uint8, and of `label` and predictions by
    name, (H, W) uint8 ids.
    """
    ids = {"prediction" if name == "ensemble" else f"prediction_{name}": x.cpu() for name, x in found.items()}
    if label is not None:
        ids["mask"] = label
    return {
        "image": shrink_for_display(image.permute(1, 2, 0).numpy(), longest, smooth=True),
        **{k: shrink_for_display(colorize(x.numpy(), palette), longest, smooth=False) for k, x in ids.items()},
    }


def legend(names: Sequence[str], palette: Sequence[Color], height: int = 24) -> np.ndarray:
    """(rows * height, W, 3) uint8 RGB picture: each class's colour with its id and name, and NO_CLASS's last."""
    font = ImageFont.load_default(size=height * 2 // 3)
    lines = [*(f"{k}  {name}" for k, name in enumerate(names)), "left out"]
    width = 3 * height + round(max(font.getlength(line) for line in lines))
    picture = Image.new("RGB", (width, height * len(lines)), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for row, (line, color) in enumerate(zip(lines, [*palette, NO_CLASS], strict=True)):
        top = row * height
        # a frame, as white is a colour too
        draw.rectangle((2, top + 2, 2 * height - 2, top + height - 3), fill=color, outline=(0, 0, 0))
        draw.text((2 * height + height // 4, top + height // 2), line, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(picture)


def save_colors(path: str | Path, ids: np.ndarray, palette: Sequence[Color]) -> None:
    """Write `ids`, (H, W) uint8, as an RGB PNG in the colours of `palette`; see `colorize`.

    Raises InputError, naming `path`, when the file cannot be written.
    """
    with replacing(path) as part:
        Image.fromarray(colorize(ids, palette)).save(part, format="PNG")
