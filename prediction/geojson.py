"""Polygons as GeoJSON: written feature by feature, in WGS 84 where a reference system is known (RFC 7946)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imaging.georeference import to_degrees
from utils.errors import InputError
from utils.files import final_path


class GeoJsonFile:
    """A file of features, written in order; to be closed. OSError is raised where it cannot be written."""

    def __init__(self, path: Path, name: str, crs: Any) -> None:
        """Start without features; `crs` is rasterio's, None where coordinates are no places and stay as they come."""
        self.path, self._crs = path, crs
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        self._file.write(f'{{"type": "FeatureCollection", "name": {json.dumps(name)}, "features": [')
        self._separator = "\n"

    def write(self, polygons: np.ndarray, fields: Mapping[str, Sequence[Any]]) -> None:
        """Add features: (n,) polygons of shapely's, and n values of each field; None is no value.

        Raises InputError where a polygon has no place on the Earth.
        """
        import shapely

        if self._crs is not None:
            polygons = in_degrees(polygons, self._crs, final_path(self.path))
        for k, shape in enumerate(shapely.to_geojson(polygons).tolist()):
            properties = json.dumps({name: values[k] for name, values in fields.items()})
            self._file.write(f'{self._separator}{{"type": "Feature", "properties": {properties}, "geometry": {shape}}}')
            self._separator = ",\n"

    def close(self) -> None:
        with self._file:
            self._file.write("\n]}\n")


def in_degrees(polygons: np.ndarray, crs: Any, path: Path) -> np.ndarray:
    """Return polygons in longitude and latitude, parted at 180 degrees, their outer rings against the clock.

    Raises InputError, naming `path`, where one leaves the Earth or surrounds a pole.
    """
    import shapely

    places = np.stack(to_degrees(crs, *shapely.get_coordinates(polygons).T), axis=1)
    if not np.isfinite(places).all():
        raise InputError(
            f"{path} cannot be written: regions reach to where the image's reference system has no place on the Earth, "
            "and GeoJSON is in WGS 84; give --polygons gpkg",
            "reference system",
        )
    found = shapely.set_coordinates(polygons.copy(), places)
    west, _, east, _ = shapely.bounds(found).T
    for k in np.flatnonzero((west < -180) | (east > 180) | (east - west > 180)).tolist():
        found[k] = _parted(found[k], path)
    clockwise = ~shapely.is_ccw(shapely.get_exterior_ring(shapely.get_geometry(found, 0)))
    found = np.where(clockwise, shapely.reverse(found), found)
    return np.asarray(shapely.transform(found, lambda xy: xy.round(9)))  # a tenth of a millimetre


def _parted(polygon: Any, path: Path) -> Any:
    """Return a polygon whose longitudes may jump by 360, or lie beyond 180, as one or more within -180..180."""
    import shapely

    rings: list[np.ndarray] = []
    for ring in (polygon.exterior, *polygon.interiors):
        longitude, latitude = shapely.get_coordinates(ring).T
        longitude = np.unwrap(longitude, period=360)
        if abs(longitude[-1] - longitude[0]) > 180:
            raise InputError(
                f"{path} cannot be written: a region surrounds a pole, which GeoJSON cannot hold; give --polygons gpkg",
                "reference system",
            )
        if rings:  # a hole, which may lie a turn away from the outer ring
            longitude += 360 * np.round((rings[0][:, 0].mean() - longitude.mean()) / 360)
        rings.append(np.stack([longitude, latitude], axis=1))
    whole = shapely.Polygon(rings[0], rings[1:])
    west, south, east, north = whole.bounds
    parts = []
    for turn in range(int((west + 180) // 360), int(-((-east - 180) // 360))):  # around the Earth
        left = 360 * turn - 180
        part = whole if left <= west and east <= left + 360 else whole & shapely.box(left, south, left + 360, north)
        shifted = shapely.transform(shapely.get_parts(part), lambda xy, left=left: xy - (left + 180, 0))
        parts += [one for one in shifted if one.area]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
