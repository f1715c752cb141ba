"""Results lie where their images lie, or a line says that they cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders import N_CLASS
from pictures import random_image, run, summary, write_raster

from imaging import georeference
from imaging.georeference import Georeference, GroundAreas, check_proj, same_place
from prediction.polygon_options import PolygonOptions
from prediction.polygons import PolygonWriter
from utils.classes import IGNORED, Classes
from utils.errors import InputError

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")
from rasterio.warp import transform  # noqa: E402

GEOSTATIONARY = "+proj=geos +h=35785831 +lon_0=0 +sweep=y"


def layer(path: Path, ids: np.ndarray, crs: str, place: tuple[float, ...]) -> list:
    """The polygons of a mask's GeoJSON, of shapely's."""
    reference = Georeference({"crs": rasterio.CRS.from_string(crs), "transform": rasterio.Affine(*place)})
    options = PolygonOptions("geojson")
    writer = PolygonWriter(
        path, ids.shape, Classes.generic(N_CLASS), options, reference, None, name="a", probabilities=False
    )
    writer.write(ids, None, None)
    writer.close()
    found = json.loads(path.read_text())
    assert len(found["features"]) == writer.features == pyogrio.read_info(path)["features"]
    shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in found["features"]]
    assert shapely.is_valid(shapes).all()
    for part in shapely.get_parts(shapes):
        assert shapely.is_ccw(shapely.get_exterior_ring(part))
        assert not any(shapely.is_ccw(ring) for ring in part.interiors)
    return shapes


def test_long_edges_are_where_the_pixels_are(tmp_path) -> None:
    side, pixel = 240, 10_000.0
    ids = np.zeros((side, side), np.uint8)
    ids[:, side // 2 :] = 1
    shapes = layer(tmp_path / "a.geojson", ids, "EPSG:3035", (pixel, 0, 3e6, 0, -pixel, 4e6))
    for shape, left in zip(shapes, (0, side // 2), strict=True):
        lines = shapely.segmentize(shape.exterior, 0.01)
        x, y = transform("EPSG:4326", "EPSG:3035", *shapely.get_coordinates(lines).T.tolist())
        columns, rows = (np.array(x) - 3e6) / pixel - left, (4e6 - np.array(y)) / pixel
        off = np.minimum(np.abs([columns, columns - side // 2]).min(0), np.abs([rows, rows - side]).min(0))
        assert off.max() < 0.15


@pytest.mark.parametrize(
    ("west", "bounds"),
    [(350, (-10, 10)), (170, (-180, 180)), (-190, (-180, 180)), (530, (-180, 180)), (-10, (-10, 10))],
)
def test_longitudes_are_within_180_degrees_and_nothing_is_lost(tmp_path, west, bounds) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.uint8).repeat(5, 0).repeat(5, 1)
    ids[3:8, 12:17] = IGNORED
    shapes = layer(tmp_path / "a.geojson", ids, "EPSG:4326", (0.5, 0, west, 0, -0.5, 10))
    assert shapely.area(shapes).sum() == pytest.approx((ids != IGNORED).sum() * 0.25)
    assert shapely.total_bounds(shapes)[[0, 2]].tolist() == pytest.approx(bounds)
    widths = [part.bounds[2] - part.bounds[0] for part in shapely.get_parts(shapes)]
    assert max(widths) <= 20
    whole = shapely.union_all(shapes)
    for longitude in (-179.9, 179.9) if bounds[1] == 180 else (-0.1, 0.1):
        assert whole.intersects(shapely.Point(longitude, 9.9))


def test_a_hole_stays_in_a_region_across_180_degrees(tmp_path) -> None:
    ids = np.zeros((40, 40), np.uint8)
    ids[10:30, 15:25] = 1
    outer, inner = sorted(
        layer(tmp_path / "a.geojson", ids, "EPSG:32601", (1e4, 0, 2e5, 0, -1e4, 7e6)), key=lambda s: -s.area
    )
    assert inner.area > 0
    assert shapely.area(shapely.intersection(outer, inner)) == pytest.approx(0, abs=1e-6)


def test_a_region_off_the_earth_is_its_images_failure_in_geojson_alone(checkpoint, tmp_path) -> None:
    planes = random_image((60, 60)).numpy()
    disk = {"crs": GEOSTATIONARY, "transform": rasterio.Affine(2e5, 0, -6e6, 0, -2e5, 6e6)}
    images = [write_raster(tmp_path / "disk.tif", planes, **disk), write_raster(tmp_path / "b.tif", planes)]
    for kind, code in (("geojson", 1), ("gpkg", 0)):
        out = tmp_path / kind
        assert run(checkpoint, *images, output=out, options=["--polygons", kind]) == code
        found = summary(out)
        assert [
            str(out / "disk.geojson") in line and "no place on the Earth" in line for line in found["failures"]
        ] == [True] * code
        assert {path.name for path in out.glob("*_mask.tif")} == {"b_mask.tif"} | (
            {"disk_mask.tif"} if not code else set()
        )
        assert all(one["areas"] is None for one in found["images"] if "disk" in one["image"])


def test_a_region_around_a_pole_is_refused_in_geojson(tmp_path) -> None:
    with pytest.raises(InputError, match="surrounds a pole") as caught:
        layer(tmp_path / "a.geojson", np.zeros((10, 10), np.uint8), "EPSG:3995", (1e5, 0, -5e5, 0, -1e5, 5e5))
    assert caught.value.kind


def test_areas_of_an_image_partly_off_the_earth_are_unknown_each_time() -> None:
    place = {"crs": rasterio.CRS.from_string(GEOSTATIONARY), "transform": rasterio.Affine(2e5, 0, -6e6, 0, -2e5, 6e6)}
    assert [GroundAreas.of(Georeference(place), (60, 60)) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("fault", ["fails", "elsewhere"])
def test_without_proj_nothing_is_segmented(checkpoint, tmp_path, monkeypatch, capsys, fault) -> None:
    def broken(*_: object) -> tuple[list[float], list[float]]:
        if fault == "fails":
            raise rasterio.errors.CRSError("The EPSG code is unknown. PROJ: Cannot find proj.db")
        return [15.1], [45.2]

    image = write_raster(tmp_path / "a.tif", random_image((40, 60)).numpy())
    check_proj.cache_clear()
    monkeypatch.setattr("rasterio.warp.transform", broken)
    monkeypatch.setenv("PROJ_LIB", "/other")
    try:
        assert run(checkpoint, image, output=tmp_path / "out") == 2
    finally:
        check_proj.cache_clear()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: PROJ, which rasterio needs for reference systems, does not work: ")
    assert "unset PROJ_LIB=/other" in line
    assert not list((tmp_path / "out").iterdir())


def test_another_place_is_noticed(checkpoint, tmp_path, monkeypatch) -> None:
    size, crs = (40, 60), rasterio.CRS.from_epsg(32633)
    path = write_raster(tmp_path / "a.tif", random_image(size).numpy())
    with rasterio.open(path) as file:
        place = file.transform
        moved = rasterio.Affine(*place[:2], place.c + 1, *place[3:6])
        spelt = rasterio.CRS.from_wkt(crs.to_wkt().replace("WGS 84 / UTM zone 33N", "mine"))
        points = [rasterio.control.GroundControlPoint(0, 0, 5e5, 5e6)]
        for keywords, same in (
            ({}, True),
            ({"crs": crs, "transform": place}, True),
            ({"crs": spelt, "transform": place}, True),
            ({"crs": crs, "transform": moved}, False),
            ({"crs": rasterio.CRS.from_epsg(32634), "transform": place}, False),
            ({"crs": None, "transform": place}, False),
            ({"crs": crs, "gcps": points}, False),
        ):
            assert same_place(Georeference(keywords), file, size) is same
    monkeypatch.setattr("imaging.raster_writer.same_place", lambda *_: False)
    assert run(checkpoint, path, output=tmp_path / "out") == 1
    failure = summary(tmp_path / "out")["failures"][0]
    assert failure.startswith(f"{tmp_path / 'out' / 'a_mask.tif'} cannot be written: ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json"}


def test_points_off_the_earth_have_no_degrees_and_the_others_have() -> None:
    crs = rasterio.CRS.from_string("+proj=ortho +lat_0=40 +lon_0=10")
    x, y = np.array([0.0, 9e6, 1e6, -9e6]), np.zeros(4)
    longitude, latitude = georeference.to_degrees(crs, x, y)
    assert np.isfinite(longitude).tolist() == np.isfinite(latitude).tolist() == [True, False, True, False]
    assert (longitude[0], latitude[0]) == pytest.approx((10, 40))
