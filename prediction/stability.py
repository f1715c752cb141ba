"""How far a mask depends on where one cuts: its image is cut anew, segmented again, and the masks are compared."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from prediction.scenes import Rows
from utils.canvas import RESULT_ROWS
from utils.classes import IGNORED
from utils.files import writing
from utils.tiling import Box, Size

MOST_CUTS = 99
"""A pixel's changes are counted in a byte."""


def shifted_cuts(size: Size, size_p: int, count: int) -> list[Box]:
    """Return `count` parts of an image of `size`, each without up to a patch, or a quarter, of its rows and columns.

    Rows and columns are left out at the upper left and at the lower right in turn, so that patches and the shrunk image
    lie elsewhere. Of one axis the shifts rise, of the other they fall.
    """
    boxes = []
    for k in range(1, count + 1):
        down, across = (
            min(size_p, side // 4) * step // (count + 1) for side, step in zip(size, (k, count + 1 - k), strict=True)
        )
        top, left = (down, across) if k % 2 else (0, 0)
        boxes.append(Box(top, left, size[0] - down, size[1] - across))
    return boxes


class StabilityMap:
    """A context that compares the mask of an image with those of its cuts, with a file of 2 bytes per pixel.

    All methods raise InputError if the file cannot be written.

    Attributes:
        cuts: parts of the image that are segmented again.
        compared: over all cuts, how many pixels were compared: those with data.
        changed: how many of them have another class there.
    """

    def __init__(self, folder: Path, size: Size, cuts: Sequence[Box]) -> None:
        """Compare nothing yet; the file, which has no name, is written into `folder`."""
        self.folder, self.size, self.cuts = folder, size, cuts
        self.compared = self.changed = 0

    def __enter__(self) -> "StabilityMap":
        with writing(self.folder):
            self._file = TemporaryFile(dir=self.folder)  # rows (2, W): ids, and in how many cuts they are others
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # of what is still to be written
            self._file.close()

    @property
    def share(self) -> float:
        """The part of the compared pixels whose class changed, 0..1."""
        return self.changed / max(1, self.compared)

    def keep(self, rows: Rows) -> None:
        """Take the next rows of the mask itself, from the first to the last."""
        ids = rows.ids.numpy()
        with writing(self.folder):
            self._file.write(np.stack([ids, np.zeros_like(ids)], axis=1).tobytes())

    def compare(self, cut: Box, top: int, rows: Rows) -> None:
        """Take rows of the mask of a cut, from its row `top` on."""
        with writing(self.folder):
            kept = self._read(cut.top + top, len(rows.ids))
            ids, changes = np.moveaxis(kept[..., cut.left : cut.left + cut.width], 1, 0)
            known = ids != IGNORED
            differs = known & (ids != rows.ids.numpy())
            changes += differs
            self._file.seek((cut.top + top) * 2 * self.size[1])
            self._file.write(kept.tobytes())
        self.compared += int(known.sum())
        self.changed += int(differs.sum())

    def levels(self) -> Iterator[np.ndarray]:
        """Yield the map, some rows (1, n, W) uint8 at a time: in which share of a pixel's cuts the class is another.

        255 is all, 0 none.
        """
        for top in range(0, self.size[0], RESULT_ROWS):
            changes = self._read(top, min(RESULT_ROWS, self.size[0] - top))[:, 1]
            cuts = np.zeros(changes.shape, np.uint8)
            for cut in self.cuts:
                inside = slice(max(0, cut.top - top), max(0, cut.top + cut.height - top))
                cuts[inside, cut.left : cut.left + cut.width] += 1
            yield np.rint(255 * (changes[None] / np.maximum(1, cuts))).astype(np.uint8)

    def _read(self, top: int, count: int) -> np.ndarray:
        """Return rows of the file, (count, 2, W) uint8, to be changed."""
        self._file.seek(top * 2 * self.size[1])
        return np.frombuffer(bytearray(self._file.read(count * 2 * self.size[1])), np.uint8).reshape(count, 2, -1)
