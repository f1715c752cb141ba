"""Overlays: class colours over an image, with outlines and a legend."""

import cv2
import numpy as np
import torch
from PIL import Image

from utils.classes import Classes
from utils.resize import nearest_indices
from utils.tiling import Size
from utils.visualize import colorize, legend

TINT = 0.4
"""The part of a pixel that is its class's colour; the rest is the image's."""


def overlay_size(size: Size) -> Size:
    """Return the size of the overlay of an image of `size`, at most 4096 pixels a side, without the legend."""
    scale = min(1.0, 4096 / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class SampledIds:
    """Keeps a sample of an image's ids: those that its overlay shows.

    Attributes:
        ids: (h, w) uint8, of `overlay_size`.
    """

    def __init__(self, size: Size) -> None:
        """Start without ids; `size` is that of the image, in pixels."""
        target = overlay_size(size)
        self._rows, self._columns = (nearest_indices(a, b) for a, b in zip(size, target, strict=True))
        self.ids = torch.empty(target, dtype=torch.uint8)

    def __call__(self, top: int, ids: torch.Tensor) -> None:
        """Sample the ids (n, W) uint8 of the rows from `top` on."""
        inside = (self._rows >= top) & (self._rows < top + len(ids))
        self.ids[inside] = ids[self._rows[inside] - top][:, self._columns]


def _outlines(ids: np.ndarray, width: int) -> np.ndarray:
    """Return which pixels are at most `width` from one of another class in their row or column, (H, W) bool.

    Such a pixel differs from the largest or the smallest id of the cross around it.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (2 * width + 1, 2 * width + 1))
    return cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, cross) > 0


def draw_overlay(image: np.ndarray, ids: np.ndarray, classes: Classes) -> np.ndarray:
    """Return an image (H, W, 3) uint8 RGB in class colours with a legend to its right; ids that are no class stay."""
    colors = colorize(ids, classes.palette)
    tinted = (image * (1 - TINT) + colors * TINT).astype(np.uint8)
    edge = _outlines(ids, 1 + max(ids.shape) // 1500)
    tinted[edge] = colors[edge]
    unknown = ids >= len(classes)
    tinted[unknown] = image[unknown]
    key = legend(classes.names, classes.palette, height=min(48, max(16, max(ids.shape) // 40)))
    margin = 8
    canvas = Image.new("RGB", (tinted.shape[1] + 2 * margin + key.shape[1], max(len(tinted), len(key))), "white")
    canvas.paste(Image.fromarray(tinted), (0, 0))
    canvas.paste(Image.fromarray(key), (tinted.shape[1] + margin, 0))
    return np.asarray(canvas)
