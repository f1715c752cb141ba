"""Vector layers: the regions of a mask as polygons, written through pyogrio and shapely, which are optional."""

import logging
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from imaging.failures import not_written, writing
from imaging.georeference import Georeference, GroundAreas, to_degrees, to_map
from prediction.geojson import GeoJsonFile
from prediction.outlines import outline_polygons
from prediction.polygon_options import PolygonOptions
from prediction.regions import Regions, RegionTracer
from utils.classes import Classes
from utils.errors import InputError
from utils.tiling import Size

_PENDING_VERTICES = 2**18
"""Regions are written together when they have this number of vertices."""

_NODES = 9
"""Along each side of an image, how many places are tried to find out which edges bend."""


class PolygonWriter:
    """A layer with a feature for each region of a mask, whose rows are added from top to bottom; to be closed.

    Attributes:
        features: how many are written.
    """

    def __init__(
        self,
        path: Path,
        size: Size,
        classes: Classes,
        options: PolygonOptions,
        reference: Georeference,
        ground: GroundAreas | None,
        *,
        name: str,
        probabilities: bool,
        measures: tuple[str, ...] = (),
    ) -> None:
        """Write a layer without features.

        Without a place in `reference`, polygons are in pixels. `ground` are the areas of pixels, if they are known;
        `probabilities` says whether features have the mean probability of their class, `measures` are the names of the
        measures of uncertainty of which they have the means.
        """
        self.path, self.size, self.classes, self.options = path, size, classes, options
        self.features = 0
        self._ground, self._probabilities, self._name = ground, probabilities, name
        self._place: Callable[[np.ndarray], np.ndarray] = lambda corners: corners  # (n, 2), column and row
        if reference.keywords.keys() & {"transform", "gcps"}:
            self._place = lambda corners: np.stack(to_map(reference, corners[:, 1], corners[:, 0]), axis=1)
        self._crs = reference.keywords.get("crs")
        as_text = options.kind == "geojson"
        self._edge = longest_edge(self._place, size, self._crs if as_text else None)
        self._text = GeoJsonFile(path, name, self._crs) if as_text else None
        # SQLite in GDAL cuts names off at a semicolon
        self._package = path.with_name(path.name.replace(";", "_"))
        self._measures = (("probability",) if probabilities else ()) + measures
        self._tracer = RegionTracer(size[1], (ground is not None) + len(self._measures))
        self._rows = 0
        self._pending: list[Regions] = []
        self._pending_vertices = 0
        if self._text is None:
            self._flush()

    def write(
        self,
        ids: np.ndarray,
        metres: np.ndarray | None,
        probabilities: np.ndarray | None,
        uncertainty: np.ndarray | None = None,
    ) -> None:
        """Add rows: ids (n, W) uint8, 255 without data; (n, W) square metres, if known; probabilities; measures."""
        weights = [] if metres is None else [metres]
        if self._probabilities and probabilities is not None:
            own = np.minimum(ids, len(self.classes) - 1)[None]
            weights.append(np.take_along_axis(probabilities, own, 0)[0].astype(np.float64))
        if uncertainty is not None:
            weights.extend(uncertainty / 255)
        for regions in self._tracer.add(ids, weights):
            self._take(regions)
        self._rows += len(ids)

    def close(self) -> None:
        """Write what is pending and finish the file, if all rows are there."""
        try:
            if self._rows == self.size[0]:
                self._take(self._tracer.finish())
                if self._pending:
                    self._flush()
                if self._text is None:
                    self._read_back()
                    self._package.replace(self.path)
        finally:
            if self._text is not None:
                self._text.close()
            elif self._package != self.path:
                self._package.unlink(missing_ok=True)

    def _take(self, regions: Regions) -> None:
        least = self.options.min_area
        if least is not None:
            keep = (regions.pixels if least.unit == "px" else regions.sums[0]) >= least.value
            regions = regions.select(np.flatnonzero(keep))
        if len(regions.ids):
            self._pending.append(regions)
            self._pending_vertices += len(regions.corners)
        if self._pending_vertices >= _PENDING_VERTICES:
            self._flush()

    def _flush(self) -> None:
        """Add the features of the regions that are pending, be there none."""
        regions, self._pending, self._pending_vertices = self._pending, [], 0
        polygons = np.concatenate([np.empty(0, object), *(self._geometry(one) for one in regions)])
        ids = np.concatenate([np.empty(0, np.uint8), *(one.ids for one in regions)])
        pixels = np.concatenate([np.empty(0, np.int64), *(one.pixels for one in regions)])
        sums = np.concatenate([np.empty((self._tracer.weights, 0)), *(one.sums for one in regions)], axis=1)
        fields: dict[str, np.ndarray] = {
            "class": ids.astype(np.int32),
            "name": np.array([self.classes.names[k] for k in ids.tolist()], object),
            "pixels": pixels,
            "square_metres": np.full(len(ids), np.nan) if self._ground is None else sums[0],
        }
        for name, values in zip(self._measures, sums[len(sums) - len(self._measures) :], strict=True):
            fields[f"mean_{name}"] = values / pixels
        if self._text is None:
            self._add(polygons, fields)
        else:
            values = {name: [None if v != v else v for v in column.tolist()] for name, column in fields.items()}  # NaN
            self._text.write(polygons, values)
        self.features += len(ids)

    def _add(self, polygons: np.ndarray, fields: dict[str, np.ndarray]) -> None:
        """Add features to the GeoPackage; make the file if there is none."""
        import pyogrio
        import shapely

        logging.getLogger("pyogrio").setLevel(logging.CRITICAL)  # what GDAL complains of is raised as well
        with writing(self.path):
            pyogrio.raw.write(
                str(self._package),
                shapely.to_wkb(polygons),
                list(fields.values()),
                list(fields),
                layer=self._name,
                driver="GPKG",
                geometry_type="Polygon",
                crs=None if self._crs is None else self._crs.to_wkt(),
                append=self._package.exists(),
            )

    def _read_back(self) -> None:
        """Raise InputError if the GeoPackage is not whole."""
        table = self._name.replace('"', '""')
        with writing(self.path), closing(sqlite3.connect(self._package)) as file:
            (state,) = file.execute("PRAGMA quick_check(1)").fetchone()
            (count,) = file.execute(f'SELECT count(*) FROM "{table}"').fetchone()
        if (state, count) != ("ok", self.features):
            raise not_written(self.path, "what was written cannot be read back")

    def _geometry(self, regions: Regions) -> np.ndarray:
        """Return the polygons of `regions` where the mask lies, (n,) of shapely's."""
        import shapely

        polygons = outline_polygons(regions.corners, regions.owners)
        if self._edge < max(self.size):
            polygons = shapely.segmentize(polygons, self._edge)
        return shapely.transform(polygons, self._place)


