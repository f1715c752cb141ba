"""Figures of the benchmarks: panels of curves side by side, both axes logarithmic. Drawing needs matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.files import replacing

WIDTH, HEIGHT = 5.2, 4.0
"""Of a panel, in units of 100 pixels."""


@dataclass(frozen=True)
class Curve:
    """A curve of a panel.

    Attributes:
        name: in the legend.
        values: positive, one for each place on the x axis.
        color: as `#rrggbb`.
        dashed: whether the curve is a reference, dashed and without markers.
    """

    name: str
    values: Sequence[float]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes, under a title."""

    title: str
    curves: Sequence[Curve]


def draw(path: Path, x_label: str, x: Sequence[float], panels: Sequence[Panel]) -> None:
    """Write a figure as a PNG.

    Args:
        path: of the file.
        x_label: under every x axis.
        x: places on the x axis, positive and rising.
        panels: from left to right.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    except ImportError as error:
        raise InputError(f"{path} is not drawn, as matplotlib is missing: pip install matplotlib") from error
    figure = Figure((WIDTH * len(panels), HEIGHT), dpi=100, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            style = {"linestyle": "--"} if curve.dashed else {"marker": "o", "markersize": 5}
            axes.loglog(x, curve.values, color=curve.color, label=curve.name, linewidth=2, **style)
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel(x_label)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(x, [f"{place:g}" for place in x])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, format="png")
