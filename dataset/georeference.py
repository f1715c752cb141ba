"""Where on the ground a file lies, and how large its pixels are there."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset import raster
from dataset.failures import reading
from dataset.planes import TURNS
from dataset.probe import FileInfo
from utils.tiling import Box, Size
from utils.turns import Turn

_AXIS, _FLATTENING = 6378137.0, 1 / 298.257223563
"""WGS 84: the equatorial radius in metres, and the flattening."""

_NODES = 65
"""Along each side of an image, how many pixels' areas are computed at most; others are interpolated."""


@dataclass(frozen=True)
class Georeference:
    """Where on the ground a raster lies; of rasterio's types, nothing where the file has none.

    `keywords` are what `RasterWriter` takes to write it: `crs` with `transform` or `gcps`, or `rpcs`. `lost` says in
    a few words what is not kept and why, "" where all is.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    lost: str = ""


def read_georeference(info: FileInfo) -> Georeference:
    """Read the georeference of a file as displayed; raises InputError, naming the file, where it cannot be read.

    Without rasterio, a georeference that lies in a TIFF is refused, and one beside a picture is `lost`.
    """
    if not info.georeference:
        return Georeference()
    if info.georeference != "tags" and not raster.installed():
        return Georeference({}, "it takes the package rasterio, which is not installed: pip install rasterio")
    with raster.open_file(info.path) as file, reading(info.path):
        turn = TURNS[info.orientation]
        points, points_crs = file.gcps
        crs, rpcs = file.crs, file.rpcs
        plain = file.transform.is_identity and crs is None
        transform = file.transform * _to_stored(turn, info.stored)
        points = _turned_points(points, turn, info.stored)
    if points and points_crs:
        return Georeference({"gcps": points, "crs": points_crs})
    if not plain:
        return Georeference({"crs": crs, "transform": transform})
    if rpcs is not None and turn == Turn():
        return Georeference({"rpcs": rpcs})
    if rpcs is not None:
        return Georeference({}, "its rational polynomials are those of the picture before it is turned for display")
    return Georeference({}, "its control points name no reference system" if points else "GDAL finds none in it")


def _to_stored(turn: Turn, stored: Size) -> Any:
    """Return the affine map from (column, row) of the displayed image to those of the stored one."""
    from rasterio.transform import Affine

    origin, right, below = (turn.origin(Box(top, left, 1, 1), stored) for top, left in ((0, 0), (0, 1), (1, 0)))
    a, d = right.left - origin.left, right.top - origin.top
    b, e = below.left - origin.left, below.top - origin.top
    return Affine(a, b, origin.left + 0.5 - (a + b) / 2, d, e, origin.top + 0.5 - (d + e) / 2)


def _turned_points(points: list[Any], turn: Turn, stored: Size) -> list[Any]:
    from rasterio.control import GroundControlPoint

    to_displayed = ~_to_stored(turn, stored)
    found = []
    for point in points:
        column, row = to_displayed * (point.col, point.row)
        found.append(GroundControlPoint(row, column, point.x, point.y, point.z, point.id, point.info))
    return found


class GroundAreas:
    """Square metres on the ground of each pixel of an image, by the ellipsoid, whatever its reference's units are.

    Areas vary smoothly, so that those of at most 65 x 65 pixels are computed and the others interpolated.
    """

    def __init__(self, size: Size, nodes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        self.size, self._nodes, self._rows, self._columns = size, nodes, rows, columns

    @classmethod
    def of(cls, reference: Georeference, size: Size) -> "GroundAreas | None":
        """Return the areas of an image of `size`, None where its reference does not say where on the Earth it lies."""
        if "crs" not in reference.keywords or reference.keywords["crs"] is None:
            return None
        rows, columns = (np.unique(np.linspace(0.5, side - 0.5, min(side, _NODES))) for side in size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nodes: np.ndarray | None = _node_areas(reference, rows, columns)
        except Exception:  # PROJ raises many kinds for references that have no place on the Earth
            nodes = _plane_areas(reference, rows, columns)
        return None if nodes is None or not np.isfinite(nodes).all() else cls(size, nodes, rows, columns)

    def rows(self, top: int, count: int) -> np.ndarray:
        """Return (count, W) float64 square metres of the pixels of `count` rows from `top` on."""
        at = np.arange(top, top + count) + 0.5
        across = np.arange(self.size[1]) + 0.5
        down = np.stack([np.interp(at, self._rows, column) for column in self._nodes.T], axis=1)
        return np.stack([np.interp(across, self._columns, row) for row in down])


def to_map(reference: Georeference, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y in the reference of points, given by continuous pixel coordinates."""
    if "gcps" in reference.keywords:
        from rasterio.transform import GCPTransformer

        with GCPTransformer(reference.keywords["gcps"]) as transformer:
            x, y = transformer.xy(rows, columns, offset="ul")
        return np.asarray(x), np.asarray(y)
    return reference.keywords["transform"] * (columns, rows)


def _node_areas(reference: Georeference, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return (len(rows), len(columns)): the Jacobian from pixels to longitude and latitude, on the ellipsoid."""
    from rasterio.warp import transform

    shape = len(rows), len(columns)
    centre = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
    steps = ((0.0, 0.5), (0.0, -0.5), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.0))
    every = [np.concatenate([axis + step[k] for step in steps]) for k, axis in enumerate(centre)]
    x, y = to_map(reference, *every)
    found = transform(reference.keywords["crs"], "EPSG:4326", x.tolist(), y.tolist())
    longitude, latitude = (np.radians(np.asarray(axis)).reshape(5, *shape) for axis in found)
    # across the date line, too
    down, right = ((step + math.pi) % (2 * math.pi) - math.pi for step in longitude[0:4:2] - longitude[1:4:2])
    jacobian = down * (latitude[2] - latitude[3]) - right * (latitude[0] - latitude[1])
    squared = _FLATTENING * (2 - _FLATTENING)
    bend = 1 - squared * np.sin(latitude[4]) ** 2
    # radii of curvature along the meridian and across it
    return np.abs(jacobian) * _AXIS**2 * (1 - squared) / bend**2 * np.cos(latitude[4])


def _plane_areas(reference: Georeference, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
    """Return the areas in the plane of a projection that has a unit of length, but no known place on the Earth."""
    crs, transform = reference.keywords["crs"], reference.keywords.get("transform")
    if transform is None or not crs.is_projected:
        return None
    unit = crs.linear_units_factor[1]
    return np.full((len(rows), len(columns)), abs(transform.determinant) * unit**2)