def layer_name(name: str) -> str:
    """Return a name that GDAL takes for a layer: `name`, unless it begins with a sign or a reserved word."""
    reserved = name.startswith(("gpkg", "ogr_empty_table")) or name.lower().startswith("sqlite_")
    sign = name[:1].isascii() and not name[:1].isalnum() and name[:1] not in "_ "
    return f"layer_{name}" if reserved or sign else name


def check_closed(path: Path) -> None:
    """Raise InputError if another program has the GeoPackage at `path` open, or left its journal there.

    SQLite would apply that journal to a new file of this name.
    """
    for journal in (path.with_name(f"{path.name}{ending}") for ending in ("-wal", "-journal")):
        if path.suffix == ".gpkg" and journal.exists():
            raise InputError(
                f"{path} cannot be written: another program has it open, or left {journal.name} beside it; close it "
                "there, or remove that file",
                "in use",
            )


def longest_edge(place: Callable[[np.ndarray], np.ndarray], size: Size, crs: Any) -> float:
    """Return how long an edge may be, in pixels, so that its middle lies at most a tenth of a pixel from its place.

    `place` makes coordinates of pixel corners (n, 2), column and row; `crs` is theirs, if they become longitudes and
    latitudes.
    """

    def position(corners: np.ndarray) -> np.ndarray:
        placed = place(corners)
        return placed if crs is None else np.stack(to_degrees(crs, *placed.T), axis=1)

    def step(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        found = other - one
        if crs is not None:
            found[:, 0] = (found[:, 0] + 180) % 360 - 180
        return found

    longest = float(max(size))
    while longest > 1:
        worst = 0.0
        for axis in (0, 1):
            half = np.eye(2)[axis] * min(longest, size[1 - axis]) / 2
            spans = [np.linspace(h, side - h, _NODES) for h, side in zip(half, size[::-1], strict=True)]
            middle = np.stack(np.meshgrid(*spans), axis=-1).reshape(-1, 2)
            at = position(middle)
            off = (step(at, position(middle - half)) + step(at, position(middle + half))) / 2
            pixel = np.stack([step(position(middle - h), position(middle + h)) for h in np.eye(2) / 2], axis=-1)
            known = np.isfinite(off).all(1) & np.isfinite(pixel).all((1, 2))
            known[known] = np.linalg.det(pixel[known]) != 0
            if not known.all() and longest > max(size) / (2 * _NODES):
                worst = math.inf  # its ends are off the Earth
            elif known.any():
                bends = np.linalg.solve(pixel[known], off[known, :, None])
                worst = max(worst, float(np.linalg.norm(bends, axis=1).max()))
        if worst <= 0.1:
            break
        longest /= 2
    return longest
