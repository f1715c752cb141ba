"""Where on the ground a file lies, and how large its pixels are there."""

import functools
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imaging import raster
from imaging.failures import reading
from imaging.planes import TURNS
from imaging.probe import FileInfo
from utils.errors import InputError
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

    def spell(self) -> str:
        """Return all that `keywords` hold, as text."""
        texts = []
        for name, value in sorted(self.keywords.items()):
            if name == "gcps":
                value = [(one.row, one.col, one.x, one.y, one.z) for one in value]
            elif name == "rpcs":
                value = value.to_dict()
            elif name == "crs" and value is not None:
                value = value.to_string()
            texts.append(f"{name} {tuple(value) if name == 'transform' else value}")
        return "; ".join(texts)


def read_georeference(info: FileInfo) -> Georeference:
    """Read the georeference of a file as displayed; raises InputError, naming the file, where it cannot be read.

    Without rasterio, a georeference that lies in a TIFF is refused, and one beside a picture is `lost`.
    """
    if not info.georeference:
        return Georeference()
    if info.georeference != "tags" and not raster.installed():
        return Georeference({}, "it takes the package rasterio, which is not installed: pip install rasterio")
    check_proj()
    with raster.open_file(info.path) as file, reading(info.path):
        turn = TURNS[info.orientation]
        points, points_crs = file.gcps
        crs, rpcs = file.crs, file.rpcs
        plain = file.transform.is_identity and crs is None
        to_stored = _to_stored(turn, info.stored)
        transform = file.transform * to_stored
        for point in points:
            point.col, point.row = ~to_stored * (point.col, point.row)
    if points and points_crs:
        return Georeference({"gcps": points, "crs": points_crs})
    if not plain:
        return Georeference({"crs": crs, "transform": transform})
    if rpcs is not None:
        lost = "its rational polynomials are those of the picture before it is turned for display"
        return Georeference({"rpcs": rpcs}) if turn == Turn() else Georeference({}, lost)
    return Georeference({}, "its control points name no reference system" if points else "GDAL finds none in it")


@functools.cache
def check_proj() -> None:
    """Raise InputError if PROJ, by which GDAL knows reference systems, does not work: masks would lie elsewhere."""
    from rasterio.warp import transform

    try:
        (longitude,), (latitude,) = transform("EPSG:32633", "EPSG:4326", [500000.0], [5000000.0])
        reason = "" if math.hypot(longitude - 15, latitude - 45.153477183) < 1e-6 else "it computes wrong places"
    except Exception as error:  # PROJ raises many kinds
        reason = str(error).splitlines()[0]
    if reason:
        named = [f"{name}={os.environ[name]}" for name in ("PROJ_LIB", "PROJ_DATA") if name in os.environ]
        mend = f"unset {', '.join(named)}, which belongs to another installation" if named else "install rasterio anew"
        raise InputError(f"PROJ, which rasterio needs for reference systems, does not work: {reason}; {mend}")


def same_place(reference: Georeference, file: Any, size: Size) -> bool:
    """Return whether an open dataset of rasterio's has the reference that it was written with, as far as that shows."""
    asked = reference.keywords
    if "gcps" in asked:
        points, crs = file.gcps
        if len(points) != len(asked["gcps"]):
            return False
        found = Georeference({"gcps": points})
    elif "transform" in asked:
        crs, found = file.crs, Georeference({"transform": file.transform})
    else:
        return "rpcs" not in asked or file.rpcs is not None
    rows, columns = (np.array([0, 0, 0.5, 1, 1]) * size[0], np.array([0, 1, 0.5, 0, 1]) * size[1])
    before, after = (np.stack(to_map(one, rows, columns)) for one in (reference, found))
    pixel = np.hypot(*(before[:, :1] - before[:, 4:])) / math.hypot(*size)
    if not np.allclose(before, after, rtol=0, atol=0.01 * pixel):
        return False
    if asked.get("crs") is None or crs is None:
        return not asked.get("crs") and not crs
    if asked["crs"] == crs:
        return True
    own, other = (np.stack(to_degrees(one, *before)) for one in (asked["crs"], crs))
    return np.allclose(own, other, rtol=0, atol=1e-7, equal_nan=True)


def to_degrees(crs: Any, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude in WGS 84 of points in `crs`, (n,) each; NaN where a point has no place on Earth.

    Longitudes of a reference in degrees may lie beyond 180.
    """
    from rasterio.warp import transform

    if not len(x):
        return np.empty(0), np.empty(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            longitude, latitude = map(np.asarray, transform(crs, "EPSG:4326", x.tolist(), y.tolist()))
    except Exception:  # of one point or of all: PROJ raises many kinds
        if len(x) == 1 or crs.to_wkt().startswith(("LOCAL_CS", "ENGCRS")):
            return np.full(len(x), np.nan), np.full(len(x), np.nan)
        halves = (to_degrees(crs, *half) for half in zip(np.array_split(x, 2), np.array_split(y, 2), strict=True))
        longitude, latitude = map(np.concatenate, zip(*halves, strict=True))
    valid = np.isfinite(longitude) & np.isfinite(latitude)
    return np.where(valid, longitude, np.nan), np.where(valid, latitude, np.nan)


def _to_stored(turn: Turn, stored: Size) -> Any:
    """Return the affine map from (column, row) of the displayed image to those of the stored one."""
    from rasterio.transform import Affine

    origin, right, below = (turn.origin(Box(top, left, 1, 1), stored) for top, left in ((0, 0), (0, 1), (1, 0)))
    a, d = right.left - origin.left, right.top - origin.top
    b, e = below.left - origin.left, below.top - origin.top
    return Affine(a, b, origin.left + 0.5 - (a + b) / 2, d, e, origin.top + 0.5 - (d + e) / 2)


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
        nodes = _node_areas(reference, rows, columns)
        return cls(size, nodes, rows, columns) if np.isfinite(nodes).all() else None

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
    shape = len(rows), len(columns)
    centre = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
    steps = ((0.0, 0.5), (0.0, -0.5), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.0))
    every = [np.concatenate([axis + step[k] for step in steps]) for k, axis in enumerate(centre)]
    found = to_degrees(reference.keywords["crs"], *to_map(reference, *every))
    longitude, latitude = (np.radians(axis).reshape(5, *shape) for axis in found)
    # across the date line, too
    down, right = ((step + math.pi) % (2 * math.pi) - math.pi for step in longitude[0:4:2] - longitude[1:4:2])
    jacobian = down * (latitude[2] - latitude[3]) - right * (latitude[0] - latitude[1])
    squared = _FLATTENING * (2 - _FLATTENING)
    bend = 1 - squared * np.sin(latitude[4]) ** 2
    # radii of curvature along the meridian and across it
    return np.abs(jacobian) * _AXIS**2 * (1 - squared) / bend**2 * np.cos(latitude[4])
