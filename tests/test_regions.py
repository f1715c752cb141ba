"""Regions traced strip by strip are those of the whole mask: outlines, holes, pixels and sums; memory stays bounded."""

import tracemalloc
from collections import deque

import numpy as np
import pytest

from prediction import regions as module
from prediction.outlines import outline_polygons
from prediction.regions import Regions, RegionTracer
from utils.classes import IGNORED

shapely = pytest.importorskip("shapely")
features = pytest.importorskip("rasterio.features")


def by_strips(ids: np.ndarray, rows: int, strip_pixels: int, *weights: np.ndarray) -> list[Regions]:
    """The regions of a mask that is added in parts of some rows, and traced in strips of some pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRIP_PIXELS", strip_pixels)
        tracer = RegionTracer(ids.shape[1], len(weights))
        parts = [slice(top, top + rows) for top in range(0, len(ids), rows)]
        found = [one for part in parts for one in tracer.add(ids[part], [weight[part] for weight in weights])]
        return [one for one in (*found, tracer.finish()) if len(one.ids)]


def polygons_of(found: Regions) -> np.ndarray:
    return outline_polygons(found.corners, found.owners)


def normal(every: list[tuple[int, object]]) -> list[tuple[int, bytes]]:
    """Class and normal form of regions, sorted."""
    return sorted((int(k), shapely.to_wkb(shapely.normalize(shape))) for k, shape in every)


def random_mask(seed: int) -> np.ndarray:
    """Of any size, noisy or in blocks, with or without pixels that are left out."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rng.integers(1, 5), rng.integers(1, 30, 2)).astype(np.uint8)
    ids = np.kron(ids, np.ones(rng.integers(1, 4, 2), np.uint8))
    ids[rng.random(ids.shape) < rng.choice([0, 0.1, 0.9])] = IGNORED
    return ids


def spiral(side: int) -> np.ndarray:
    """One region that winds to the middle, one pixel wide, and another between its arms."""
    ids = np.ones((side, side), np.uint8)
    row, column, step, turn = 0, 0, side - 1, 0
    while step > 0:
        for _ in range(step):
            ids[row, column] = 0
            row, column = row + (0, 1, 0, -1)[turn % 4], column + (1, 0, -1, 0)[turn % 4]
        turn += 1
        if turn > 2 and turn % 2:
            step -= 2
    return ids


MASKS = {
    "pixel": np.zeros((1, 1), np.uint8),
    "row": np.arange(9, dtype=np.uint8)[None] % 2,
    "column": np.arange(9, dtype=np.uint8)[:, None] % 2,
    "checks": (np.indices((12, 13)).sum(0) % 2).astype(np.uint8),
    "comb": np.array([[1, 1, 1], [1, 0, 1]], np.uint8)[:, [0, 1] * 8],
    "holes": np.pad((np.indices((15, 15)).sum(0) % 2).astype(np.uint8), 3),
    "rings": np.add.outer(np.abs(np.arange(-9, 10)), np.zeros(19)).clip(np.abs(np.arange(-9, 10))).astype(np.uint8) % 2,
    "spiral": spiral(25),
    "last id": np.full((4, 5), 254, np.uint8),
}


@pytest.mark.parametrize("rows", [1, 4])
def test_regions_of_any_strips_are_those_of_the_whole_mask(rows: int) -> None:
    for name, ids in (*MASKS.items(), *((seed, random_mask(seed)) for seed in range(16))):
        found = by_strips(ids, rows, 2 * ids.shape[1])
        polygons = [(k, shape) for one in found for k, shape in zip(one.ids, polygons_of(one), strict=True)]
        shapes = features.shapes(ids, mask=ids != IGNORED, connectivity=4)  # what GDAL finds in the whole mask
        assert normal(polygons) == normal([(k, shapely.geometry.shape(shape)) for shape, k in shapes]), name


@pytest.mark.parametrize("mask", range(3))
def test_pixels_are_the_polygons_areas_and_weights_are_summed_where_they_lie(mask: int) -> None:
    ids = random_mask(mask)
    row, column = np.indices(ids.shape).astype(float)
    row[ids == IGNORED] = np.nan
    for one in by_strips(ids, 3, 2 * ids.shape[1], row, column):
        shapes = polygons_of(one)
        assert shapely.is_valid(shapes).all()
        assert shapely.area(shapes).tolist() == one.pixels.tolist()
        centres = shapely.get_coordinates(shapely.centroid(shapes))  # the means of pixel centres
        np.testing.assert_allclose(one.sums[::-1] / one.pixels + 0.5, centres.T, rtol=1e-9)


def test_a_region_over_all_strips_is_one_with_its_holes() -> None:
    ids = np.zeros((200, 40), np.uint8)
    ids[3:-3:4, 3:-3:4] = 1
    (ground,) = (one for one in by_strips(ids, 7, 2 * 40) if 0 in one.ids)
    (shape,) = polygons_of(ground.select(np.flatnonzero(ground.ids == 0)))
    holes = int((ids == 1).sum())
    assert (len(shape.interiors), shape.area) == (holes, ids.size - holes)


def test_memory_does_not_grow_with_the_height_where_regions_end() -> None:
    def peak(height: int) -> int:
        """Bytes that tracing a mask of small regions takes at most."""
        tracer, rng = RegionTracer(320), np.random.default_rng(0)
        tracemalloc.start()
        for _ in range(0, height, 64):
            ids = np.kron(rng.integers(0, 6, (8, 40)), np.ones((8, 8))).astype(np.uint8)
            ids[0] = IGNORED  # no region is higher
            deque(tracer.add(ids), 0)
        tracer.finish()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(64)
    assert peak(1280) < 1.1 * peak(256)


def test_an_open_region_holds_its_vertices_in_8_bytes_each() -> None:
    tracer = RegionTracer(200)
    rows = np.zeros((40, 200), np.uint8)
    rows[1::2, 1::2] = 1
    sizes = []
    tracemalloc.start()
    for _ in range(4):
        deque(tracer.add(rows), 0)
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    holes = 3 * int(rows.sum())
    assert sizes[-1] - sizes[0] < 1.3 * holes * (4 * 8 + 8)  # 4 vertices, and their number
