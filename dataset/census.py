"""Which values the labels of a data set hold, how often, and which of them are classes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dataset.base import Item
from dataset.label_file import MAX_VALUE, SMOOTHED, LabelValues, fit_of, turn_of
from imaging.planes import open_planes
from imaging.probe import probe
from utils.classes import IGNORED, Color
from utils.errors import InputError, required

MAX_KINDS = 64
"""Labels with more different values were saved or resized with smoothing."""

FEW_KINDS, MOSTLY = 8, 0.9
"""More than so many grey values, two of which fill more than this part, are two classes that were resized."""

VOID: Color = (224, 224, 192)
"""The customary colour of pixels that are left out, since PASCAL VOC."""

WHITE = -1
"""The spelling of 1-bit white, which is 1 or 255: the other labels tell which."""

Value = int | Color
"""A grey value or a colour."""


@dataclass
class Spellings:
    """The pixels of each value in one label, or of several.

    Attributes:
        values: grey values, or colours where not all are grey; of a palette image its colours.
        indices: of a palette image, its indices; else empty.
        palette: the colours of the indices that occur.
        no_data: pixels that the file declares to be without data, or that are no finite number.
        turned: how an image that is turned for display and its label fit: see `fit_of`; "" where it is not.
    """

    values: Counter[Value] = field(default_factory=Counter)
    indices: Counter[int] = field(default_factory=Counter)
    palette: dict[int, Color] = field(default_factory=dict)
    no_data: int = 0
    turned: str = ""


def spellings(item: Item) -> Spellings:
    """Count the values of an item's label.

    Raises:
        InputError: image or label cannot be read, their sizes differ, or the label holds more than `MAX_KINDS` values
            or fractions, as smoothing leaves them.
    """
    (pair,) = item.pairs()
    image, path = probe(pair.image), required(pair.label, "label")
    info = probe(path)
    turn = turn_of(info, image)
    found = Spellings(turned=fit_of(info, image) if image.orientation > 1 else "")
    with open_planes(info, turn) as planes:
        label = LabelValues(info, planes)
        if info.palette:
            found.indices.update({int(value): count for value, count in label.count().items()})
            colors = [tuple(color) for color in required(planes.palette, "palette").tolist()]
            found.palette = {k: colors[k] if k < len(colors) else (0, 0, 0) for k in found.indices}
            for index, count in found.indices.items():
                found.values[found.palette[index]] += count
            _shorten(found.values)
        elif info.bands < 3:
            greys = label.count()
            for value in greys if len(greys) <= MAX_KINDS else ():
                if value != int(value):
                    raise InputError(f"{path} holds {value:g}, which is no whole number; {SMOOTHED}", "smoothed")
                if not 0 <= value <= MAX_VALUE:
                    raise InputError(
                        f"{path} holds {value:g}; values of classes are 0..{MAX_VALUE}: declare it as the file's "
                        f"nodata (gdal_edit.py -a_nodata {value:g} FILE), or save the labels with other values"
                    )
            found.values.update({int(value): count for value, count in greys.items()})
            if info.top == 1 and 1 in found.values:
                found.values[WHITE] = found.values.pop(1)
        else:
            found.values.update(label.count())
            _shorten(found.values)
    found.no_data = planes.size[0] * planes.size[1] - found.values.total()
    if len(found.values) > MAX_KINDS:
        raise InputError(
            f"{path} holds {len(found.values)} different values, at most {MAX_KINDS} make classes; {SMOOTHED}"
        )
    return found


def _shorten(values: Counter[Value]) -> None:
    """Spell colours as grey values where all of one file are grey."""
    colors = [color for color in values if isinstance(color, tuple)]
    if all(len(set(color)) == 1 for color in colors):
        for color in colors:
            values[color[0]] = values.pop(color)


def _palettes_hold_ids(found: Sequence[Spellings]) -> bool:
    """Return whether all labels have one palette and use its index 255, which no class has a colour for."""
    palette: dict[int, Color] = {}
    for one in found:
        if not one.indices or any(palette.get(index, color) != color for index, color in one.palette.items()):
            return False
        palette |= one.palette
    return IGNORED in palette and len(set(palette.values())) > 2


class Census:
    """The values that all labels of a data set hold.

    Attributes:
        pixels, files: of each value.
        colors: of values that are palette indices.
        no_data: pixels that files declare to be without data.
        turned: how many images are turned for display, by how their labels fit.
        failures: what is wrong with files that could not be read, and are not counted.
        void: colours at index 255 of palettes.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.pixels: Counter[Value] = Counter()
        self.files: Counter[Value] = Counter()
        self.colors: dict[int, Color] = {}
        self.no_data = 0
        self.turned: Counter[str] = Counter()
        self.failures: list[InputError] = []
        self.void: set[Color] = set()
        found = []
        for item in items:
            try:
                found.append(spellings(item))
            except InputError as error:
                if error.kind not in ("unreadable", "not supported", "needs rasterio", "too large"):
                    raise  # it concerns the data set, not one file
                self.failures.append(error)
        by_index = _palettes_hold_ids(found)
        for one in found:
            values = one.indices if by_index else one.values
            self.pixels.update(values)
            self.files.update(values.keys())
            self.no_data += one.no_data
            if one.turned:
                self.turned[one.turned] += 1
            if by_index:
                self.colors |= one.palette
            elif IGNORED in one.palette:
                self.void.add(one.palette[IGNORED])
        self._unite()
        if len(self.pixels) > MAX_KINDS:
            raise InputError(f"the labels hold {len(self.pixels)} different values together; {SMOOTHED}")

    def _unite(self) -> None:
        """Spell everything one way: 1-bit white as 255 or 1, and greys as colours where any file has colours."""
        white = 1 if 1 in self.pixels else 255
        colored = any(isinstance(value, tuple) for value in self.pixels)
        for counts in (self.pixels, self.files):
            for value in [value for value in counts if isinstance(value, int)]:
                grey = white if value == WHITE else value
                if colored and grey > 255:
                    raise InputError(f"some labels hold colours, others grey values such as {grey}; save all one way")
                united = (grey,) * 3 if colored else grey
                if united != value:
                    counts[united] += counts.pop(value)

    def refuse_smoothed(self) -> None:
        """InputError where the values look like two classes and the shades between them, not like classes."""
        if len(self.pixels) <= FEW_KINDS or isinstance(next(iter(self.pixels)), tuple):
            return
        common = sorted(value for value, _ in self.pixels.most_common(2))
        share = sum(self.pixels[value] for value in common) / self.pixels.total()
        values = sorted(self.pixels)
        counted = values[:-1] == list(range(len(values) - 1))  # ids, the last perhaps 255
        if share > MOSTLY and not counted:
            raise InputError(
                f"the labels hold {len(values)} grey values, but {common[0]} and {common[1]} make {100 * share:.1f} % "
                f"of the pixels; {SMOOTHED}. If all are classes after all, name them by --names"
            )

    def ignored(self) -> list[Value]:
        """Return the values that are guessed to be no class.

        255, where the other values are ids: 0, 1, ... without a gap, or where it is a palette's index; the customary
        void colour, and that of index 255 of a palette, beside other colours. Elsewhere 255 is a class.
        """
        values = list(self.pixels)
        if any(isinstance(value, tuple) for value in values):
            return sorted(value for value in values if value in self.void | {VOID}) if len(values) > 2 else []
        ids = sorted(value for value in values if value != IGNORED)
        counted = len(ids) > 1 and (bool(self.colors) or ids == list(range(len(ids))))
        return [IGNORED] if counted and IGNORED in self.pixels else []
