"""Curves in a PNG, for the figures of the benchmarks: panels side by side, both axes logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.files import replacing

WIDTH, HEIGHT = 520, 400
"""Pixels of a panel."""
LEFT, RIGHT, BOTTOM = 66, 24, 56
"""What lies around its curves; above them, its title and a line for each curve."""
LINE = 19
SCALE = 2
"""How many times larger everything is drawn, to be shrunk to smooth edges."""

INK, GRID = "#222222", "#dddddd"


@dataclass(frozen=True)
class Curve:
    """Positive `values`, one for each place on the panel's x axis; dashed where it is there to compare with."""

    name: str
    values: Sequence[float]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: Sequence[Curve]


def ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2, 5, 10, ... from the last below `low` to the first above `high`; both positive."""
    steps = [digit * 10.0**power for power in range(-6, 13) for digit in (1, 2, 5)]
    first = max(k for k, step in enumerate(steps) if step <= low)
    last = min(k for k, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]


class _Axis:
    """Where a value of `low`..`high` lies between the pixels `start` and `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.span = math.log(low), math.log(high / low) or 1.0
        self.start, self.length = start, end - start

    def __call__(self, value: float) -> float:
        return self.start + self.length * (math.log(value) - self.low) / self.span


class _Pen:
    """Draws in the pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size * SCALE) for size in (13, 15)}

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1, dashed: bool = False) -> None:
        for (x, y), (x1, y1) in pairwise(points):
            pieces = max(1, round(math.hypot(x1 - x, y1 - y) / 5)) if dashed else 1
            for k in range(0, pieces, 2):
                ends = [(x + (x1 - x) * t, y + (y1 - y) * t) for t in (k / pieces, (k + 1) / pieces)]
                self.draw.line([c * SCALE for end in ends for c in end], color, round(width * SCALE))

    def dot(self, x: float, y: float, color: str, radius: float = 3.5) -> None:
        self.draw.ellipse([c * SCALE for c in (x - radius, y - radius, x + radius, y + radius)], color)

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 13) -> None:
        self.draw.text((x * SCALE, y * SCALE), text, INK, self.fonts[size], anchor)

    def save(self, path: Path) -> None:
        size = self.image.width // SCALE, self.image.height // SCALE
        with replacing(path) as part:
            self.image.resize(size, Image.Resampling.LANCZOS).quantize(64).save(part, "PNG", optimize=True)


def draw(path: Path, x_label: str, x: Sequence[float], panels: Sequence[Panel]) -> None:
    """Write `panels` side by side as a PNG; their curves have a value for each of `x`, which rises."""
    pen = _Pen(WIDTH * len(panels), HEIGHT)
    above = 34 + LINE * max(len(panel.curves) for panel in panels)
    for number, panel in enumerate(panels):
        _draw_panel(pen, WIDTH * number, above, x_label, x, panel)
    pen.save(path)


def _draw_panel(pen: _Pen, left: float, above: float, x_label: str, x: Sequence[float], panel: Panel) -> None:
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, above
    marks = ticks(*(pick(v for curve in panel.curves for v in curve.values) for pick in (min, max)))
    across, up = _Axis(x[0], x[-1], x0 + 16, x1 - 16), _Axis(marks[0], marks[-1], y0, y1)
    pen.text(x0, 14, panel.title, "lm", 15)
    for mark in marks:
        pen.line([(x0, up(mark)), (x1, up(mark))], GRID)
        pen.text(x0 - 7, up(mark), f"{mark:,.10g}", "rm")
    for value in x:
        pen.line([(across(value), y0), (across(value), y0 + 4)], INK)
        pen.text(across(value), y0 + 15, f"{value:g}", "mm")
    pen.line([(x0, y1), (x0, y0), (x1, y0)], INK)
    pen.text((x0 + x1) / 2, HEIGHT - 18, x_label, "mm")
    for k, curve in enumerate(panel.curves):
        points = [(across(a), up(b)) for a, b in zip(x, curve.values, strict=True)]
        pen.line(points, curve.color, 2, curve.dashed)
        height = 36 + LINE * k
        pen.line([(x0, height), (x0 + 28, height)], curve.color, 2, curve.dashed)
        pen.text(x0 + 36, height, curve.name, "lm")
        for point in () if curve.dashed else (*points, (x0 + 14, height)):
            pen.dot(*point, curve.color)
