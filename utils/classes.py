"""What a data set's class ids mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IGNORED = 255
"""The label id that is left out of the loss and of every metric."""

Color = tuple[int, int, int]


def _voc_color(k: int) -> Color:
    """Colour of id k: its bits 0, 3, 6 are red's highest bits, 1, 4, 7 green's, 2, 5 blue's."""
    return tuple(sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))


@dataclass(frozen=True)
class Classes:
    """Names and RGB colours of the ids 0..n-1, and the ids that the headline mIoU leaves out."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def generic(cls, n_class: int) -> "Classes":
        """`class 0` ... with the colours that PASCAL VOC made customary; class 0 is left out, as released."""
        names = tuple(f"class {k}" for k in range(n_class))
        return cls(names, tuple(_voc_color(k) for k in range(n_class)), (0,))

    def to_record(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints and JSON."""
        return {"names": list(self.names), "palette": [list(c) for c in self.palette], "left_out": list(self.left_out)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Classes":
        """The inverse of `to_record`."""
        palette = tuple(tuple(int(v) for v in color) for color in record["palette"])
        return cls(tuple(record["names"]), palette, tuple(int(k) for k in record["left_out"]))
