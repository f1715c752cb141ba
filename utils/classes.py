"""The classes of a data set: names, colours, and what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

IGNORED = 255
"""The label id that is left out of the loss and of every metric."""

Color = tuple[int, int, int]
"""(red, green, blue), 0..255 each."""


def _voc_color(k: int) -> Color:
    """Return the colour of id k: its bits 0, 3, 6 are the highest bits of red, 1, 4, 7 of green, 2, 5 of blue."""
    red, green, blue = (sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))
    return red, green, blue


def distinct_colors(count: int) -> list[Color]:
    """Return the first `count` colours of PASCAL VOC that are not grey: none can be confused with a grey value."""
    return [color for k in range(2 * count + 2) if len(set(color := _voc_color(k))) > 1][:count]


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, with the ids 0..n-1."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]  # in label files and in pictures
    left_out: tuple[int, ...] = ()  # ids that the headline mIoU leaves out
    values: tuple[int, ...] = ()  # the grey value of each id in label files; by default the id itself
    ignored: tuple[int | Color, ...] = (IGNORED,)  # in label files; their pixels are in no loss and no metric
    foreground: tuple[int, ...] = ()  # ids of the objects that the set is about; empty if the set has no background
    measures: tuple[str, ...] = ()  # names of `utils.metrics.MEASURES`, reported beside IoU

    def __post_init__(self) -> None:
        if not self.values:
            object.__setattr__(self, "values", tuple(range(len(self.names))))

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def generic(cls, n_class: int) -> "Classes":
        """Return `n_class` numbered classes in the colours of PASCAL VOC; class 0 is left out, as released."""
        names = tuple(f"class {k}" for k in range(n_class))
        return cls(names, tuple(_voc_color(k) for k in range(n_class)), (0,))

    def to_record(self) -> dict[str, Any]:
        """Return the attributes as plain lists and strings, for checkpoints and JSON."""
        record = {field.name: list(getattr(self, field.name)) for field in fields(self)}
        record["palette"] = [list(color) for color in self.palette]
        record["ignored"] = [one if isinstance(one, int) else list(one) for one in self.ignored]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Classes":
        """Return the classes that `to_record` recorded. Older records have the first three entries only."""
        known = {field.name: tuple(record[field.name]) for field in fields(cls) if field.name in record}
        known["palette"] = tuple(tuple(color) for color in record["palette"])
        known["ignored"] = tuple(
            one if isinstance(one, int) else tuple(one) for one in known.get("ignored", (IGNORED,))
        )
        return cls(**known)
