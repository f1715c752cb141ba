"""Outlines of regions of pixels, from the corners at which they turn, as polygons.

The corners on one line of the pixel grid are the ends of the edges there, which gives each corner its successor.
"""

from array import array
from itertools import product

import numpy as np

from utils.classes import IGNORED

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


def find_corners(ids: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the corners at the vertices between rows.

    Args:
        ids: (n + 1, W) uint8. Pixels of id 255 belong to no region.
        owners: (n + 1, W) int64, the number of the region of each pixel.

    Returns:
        (m, 2) int32: the row of the vertex, counted from the line between the first two rows, and 8 times its column
        plus the kind of the corner; and (m,) the number of the region that the corner belongs to.
    """
    padded = np.pad(ids, ((0, 0), (1, 1)), constant_values=IGNORED)
    plain = padded[:-1, :-1] == padded[:-1, 1:]
    plain &= padded[1:, :-1] == padded[1:, 1:]
    plain &= padded[:-1, :-1] == padded[1:, :-1]
    row, column = np.nonzero(~plain)
    pixels = np.array([[padded[row + below, column + right] for right in (0, 1)] for below in (0, 1)])
    beside = pixels[:, 0] == pixels[:, 1]  # above, below the vertex
    stacked = pixels[0] == pixels[1]  # left, right of it
    corners, pixel_owners = [], []
    for kind, (below, right, reflex) in enumerate(_KINDS):
        convex = ~beside[below] & ~stacked[right]
        turns = beside[below] & stacked[right] & ~beside[1 - below] if reflex else convex
        at = np.flatnonzero(turns & (pixels[below, right] != IGNORED))
        corners.append(np.stack([row[at], 8 * column[at] + kind], axis=1).astype(np.int32))
        pixel_owners.append(owners[row[at] + below, column[at] - 1 + right])
    return np.concatenate(corners), np.concatenate(pixel_owners)


def outline_polygons(corners: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return the polygons of regions in pixel coordinates: (n,) of shapely's, with holes, all valid.

    Args:
        corners: (m, 2) all corners of the regions; see `find_corners`.
        owners: (m,) the number of each one's region, 0..n-1.
    """
    import shapely

    y, x, kind = corners[:, 0].astype(np.int64), corners[:, 1].astype(np.int64) // 8, corners[:, 1] % 8
    height, width = y.max(initial=0) + 1, x.max(initial=0) + 1
    across = _partners((2 * y + _BELOW[kind]) * width + x, _STARTS_X[kind])
    down = _partners((2 * x + _RIGHT[kind]) * height + y, _STARTS_Y[kind])
    following = np.where(_LEAVES_X[kind], across, down)  # of each corner, the next one along its outline
    order, ring = _follow(following)
    places = (ring * height + y[order]) * width + x[order]
    by_place = np.argsort(places)
    twice = np.flatnonzero(np.diff(places[by_place]) == 0)
    if len(twice):  # there a ring meets itself and is parted: its two corners at the vertex change their successors
        one, other = order[by_place[twice]], order[by_place[twice + 1]]
        following[one], following[other] = following[other], following[one]
        order, ring = _follow(following)
    _, starts = np.unique(ring, return_index=True)
    after = following[order]
    doubled = np.add.reduceat(x[order] * y[after] - x[after] * y[order], starts)
    rings = shapely.linearrings(np.stack([x, y], axis=1)[order].astype(np.float64), indices=ring)
    outer_first = np.lexsort((doubled > 0, owners[order[starts]]))  # an outer ring runs against the clock
    polygons: np.ndarray = shapely.polygons(rings[outer_first], indices=owners[order[starts]][outer_first])
    return polygons


def _partners(places: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Pair the ends of edges on the same line; return the index of each one's partner.

    Args:
        places: (n,) of the ends, in the order of lines and along each line.
        starts: (n,) whether it is the first end of an edge. Where an edge ends, the next may start.
    """
    order = np.argsort(2 * places + starts)
    partners = np.empty(len(order), np.int64)
    partners[order[::2]], partners[order[1::2]] = order[1::2], order[::2]
    return partners


def _follow(following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all points, ring after ring, each before the one `following` it; and the number of each one's ring."""
    successors, left = following.data, bytearray(b"\1") * len(following)
    order, lengths = array("q"), array("q")
    point = left.find(1)
    while point >= 0:
        first, before = point, len(order)
        while left[point]:
            left[point] = 0
            order.append(point)
            point = successors[point]
        lengths.append(len(order) - before)
        point = left.find(1, first)
    return np.array(order), np.repeat(np.arange(len(lengths)), lengths)
