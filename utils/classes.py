"""What a data set's class ids mean."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

IGNORED = 255
"""The label id that is left out of the loss and of every metric."""

Color = tuple[int, int, int]


def _voc_color(k: int) -> Color:
    """Colour of id k: its bits 0, 3, 6 are red's highest bits, 1, 4, 7 green's, 2, 5 blue's."""
    return tuple(sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))


def distinct_colors(count: int) -> list[Color]:
    """The first `count` customary colours that are no grey, so that they are never mistaken for grey values."""
    return [color for k in range(2 * count + 2) if len(set(color := _voc_color(k))) > 1][:count]


@dataclass(frozen=True)
class Classes:
    """What the ids 0..n-1 are called, how label files spell them, and what is measured.

    `palette` is RGB, for label files and for pictures; `left_out` are the ids that the headline mIoU leaves out.
    `values` are the grey values of the ids in label files, the ids themselves where none are given; `ignored` the
    grey values and colours there that count nowhere. `foreground` are the ids of the objects that the set is about,
    none where it has no background; `measures` names of `utils.metrics.MEASURES`, reported beside IoU.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    left_out: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    ignored: tuple[int | Color, ...] = (IGNORED,)
    foreground: tuple[int, ...] = ()
    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.values:
            object.__setattr__(self, "values", tuple(range(len(self.names))))

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def generic(cls, n_class: int) -> "Classes":
        """`class 0` ... with the colours that PASCAL VOC made customary; class 0 is left out, as released."""
        names = tuple(f"class {k}" for k in range(n_class))
        return cls(names, tuple(_voc_color(k) for k in range(n_class)), (0,))

    def to_record(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints and JSON."""
        record = {field.name: list(getattr(self, field.name)) for field in fields(self)}
        record["palette"] = [list(color) for color in self.palette]
        record["ignored"] = [one if isinstance(one, int) else list(one) for one in self.ignored]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Classes":
        """The inverse of `to_record`; of older records, which have the first three entries only, as well."""
        known = {field.name: tuple(record[field.name]) for field in fields(cls) if field.name in record}
        known["palette"] = tuple(tuple(color) for color in record["palette"])
        known["ignored"] = tuple(
            one if isinstance(one, int) else tuple(one) for one in known.get("ignored", (IGNORED,))
        )
        return cls(**known)
