"""Vector layers: the regions of a mask as polygons, written through pyogrio and shapely, which are optional."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from dataset.failures import writing
from dataset.georeference import Georeference, GroundAreas, to_map
from prediction.outlines import part_touching
from prediction.regions import Regions, RegionTracer
from utils.classes import Classes
from utils.errors import InputError
from utils.tiling import Size

DRIVERS = {"gpkg": "GPKG", "geojson": "GeoJSON"}
"""GDAL's drivers of the formats, which are the suffixes of their files."""

PACKAGES = ("pyogrio", "shapely")

_PENDING_VERTICES = 2**18
"""Regions are written together when they have this number of vertices."""

_BATCH = 1000
"""Features that are converted to GeoJSON at a time."""


@dataclass(frozen=True)
class Quantity:
    """A length or an area with its unit, `px`, `m` or `m2`."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"

    @classmethod
    def parse(cls, text: str, units: tuple[str, ...]) -> "Quantity":
        """Read `50px`. Raises InputError, without the option's name, if it is not a number with one of `units`."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]\w*)", text.strip())
        if not match or match[2] not in units:
            examples = " or ".join(f"50{unit}" for unit in units)
            raise InputError(f"{text} must be a number with its unit, as in {examples}")
        return cls(float(match[1]), match[2])


@dataclass(frozen=True)
class PolygonOptions:
    """How regions become polygons. InputError is raised if options do not fit, or a package or driver is missing.

    Attributes:
        kind: a key of `DRIVERS`; None for no polygons.
        min_area: smaller regions are left out.
        simplify: how far an outline may move.
    """

    kind: str | None = None
    min_area: Quantity | None = None
    simplify: Quantity | None = None

    def __post_init__(self) -> None:
        if self.kind is None:
            for name, value in (("min_area", self.min_area), ("simplify", self.simplify)):
                if value is not None:
                    raise InputError(f"--{name} {value} needs --polygons {' or '.join(DRIVERS)}")
            return
        require_packages(f"--polygons {self.kind}", PACKAGES)
        for driver in (DRIVERS["gpkg"], DRIVERS[self.kind]):  # features are gathered in a GeoPackage
            if driver not in _library().list_drivers(write=True):
                raise InputError(f"--polygons {self.kind} needs GDAL's driver {driver}, which this pyogrio lacks")

    def check(self, image: Path, reference: Georeference, size: Size) -> None:
        """Raise InputError if an image lacks the georeference that the options need."""
        crs = reference.keywords.get("crs")
        if self.kind == "geojson" and crs is not None and not _on_earth(reference, size):
            raise InputError(
                f"{image} has a reference system without a place on the Earth, and GeoJSON is in WGS 84; give "
                "--polygons gpkg",
                "reference system",
            )
        for name, value in (("min_area", self.min_area), ("simplify", self.simplify)):
            if value is not None and value.unit != "px" and GroundAreas.of(reference, size) is None:
                raise InputError(
                    f"{image} does not say where on the ground it lies, which --{name} {value} needs; give pixels, as "
                    "in 50px",
                    "no georeference",
                )


def _library() -> ModuleType:
    """Return pyogrio, which then logs nothing: what GDAL complains of is raised as well."""
    import pyogrio

    logging.getLogger("pyogrio").setLevel(logging.CRITICAL)
    return pyogrio


def require_packages(option: str, packages: tuple[str, ...]) -> None:
    """Raise InputError, naming the option and the package, if one of `packages` is not installed."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise InputError(
                f"{option} needs the package {package}, which is not installed: pip install {' '.join(packages)}"
            ) from error


def _on_earth(reference: Georeference, size: Size) -> bool:
    """Return whether the middle of an image has a longitude and a latitude."""
    from rasterio.warp import transform

    try:
        middle = to_map(reference, *(np.array([side / 2]) for side in size))
        found = transform(reference.keywords["crs"], "EPSG:4326", *(axis.tolist() for axis in middle))
    except Exception:  # PROJ raises many kinds
        return False
    return bool(np.isfinite(found).all())


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
        if not len(regions.ids):
            return
        self._pending.append(regions)
        if sum(len(one.rings.vertices) for one in self._pending) >= _PENDING_VERTICES:
            self._flush()

    def _flush(self) -> None:
        regions, self._pending = self._pending, []
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


def lacks_place(reference: Georeference) -> str:
    """Return what the polygons of an image lack, after the words "the polygons"; "" if they lie on the ground."""
    if not reference.keywords.keys() & {"transform", "gcps"}:
        return "are in pixels: the image has no georeference that places them"
    return "" if reference.keywords.get("crs") is not None else "name no reference system, as the image names none"


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
