"""Overlays: class colours over an image, with outlines and a legend."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imaging.pictures import shrink
from imaging.sources import Source
from utils.classes import Classes
from utils.resize import nearest_indices
from utils.visualize import as_rgb, colorize, legend

TINT = 0.4
"""The part of a pixel that is its class's colour; the rest is the image's."""


class OverlayWriter:
    """The overlay of an image as a PNG, at most 4096 pixels a side without the legend, which is to its right.

    Only the ids that it shows are kept; `close` draws it when all rows are there. Pixels of no class stay as they are.
    """

    def __init__(self, path: Path, source: Source, classes: Classes) -> None:
        """Start without ids; `source` is the image."""
        self._path, self._source, self._classes = path, source, classes
        scale = min(1.0, 4096 / max(source.size))
        shown = [max(1, round(side * scale)) for side in source.size]
        self._rows, self._columns = (nearest_indices(a, b).numpy() for a, b in zip(source.size, shown, strict=True))
        self._ids = np.empty(shown, np.uint8)
        self._top = 0

    def write(self, ids: np.ndarray) -> None:
        """Sample the next rows, (n, W) uint8."""
        inside = (self._rows >= self._top) & (self._rows < self._top + len(ids))
        self._ids[inside] = ids[self._rows[inside] - self._top][:, self._columns]
        self._top += len(ids)

    def close(self) -> None:
        if self._top < self._source.size[0]:
            return
        height, width = self._ids.shape
        ids, names, palette = self._ids, self._classes.names, self._classes.palette
        image = as_rgb(shrink(self._source, (height, width)))
        colors = colorize(ids, palette)
        tinted = (image * (1 - TINT) + colors * TINT).astype(np.uint8)
        edge = _outlines(ids, 1 + max(ids.shape) // 1500)
        tinted[edge] = colors[edge]
        unknown = ids >= len(names)
        tinted[unknown] = image[unknown]
        key = legend(names, palette, height=min(48, max(16, max(ids.shape) // 40)))
        margin = 8
        canvas = Image.new("RGB", (width + 2 * margin + key.shape[1], max(height, len(key))), "white")
        canvas.paste(Image.fromarray(tinted), (0, 0))
        canvas.paste(Image.fromarray(key), (width + margin, 0))
        canvas.save(self._path, format="PNG")


def _outlines(ids: np.ndarray, width: int) -> np.ndarray:
    """Return which pixels are at most `width` from one of another class in their row or column, (H, W) bool.

    Such a pixel differs from the largest or the smallest id of the cross around it.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (2 * width + 1, 2 * width + 1))
    return cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, cross) > 0
