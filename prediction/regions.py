"""Connected regions of equal class ids, found strip by strip from the top of an image to its bottom.

Pixels are connected along their sides. A region that spans several strips is one region, with all its pixels and holes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from prediction.outlines import find_corners
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
        corners: (m, 2) int32, where their outlines turn; see `prediction.outlines.find_corners`.
        owners: (m,) int64, the index of the region that each corner belongs to.
    """

    ids: np.ndarray
    pixels: np.ndarray
    sums: np.ndarray
    corners: np.ndarray
    owners: np.ndarray

    def select(self, which: np.ndarray) -> "Regions":
        """Return the regions with the indices `which`, (m,) in ascending order."""
        kept = np.isin(self.owners, which)
        owners = np.searchsorted(which, self.owners[kept])
        return Regions(self.ids[which], self.pixels[which], self.sums[:, which], self.corners[kept], owners)


class RegionTracer:
    """Finds the connected regions of an image, whose rows are added from top to bottom.

    Held are the corners and sums of open regions, which reach the last row that was added. Others are given out.

    Attributes:
        weights: how many weights each pixel has, to be summed over regions.
    """

    def __init__(self, width: int, weights: int = 0) -> None:
        """Start above the image; `width` is that of its rows."""
        self.weights = weights
        # of open regions, which are numbered from 1; entry 0 is no region
        self._ids = np.full(1, IGNORED, np.uint8)
        self._totals: np.ndarray = np.zeros((1 + weights, 1))  # pixels, and the sum of each weight
        self._corners: dict[int, bytearray] = {}  # 8 bytes each
        self._top = 0
        self._row = np.full(width, IGNORED, np.uint8)
        self._owners = np.zeros(width, np.int64)

    def add(self, ids: np.ndarray, weights: Sequence[np.ndarray] = ()) -> Iterator[Regions]:
        """Add rows (n, W) uint8, and as many of each weight, below those before; yield the regions that they complete.

        Pixels of id 255 belong to no region.
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
        corners, corner_owners = find_corners(np.vstack([self._row, ids]), np.vstack([self._owners, owners]))
        corners[:, 0] += self._top
        count = int(groups.max()) + 1
        group_ids = np.empty(count, np.uint8)
        group_ids[groups] = known_ids
        sums = np.stack([np.bincount(groups, one, count) for one in totals])
        self._row, self._top = ids[-1].copy(), self._top + len(ids)

        is_open = np.zeros(count, bool)
        is_open[groups[owners[-1]]] = True
        is_open[0] = True
        numbers = np.where(is_open, np.cumsum(is_open), np.cumsum(~is_open)) - 1  # among the open, or the others
        self._owners = numbers[groups[owners[-1]]]
        self._ids, self._totals = group_ids[is_open], sums[:, is_open]
        reached = groups[corner_owners]
        inside = is_open[reached]
        done: list[np.ndarray] = [corners[~inside]]
        done_owners = [numbers[reached[~inside]]]
        stores, self._corners = self._corners, {}
        for owner, store in stores.items():
            number = int(numbers[groups[owner]])
            if is_open[groups[owner]]:
                _add_store(self._corners, number, store)
            else:
                done.append(np.frombuffer(store, np.int32).reshape(-1, 2))
                done_owners.append(np.full(len(done[-1]), number))
        open_numbers = numbers[reached[inside]]
        order = np.argsort(open_numbers, kind="stable")
        each, first = np.unique(open_numbers[order], return_index=True)
        for number, part in zip(each.tolist(), np.split(corners[inside][order], first[1:]), strict=False):
            _add_store(self._corners, number, bytearray(part.tobytes()))
        pixels = np.rint(sums[0, ~is_open]).astype(np.int64)
        return Regions(
            group_ids[~is_open], pixels, sums[1:, ~is_open], np.concatenate(done), np.concatenate(done_owners)
        )


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
    groups = np.arange(total)
    while (groups[one] != groups[other]).any():
        least = np.minimum(groups[one], groups[other])
        for ends in (one, other):
            np.minimum.at(groups, groups[ends], least)
        while (groups != groups[groups]).any():
            groups = groups[groups]
    return (np.cumsum(groups == np.arange(total)) - 1)[groups]


def _add_store(stores: dict[int, bytearray], owner: int, store: bytearray) -> None:
    """Give `owner` the corners in `store`; the smaller store is copied."""
    small, large = sorted((stores.get(owner, bytearray()), store), key=len)
    large += small
    stores[owner] = large
