"""The common part of all figures: fonts, marks that differ in more than colour, labels. Drawing needs matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError, required
from utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.title_fontsize": 12,
    "legend.handlelength": 3,
}
"""Settings of matplotlib for every figure."""

DPI = 200

GREY = "#666666"
"""Of references: lines that show no measurement."""

LABEL_SIZE = 10
"""Of texts beside points, in points."""

GAP = 1.5
"""Around such a text, in points."""

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
PLACES = tuple((distance, *direction) for distance in (8, 20, 34, 50) for direction in DIRECTIONS)
"""Where a point's label may be, the best first: distance from the point in points, steps to the right and up."""


@dataclass(frozen=True)
class Mark:
    """How a curve is drawn; any two of `MARKS` differ in all three.

    Attributes:
        color: of Okabe and Ito's palette, which people with any colour vision can tell apart.
        marker: of the points.
        linestyle: between the points.
    """

    color: str
    marker: str
    linestyle: str

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of matplotlib's `plot` and `errorbar`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle}


MARKS = (
    Mark("#0072b2", "o", "-"),
    Mark("#d55e00", "s", "--"),
    Mark("#009e73", "^", "-."),
    Mark("#000000", "D", ":"),
)


@contextmanager
def drawing(path: Path, grid: tuple[int, int], panel: tuple[float, float], **more: Any) -> Iterator[list["Axes"]]:
    """Yield the panels of a figure, row by row; when they are drawn, the figure is written as a PNG.

    Args:
        path: of the file.
        grid: numbers of rows and columns of panels.
        panel: width and height of a panel, in inches; text has 12 points.
        more: arguments of matplotlib's `subplots`.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{path} is not drawn, as matplotlib is missing: pip install matplotlib") from error
    rows, columns = grid
    with rc_context(STYLE):
        figure = Figure((columns * panel[0], rows * panel[1]), dpi=DPI, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False, **more).flat)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def add_title(axes: "Axes", title: str) -> None:
    """Write the title of a panel above it, and under the title the legend of its curves, if they have names."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(title=title, alignment="left", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    else:
        axes.set_title(title)


def label_points(axes: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Write a text beside each point, where it covers no point and no other text if there is such a place.

    To be called last, as it needs the final limits of the axes.

    Args:
        axes: the panel.
        points: x, y and text of each.
    """
    from matplotlib.transforms import Bbox

    required(axes.get_figure(root=True), "figure").draw_without_rendering()
    inside, around = axes.get_window_extent(), 5 * DPI / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox([(x - around, y - around), (x + around, y + around)]) for x, y in centres]
    for x, y, text in points:
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=LABEL_SIZE, in_layout=False)
        for distance, across, up in (*PLACES, PLACES[0]):  # the first again, if none is free
            label.set(ha=("center", "left", "right")[across], va=("center", "bottom", "top")[up])
            label.set_position((across * distance, up * distance))
            box = label.get_window_extent().padded(GAP * DPI / 72)
            free = not any(box.overlaps(other) for other in taken)
            if free and all(inside.contains(*corner) for corner in box.corners()):
                break
        taken.append(box)
        if distance > PLACES[0][0]:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": GREY, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), label.get_position(), textcoords="offset points", arrowprops=line)
