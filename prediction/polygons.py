"""Vector layers: the regions of a mask as polygons, written through pyogrio and shapely, which are optional."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from dataset.failures import writing
from dataset.georeference import Georeference, GroundAreas, to_map
from prediction.outlines import part_touching
from prediction.polygon_options import DRIVERS, PolygonOptions, Quantity
from prediction.regions import Regions, RegionTracer
from utils.classes import Classes
from utils.tiling import Size

_PENDING_VERTICES = 2**18
"""Regions are written together when they have this number of vertices."""

_BATCH = 1000
"""Features that are converted to GeoJSON at a time."""


def _library() -> ModuleType:
    """Return pyogrio, which then logs nothing: what GDAL complains of is raised as well."""
    import pyogrio

    logging.getLogger("pyogrio").setLevel(logging.CRITICAL)
    return pyogrio


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
    ) -> None:
        """Write a layer without features.

        Args:
            path: of the file.
            size: of the mask.
            classes: what its ids mean.
            options: which regions are written, and how.
            reference: of the mask; without a place, polygons are in pixels.
            ground: areas of its pixels, if they are known.
            name: of the layer.
            probabilities: whether features have the mean probability of their class.
        """
        self.path, self.size, self.classes, self.options = path, size, classes, options
        self.features = 0
        self._ground, self._probabilities, self._name = ground, probabilities, name
        self._place = _placement(reference)
        self._crs = reference.keywords["crs"] if reference.keywords.get("crs") is not None else None
        self._tolerance = self._in_pixels(options.simplify)
        # GeoJSON cannot be added to in little memory: features are gathered in a GeoPackage
        self._package = path if options.kind == "gpkg" else path.with_name(f"{path.name}.gpkg")
        self._tracer = RegionTracer(size[1], (ground is not None) + probabilities)
        self._rows = 0
        self._pending: list[Regions] = []
        self._pending_vertices = 0
        self._write([])

    def _in_pixels(self, length: Quantity | None) -> float:
        if length is None:
            return 0.0
        if length.unit == "px" or self._ground is None:
            return length.value
        side = math.sqrt(self._ground.rows(self.size[0] // 2, 1)[0, self.size[1] // 2])
        return length.value / side

    def write(self, ids: np.ndarray, metres: np.ndarray | None, probabilities: np.ndarray | None) -> None:
        """Add rows.

        Args:
            ids: (n, W) uint8, 255 where there is no data.
            metres: (n, W) the pixels' square metres, if the ground is known.
            probabilities: (n_class, n, W), if they are wanted.
        """
        weights = [] if metres is None else [metres]
        if self._probabilities and probabilities is not None:
            own = np.minimum(ids, len(self.classes) - 1)[None]
            weights.append(np.take_along_axis(probabilities, own, 0)[0].astype(np.float64))
        for regions in self._tracer.add(ids, weights):
            self._take(regions)
        self._rows += len(ids)

    def close(self) -> None:
        """Write what is pending and finish the file, if all rows are there."""
        try:
            if self._rows == self.size[0]:
                self._take(self._tracer.finish())
                self._flush()
                if self._package != self.path:
                    self._convert()
        finally:
            if self._package != self.path:
                self._package.unlink(missing_ok=True)

    def _take(self, regions: Regions) -> None:
        least = self.options.min_area
        if least is not None:
            keep = (regions.pixels if least.unit == "px" else regions.sums[0]) >= least.value
            regions = regions.select(np.flatnonzero(keep))
        if len(regions.ids):
            self._pending.append(regions)
            self._pending_vertices += len(regions.rings.vertices)
        if self._pending_vertices >= _PENDING_VERTICES:
            self._flush()

    def _flush(self) -> None:
        regions, self._pending, self._pending_vertices = self._pending, [], 0
        if regions:
            self._write(regions)

    def _write(self, regions: list[Regions]) -> None:
        """Add the features of `regions`; make the file if there is none."""
        import shapely

        geometry = [shapely.to_wkb(self._geometry(one)) for one in regions]
        ids = np.concatenate([np.empty(0, np.uint8), *(one.ids for one in regions)])
        pixels = np.concatenate([np.empty(0, np.int64), *(one.pixels for one in regions)])
        sums = np.concatenate([np.empty((self._tracer.weights, 0)), *(one.sums for one in regions)], axis=1)
        fields: dict[str, np.ndarray] = {
            "class": ids.astype(np.int32),
            "name": np.array([self.classes.names[k] for k in ids.tolist()], object),
            "pixels": pixels,
            "square_metres": np.full(len(ids), np.nan) if self._ground is None else sums[0],
        }
        if self._probabilities:
            fields["mean_probability"] = sums[-1] / pixels
        with writing(self.path):
            _library().raw.write(
                str(self._package),
                np.concatenate([np.empty(0, object), *geometry]),
                list(fields.values()),
                list(fields),
                layer=self._name,
                driver=DRIVERS["gpkg"],
                geometry_type="Polygon",
                crs=None if self._crs is None else self._crs.to_wkt(),
                append=self._package.exists(),
            )
        self.features += len(ids)

    def _geometry(self, regions: Regions) -> np.ndarray:
        """Return the polygons of `regions` where the mask lies, (n,) of shapely's."""
        import shapely

        polygons = pixel_polygons(regions)
        if self._tolerance:
            simple = shapely.simplify(polygons, self._tolerance, preserve_topology=True)
            polygons = np.where(shapely.is_valid(simple) & ~shapely.is_empty(simple), simple, polygons)
        return shapely.transform(polygons, self._place)

    def _convert(self) -> None:
        """Write the GeoPackage's features as GeoJSON, in WGS 84 if the reference system is known."""
        pyogrio = _library()
        standard = {} if self._crs is None else {"RFC7946": "YES", "COORDINATE_PRECISION": "9"}
        with (
            writing(self.path),
            pyogrio.raw.open_arrow(str(self._package), layer=self._name, batch_size=_BATCH) as (meta, stream),
        ):
            pyogrio.raw.write_arrow(
                stream,
                str(self.path),
                layer=self._name,
                driver=DRIVERS["geojson"],
                geometry_name=meta["geometry_name"],
                geometry_type="Unknown",
                crs=meta["crs"],
                layer_options=standard,
            )


def count_features(path: Path) -> int | None:
    """Return how many features a layer has; None if it cannot be read."""
    try:
        return int(_library().read_info(str(path), force_feature_count=True)["features"])
    except Exception:  # GDAL's drivers raise many kinds
        return None


def _placement(reference: Georeference) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from pixel corners (n, 2), column and row, to coordinates of the mask's reference."""
    if not reference.keywords.keys() & {"transform", "gcps"}:
        return lambda corners: corners
    return lambda corners: np.stack(to_map(reference, corners[:, 1], corners[:, 0]), axis=1)


def pixel_polygons(regions: Regions) -> np.ndarray:
    """Return the polygons of regions in pixel coordinates: (n,) of shapely's, with holes, all valid."""
    import shapely

    rings = part_touching(regions.rings)
    corners = rings.vertices.astype(np.int64)
    following = np.arange(1, len(corners) + 1)
    following[rings.starts + rings.lengths - 1] = rings.starts
    x, y = corners.T
    doubled = np.add.reduceat(x * y[following] - x[following] * y, rings.starts)
    ordered = rings.select(np.lexsort((doubled > 0, rings.owners)))  # first the outer one, against the clock
    shapes = shapely.linearrings(ordered.vertices.astype(np.float64), indices=ordered.numbers)
    polygons: np.ndarray = shapely.polygons(shapes, indices=ordered.owners)
    return polygons
