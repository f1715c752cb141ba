"""Outlines of regions, traced strip by strip from the top of an image to its bottom.

A region's outline turns at corners of its pixels. The corners of a strip are paired along the lines of the pixel grid,
which gives each corner its successor. Outlines that leave a strip at its bottom are kept open and go on in the next
strip, so the result does not depend on the strips.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from utils.classes import IGNORED

_LEAF = 512
"""Neighbouring pieces of an open outline are joined up to this number of vertices."""

_KINDS = tuple(product((0, 1), (0, 1), (0, 1)))
"""How an outline turns at a vertex: the pixel is (above, below), (left, right) of it; the corner is (convex, reflex).

A convex corner is the pixel's own. At a reflex one, the pixel and both its neighbours at the vertex are of one region.
"""

_BELOW, _RIGHT, _REFLEX = (np.array(column, bool) for column in zip(*_KINDS, strict=True))
_STARTS_X = _RIGHT != _REFLEX
"""Whether the horizontal edge at the corner lies to the right of the vertex."""
_STARTS_Y = _BELOW != _REFLEX
"""Whether the vertical edge at the corner lies below the vertex."""
_LEAVES_X = _STARTS_X != _BELOW
"""Whether an outline leaves the corner along the horizontal edge, with the region to its left."""


@dataclass
class Rings:
    """Closed outlines.

    Attributes:
        vertices: (n, 2) int32 column and row of pixel corners, ring after ring; the first is not repeated. The region
            is to the left of each edge, as seen in the image.
        lengths: (rings,) int64, the number of vertices of each.
        owners: (rings,) int64, the number of the region that each belongs to.
    """

    vertices: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray

    @classmethod
    def join(cls, parts: list["Rings"]) -> "Rings":
        """Return all rings of `parts`, in order."""
        empty = cls(np.empty((0, 2), np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
        every = [empty, *parts]
        return cls(
            *(np.concatenate([getattr(one, name) for one in every]) for name in ("vertices", "lengths", "owners"))
        )

    @property
    def numbers(self) -> np.ndarray:
        """The number of each vertex's ring, (n,) int64."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """The number of each ring's first vertex, (rings,) int64."""
        return np.cumsum(self.lengths) - self.lengths

    def select(self, which: np.ndarray) -> "Rings":
        """Return the rings with the numbers `which`, in this order."""
        lengths = self.lengths[which]
        shift = self.starts[which] - (np.cumsum(lengths) - lengths)
        index = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return Rings(self.vertices[index], lengths, self.owners[which])


class OutlineTracer:
    """Traces the outlines of all regions of an image, whose rows come in strips.

    Between strips the open outlines are held: at most one for each column, 8 bytes for each vertex.
    """

    def __init__(self, width: int) -> None:
        """Start above the image; `width` is that of its rows."""
        self._width = width
        self._top = 0
        # open outlines: their vertices in pieces, and where each is entered and left: twice the column, plus its side
        self._pieces: list[list[np.ndarray]] = []
        self._heads = np.empty(0, np.int64)
        self._tails = np.empty(0, np.int64)

    def trace(self, ids: np.ndarray, owners: np.ndarray) -> Rings:
        """Trace a strip; return the outlines that close in it.

        Args:
            ids: (n + 1, W) uint8, the last row of the strip above (255 above the image), then the strip's rows. Pixels
                of id 255 belong to no region.
            owners: (n + 1, W) int64, the number of the region of each pixel.
        """
        padded = np.pad(ids, ((0, 0), (1, 1)), constant_values=IGNORED)
        row, column, kind = _corners(padded)
        turns, height = len(row), len(ids) - 1
        held = len(self._pieces)
        # points: the corners, then the end and the begin of each open outline, which continue above the first row
        ends = np.stack([self._tails, self._heads], axis=1).ravel()
        line = np.concatenate([2 * column + _RIGHT[kind], ends])
        below = np.concatenate([row + 1, np.zeros(2 * held, np.int64)])
        starts = np.concatenate([_STARTS_Y[kind], np.ones(2 * held, bool)])
        across = _partners((2 * row + _BELOW[kind]) * (self._width + 1) + column, _STARTS_X[kind])
        down = _partners(line * (height + 1) + below, starts)
        leaves_down = np.concatenate([~_LEAVES_X[kind], np.tile([True, False], held)])
        following = np.concatenate([across, turns + 2 * np.repeat(np.arange(held), 2)])
        following[leaves_down] = down[leaves_down]
        first = np.flatnonzero((down < 0) & ~leaves_down)

        vertices = np.stack([column, row + self._top], axis=1).astype(np.int32)
        open_walks, plain, lengths, mixed = _walk(following.tolist(), first.tolist(), turns)
        pixel = owners[row + _BELOW[kind], np.clip(column - 1 + _RIGHT[kind], 0, self._width - 1)]
        order = np.array(plain, np.int64)
        sizes = np.array(lengths, np.int64)
        rings = [Rings(vertices[order], sizes, pixel[order[np.cumsum(sizes) - sizes]])]
        for walk in mixed:
            whole = np.concatenate(self._join(walk, vertices))
            rings.append(Rings(whole, np.array([len(whole)]), pixel[walk[:1]]))
        self._pieces = [self._join(walk, vertices) for walk in open_walks]
        self._heads = line[first]
        self._tails = line[[walk[-1] for walk in open_walks]] if open_walks else line[:0]
        self._top += height
        return Rings.join(rings)

    def _join(self, walk: list[int], vertices: np.ndarray) -> list[np.ndarray]:
        """Return the vertices of a walk over corners and open outlines, in pieces."""
        turns, points = len(vertices), np.array(walk)
        found: list[np.ndarray] = []
        at = 0
        for k in [*np.flatnonzero(points >= turns)[::2].tolist(), len(walk)]:  # where open outlines are entered
            if k > at:
                _append(found, vertices[points[at:k]])
            if k < len(walk):
                pieces = self._pieces[(walk[k] - turns) // 2]
                if found:
                    _append(found, pieces[0])
                    found.extend(pieces[1:])
                else:
                    found = pieces
            at = k + 2
        return found


def _append(pieces: list[np.ndarray], piece: np.ndarray) -> None:
    if pieces and len(pieces[-1]) + len(piece) <= _LEAF:
        pieces[-1] = np.concatenate([pieces[-1], piece])
    else:
        pieces.append(piece)


def _corners(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, column and kind (index of `_KINDS`) of all corners at the vertices between the rows of `padded`."""
    plain = padded[:-1, :-1] == padded[:-1, 1:]
    plain &= padded[1:, :-1] == padded[1:, 1:]
    plain &= padded[:-1, :-1] == padded[1:, :-1]
    row, column = np.nonzero(~plain)
    pixels = np.array([[padded[row + below, column + right] for right in (0, 1)] for below in (0, 1)])
    beside = pixels[:, 0] == pixels[:, 1]  # above, below the vertex
    stacked = pixels[0] == pixels[1]  # left, right of it
    found = []
    for below, right, reflex in _KINDS:
        convex = ~beside[below] & ~stacked[right]
        turns = beside[below] & stacked[right] & ~beside[1 - below] if reflex else convex
        found.append(np.flatnonzero(turns & (pixels[below, right] != IGNORED)))
    at = np.concatenate(found)
    return row[at], column[at], np.repeat(np.arange(len(_KINDS)), [len(one) for one in found])


