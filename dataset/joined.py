"""Scenes that are published as a grid of files: which pixels of which file make up any box of the scene."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from dataset.probe import probe
from utils.errors import InputError
from utils.tiling import Box, Size


@dataclass(frozen=True)
class Piece:
    """What one part adds to a box: `within` the part, and `target`, where that lies in the box, of the same size."""

    row: int
    column: int
    within: Box
    target: Box


@dataclass(frozen=True)
class Layout:
    """A seamless grid of parts: heights of its rows and widths of its columns, in pixels."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def size(self) -> Size:
        """Return (height, width) of all parts together."""
        return sum(self.heights), sum(self.widths)

    def pieces(self, box: Box) -> Iterator[Piece]:
        """Yield the pieces that `box`, which lies within the grid, is made of."""
        for row, top, first_row, height in _overlaps(self.heights, box.top, box.height):
            for column, left, first_column, width in _overlaps(self.widths, box.left, box.width):
                yield Piece(row, column, Box(top, left, height, width), Box(first_row, first_column, height, width))


def _overlaps(lengths: Sequence[int], start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield, for each part along an axis that `length` pixels from `start` on touch, its number and what they cover.

    That is the first pixel within the part, the first within the range, and how many.
    """
    for k, (end, own) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        first, last = max(start, end - own), min(start + length, end)
        if first < last:
            yield k, first - (end - own), first - start, last - first


@dataclass(frozen=True)
class JoinedParts:
    """The files that together are one image, or one label: `rows` of paths, all of the same number."""

    rows: tuple[tuple[Path, ...], ...]

    @property
    def paths(self) -> list[Path]:
        """Return all parts, row by row."""
        return [path for row in self.rows for path in row]

    def __str__(self) -> str:
        return f"{self.paths[0].parent} ({len(self.paths)} parts)"

    @cached_property
    def layout(self) -> Layout:
        """Return the grid, from the files' headers.

        Raises InputError, naming the file, where a part cannot be read, or has another height than most of its row or
        another width than most of its column.
        """
        sizes = [[probe(path).size for path in row] for row in self.rows]
        heights = tuple(_most_common(height for height, _ in row) for row in sizes)
        widths = tuple(_most_common(width for _, width in column) for column in zip(*sizes, strict=True))
        for r, row in enumerate(sizes):
            for c, size in enumerate(row):
                if size != (heights[r], widths[c]):
                    raise InputError(
                        f"{self.rows[r][c]} is {size[0]} x {size[1]} pixels, but its place in the scene is "
                        f"{heights[r]} x {widths[c]}: parts in one row have one height, parts in one column one width; "
                        "copy it again from its source",
                        "sizes differ",
                    )
        return Layout(heights, widths)


def _most_common(numbers: Iterable[int]) -> int:
    return Counter(numbers).most_common(1)[0][0]
