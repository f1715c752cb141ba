"""Pictures of class ids in their colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.classes import Color
from utils.files import replacing
from utils.stretch import RGB

NO_CLASS: Color = (150, 150, 150)
"""Grey of the ids without a colour, 255 among them; no generic palette has it (their channels are multiples of 32)."""


def colorize(ids: np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """Return an RGB picture (H, W, 3) uint8 of `ids` (H, W) uint8; ids without a colour in `palette` are grey."""
    colors = np.full((256, 3), NO_CLASS, dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors[ids]


def as_rgb(image: Tensor) -> np.ndarray:
    """Return the picture (H, W, 3) uint8 of an image (bands, H, W) uint8: its first three bands as RGB.

    An image of one or two bands is shown as grey, by its first band.
    """
    shown = image[:RGB] if len(image) >= RGB else image[:1].expand(RGB, -1, -1)
    return shown.permute(1, 2, 0).cpu().numpy()


def shrink_for_display(picture: np.ndarray, longest: int, smooth: bool) -> np.ndarray:
    """Shrink a picture (H, W, 3) uint8 to at most `longest` pixels a side; a smaller one is returned itself.

    If not `smooth`, of pixels that fall together one is kept, so that class colours do not mix.
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
    """Return RGB pictures (h, w, 3) uint8 of an image (bands, H, W) uint8, and of (H, W) uint8 ids.

    They have the released names: `image`, `mask`, `prediction` (the ensemble), `prediction_local` and
    `prediction_global`.
    """
    ids = {"prediction" if name == "ensemble" else f"prediction_{name}": x.cpu() for name, x in found.items()}
    if label is not None:
        ids["mask"] = label
    return {
        "image": shrink_for_display(as_rgb(image), longest, smooth=True),
        **{k: shrink_for_display(colorize(x.numpy(), palette), longest, smooth=False) for k, x in ids.items()},
    }


def legend(names: Sequence[str], palette: Sequence[Color], height: int = 24) -> np.ndarray:
    """Return an RGB picture (rows * height, W, 3) uint8: a row for each class with colour, id and name."""
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

    Raises InputError, naming `path`, if the file cannot be written.
    """
    with replacing(path) as part:
        Image.fromarray(colorize(ids, palette)).save(part, format="PNG")
