"""Class colours over an image, with outlines and a legend, for people to look at."""

import numpy as np
import torch
from PIL import Image

from utils.classes import Classes
from utils.resize import nearest_indices
from utils.tiling import Size
from utils.visualize import colorize, legend

LONGEST_OVERLAY = 4096
"""Pixels; overlays of larger images are shrunk to it."""

TINT = 0.4
"""How much of a pixel is its class's colour; the rest is the image's."""


def overlay_size(size: Size) -> Size:
    """The size of the overlay of an image of `size`, the legend left out."""
    scale = min(1.0, LONGEST_OVERLAY / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class SampledIds:
    """A sink for rows of ids of an image of `size` that keeps `ids`, as many of them as an overlay shows."""

    def __init__(self, size: Size) -> None:
        target = overlay_size(size)
        self._rows, self._columns = (nearest_indices(a, b) for a, b in zip(size, target, strict=True))
        self.ids = torch.empty(target, dtype=torch.uint8)

    def __call__(self, top: int, ids: torch.Tensor) -> None:
        """Add rows (n, W) from `top`."""
        inside = (self._rows >= top) & (self._rows < top + len(ids))
        self.ids[inside] = ids[self._rows[inside] - top][:, self._columns]


def _outlines(ids: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels less than `width` from one of another class to their right or below, or the reverse."""
    edge = np.zeros(ids.shape, bool)
    for step in range(1, width + 1):
        for one, other in (((slice(step, None),), (slice(None, -step),)), ((slice(None), slice(step, None)), ...)):
            other = (slice(None), slice(None, -step)) if other is ... else other
            differ = ids[one] != ids[other]
            edge[one] |= differ
            edge[other] |= differ
    return edge


def draw_overlay(image: np.ndarray, ids: np.ndarray, classes: Classes) -> np.ndarray:
    """(H', W', 3) uint8: `image` (H, W, 3) uint8 tinted by `ids` (H, W) uint8, and a legend to its right.

    ArgmaxSink without a class are not tinted.
    """
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
