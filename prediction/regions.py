"""Connected regions of equal class ids, found strip by strip from the top of an image to its bottom.

Pixels are connected along their sides. A region that spans several strips is one region, with all its pixels and holes.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from prediction.outlines import OutlineTracer, Rings
from utils.classes import IGNORED

STRIP_PIXELS = 2**17
"""Pixels of a strip. Tracing it takes about 90 MB at most, where no two neighbours are equal."""


@dataclass
class Regions:
    """Complete regions.

    Attributes:
        ids: (n,) uint8, the class of each.
        pixels: (n,) int64.
        sums: (k, n) float64, of each weight over the region's pixels.
        rings: their outlines; a ring's owner is the region's index. The vertices of a ring may coincide where it
            touches itself.
    """

    ids: np.ndarray
    pixels: np.ndarray
    sums: np.ndarray
    rings: Rings

    def select(self, which: np.ndarray) -> "Regions":
        """Return the regions with the indices `which`, (m,) in ascending order."""
        rings = self.rings.select(np.flatnonzero(np.isin(self.rings.owners, which)))
        rings.owners = np.searchsorted(which, rings.owners)
        return Regions(self.ids[which], self.pixels[which], self.sums[:, which], rings)


@dataclass
class _RingStore:
    """Closed rings of one open region: 8 bytes for each vertex, 8 for each ring."""

    vertices: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("q"))

    def extend(self, other: "_RingStore") -> None:
        self.vertices += other.vertices
        self.lengths += other.lengths

    def rings(self, owner: int) -> Rings:
        vertices = np.frombuffer(self.vertices, np.int32).reshape(-1, 2)
        return Rings(vertices, np.array(self.lengths, np.int64), np.full(len(self.lengths), owner))


class RegionTracer:
    """Finds the connected regions of an image, whose rows are added from top to bottom.

    Held are the outlines and sums of open regions, which reach the last row that was added. Others are given out.

    Attributes:
        weights: how many weights each pixel has, to be summed over regions.
    """

    def __init__(self, width: int, weights: int = 0) -> None:
        """Start above the image; `width` is that of its rows."""
        self._outlines = OutlineTracer(width)
        self.weights = weights
        # of open regions, which are numbered from 1; entry 0 is no region
        self._ids = np.full(1, IGNORED, np.uint8)
        self._totals = np.zeros((1 + weights, 1))  # pixels, and the sum of each weight
        self._stores: dict[int, _RingStore] = {}
        self._row = np.full(width, IGNORED, np.uint8)
        self._owners = np.zeros(width, np.int64)

    def add(self, ids: np.ndarray, weights: Sequence[np.ndarray] = ()) -> Iterator[Regions]:
        """Add rows below those before; yield the regions that they complete.

        Args:
            ids: (n, W) uint8; pixels of id 255 belong to no region.
            weights: (n, W) each.
        """
        step = max(1, STRIP_PIXELS // ids.shape[1])
        for top in range(0, len(ids), step):
            rows = slice(top, top + step)
            yield self._add_strip(ids[rows], [one[rows] for one in weights])

    def finish(self) -> Regions:
        """Return the regions that reach the image's last row."""
        row = np.full((1, len(self._row)), IGNORED, np.uint8)
        return self._add_strip(row, [np.zeros(row.shape)] * self.weights)

    def _add_strip(self, ids: np.ndarray, weights: Sequence[np.ndarray]) -> Regions:
        """Add one strip; return the regions that it completes."""
        labels, count = _label(ids)
        held = len(self._ids)
        owners = np.where(labels > 0, labels + (held - 1), 0)  # 1..held - 1 are open regions of above
        total = held + count
        known_ids = np.concatenate([self._ids, np.empty(count, np.uint8)])
        known_ids[owners.ravel()] = ids.ravel()
        known_ids[0] = IGNORED
        totals = np.zeros((1 + self.weights, total))
        for k, values in enumerate([None, *(one.ravel() for one in weights)]):
            totals[k] = np.bincount(owners.ravel(), values, total)
        totals[:, 0] = 0  # weights without data are not a number
        totals[:, :held] += self._totals

        same = (self._row == ids[0]) & (ids[0] != IGNORED)
        groups = _groups(total, self._owners[same], owners[0][same])
        rings = self._outlines.trace(np.vstack([self._row, ids]), np.vstack([self._owners, owners]))
        rings.owners = groups[rings.owners]
        stores: dict[int, _RingStore] = {}
        for owner, store in self._stores.items():
            _add_store(stores, int(groups[owner]), store)

        count = int(groups.max()) + 1
        group_ids = np.empty(count, np.uint8)
        group_ids[groups] = known_ids
        sums = np.stack([np.bincount(groups, one, count) for one in totals])
        self._row, self._owners, self._stores = ids[-1].copy(), groups[owners[-1]], stores
        return self._part(group_ids, sums, rings)

    def _part(self, ids: np.ndarray, sums: np.ndarray, rings: Rings) -> Regions:
        """Keep the regions that reach the last row, and number them anew; return the others.

        Args:
            ids: (n,) the class of each region; region 0 is none.
            sums: (1 + k, n) pixels and sums of weights.
            rings: those of the last strip.
        """
        is_open = np.zeros(len(ids), bool)
        is_open[self._owners] = True
        is_open[0] = True
        numbers = np.where(is_open, np.cumsum(is_open), np.cumsum(~is_open)) - 1
        inside = is_open[rings.owners]
        done = [rings.select(np.flatnonzero(~inside))]
        done += [store.rings(owner) for owner, store in self._stores.items() if not is_open[owner]]
        self._stores = {owner: store for owner, store in self._stores.items() if is_open[owner]}
        for owner, store in _by_owner(rings.select(np.flatnonzero(inside))):
            _add_store(self._stores, owner, store)
        self._stores = {int(numbers[owner]): store for owner, store in self._stores.items()}
        self._owners = numbers[self._owners]
        self._ids, self._totals = ids[is_open], sums[:, is_open]
        complete = Rings.join(done)
        complete.owners = numbers[complete.owners]
        pixels = np.rint(sums[0, ~is_open]).astype(np.int64)
        return Regions(ids[~is_open], pixels, sums[1:, ~is_open], complete)