def _partners(places: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Pair the ends of edges on the same line; return the index of each point's partner, -1 if it has none.

    Args:
        places: (n,) of the points, in the order of lines and along each line.
        starts: (n,) whether a point is the first end of an edge. Where an edge ends, the next may start.
    """
    order = np.argsort(2 * places + starts, kind="stable")
    ordered = starts[order]
    first = np.flatnonzero(ordered[:-1] & ~ordered[1:])
    partners = np.full(len(places), -1)
    partners[order[first]] = order[first + 1]
    partners[order[first + 1]] = order[first]
    return partners


def _walk(
    following: list[int], first: list[int], turns: int
) -> tuple[list[list[int]], list[int], list[int], list[list[int]]]:
    """Follow points until none is left.

    Args:
        following: the successor of each point, -1 if it is not known yet.
        first: the points without a predecessor.
        turns: points from this number on belong to open outlines.

    Returns:
        The walks that start at `first`; the closed walks over corners alone, one after the other, and the number of
        points of each; the other closed walks.
    """
    seen = bytearray(len(following))

    def follow(point: int) -> list[int]:
        points = []
        while point >= 0 and not seen[point]:
            seen[point] = 1
            points.append(point)
            point = following[point]
        return points

    open_walks = [follow(point) for point in first]
    plain: list[int] = []
    lengths: list[int] = []
    mixed: list[list[int]] = []
    for point in range(turns):
        if not seen[point]:
            points = follow(point)
            if max(points) < turns:
                plain += points
                lengths.append(len(points))
            else:
                mixed.append(points)
    return open_walks, plain, lengths, mixed


def part_touching(rings: Rings) -> Rings:
    """Part rings where they touch themselves, so that none meets a vertex twice."""
    x, y = rings.vertices.astype(np.int64).T
    width, height = (int(axis.max(initial=0)) + 1 for axis in (x, y))
    ordered = np.sort((rings.numbers * height + y) * width + x)
    touching = np.unique(ordered[:-1][ordered[:-1] == ordered[1:]] // (height * width))
    if not len(touching):
        return rings
    parts = [rings.select(np.setdiff1d(np.arange(len(rings.lengths)), touching))]
    starts = rings.starts
    for number in touching.tolist():
        for loop in _loops(rings.vertices[starts[number] : starts[number] + rings.lengths[number]].tolist()):
            parts.append(Rings(np.array(loop, np.int32), np.array([len(loop)]), rings.owners[number : number + 1]))
    return Rings.join(parts)


def _loops(vertices: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Return the loops of which a ring consists; none meets a vertex twice."""
    found = []
    path: list[tuple[int, int]] = []
    places: dict[tuple[int, int], int] = {}
    for x, y in vertices:
        if (met := places.get((x, y))) is not None:
            found.append(path[met:])
            for vertex in path[met + 1 :]:
                del places[vertex]
            del path[met + 1 :]
        else:
            places[x, y] = len(path)
            path.append((x, y))
    return [*found, path]