def _label(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the number of each pixel's region in a strip, (n, W) int32, 0 for id 255; and the number of regions."""
    height, width = ids.shape
    # pixels, and between them whether they are of one class: one pass labels all classes
    spread = np.zeros((2 * height - 1, 2 * width - 1), np.uint8)
    spread[::2, ::2] = ids != IGNORED
    spread[::2, 1::2] = (ids[:, :-1] == ids[:, 1:]) & (ids[:, 1:] != IGNORED)
    spread[1::2, ::2] = (ids[:-1] == ids[1:]) & (ids[1:] != IGNORED)
    count, labels = cv2.connectedComponents(spread, connectivity=4, ltype=cv2.CV_32S)
    return labels[::2, ::2], count - 1


def _groups(total: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Join regions that are connected; return the group of each, (total,) int64, counted from 0.

    Args:
        total: of regions, each with a number below it. Number 0 is group 0.
        one, other: (n,) numbers of regions that are connected.
    """
    parents = np.arange(total)

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for pair in np.unique(one * total + other).tolist():
        first, second = sorted((root(pair // total), root(pair % total)))
        parents[second] = first
    while (parents != parents[parents]).any():
        parents = parents[parents]
    return (np.cumsum(parents == np.arange(total)) - 1)[parents]


def _by_owner(rings: Rings) -> Iterator[tuple[int, _RingStore]]:
    """Yield each owner of `rings` with its rings."""
    ordered = rings.select(np.argsort(rings.owners, kind="stable"))
    owners, first = np.unique(ordered.owners, return_index=True)
    bounds = [*first.tolist(), len(ordered.lengths)]
    corners = np.append(ordered.starts, len(ordered.vertices))
    for owner, start, end in zip(owners.tolist(), bounds[:-1], bounds[1:], strict=True):
        vertices = ordered.vertices[corners[start] : corners[end]]
        yield owner, _RingStore(bytearray(vertices.tobytes()), array("q", ordered.lengths[start:end].tolist()))


def _add_store(stores: dict[int, _RingStore], owner: int, store: _RingStore) -> None:
    """Give `owner` the rings of `store`; the smaller store is copied."""
    large, small = store, stores.get(owner)
    if small is not None:
        if len(large.vertices) < len(small.vertices):
            large, small = small, large
        large.extend(small)
    stores[owner] = large
