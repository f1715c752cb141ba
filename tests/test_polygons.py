"""Polygons equal their masks, traced strip by strip, and hold what the summary says; results lie where images lie."""

import json
import sys
import tracemalloc
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS
from pictures import PIXEL, PROJECTED, random_image, run, save, summary, write_raster
from PIL import Image

from imaging import georeference
from imaging.georeference import Georeference, GroundAreas, check_proj, same_place
from imaging.sources import MemorySource
from prediction import regions as module
from prediction.outlines import outline_polygons
from prediction.outputs import OutputOptions, Outputs, output_paths
from prediction.polygon_options import PolygonOptions, Quantity
from prediction.polygons import PolygonWriter
from prediction.regions import Regions, RegionTracer
from prediction.scenes import Rows
from utils.classes import IGNORED, Classes
from utils.errors import InputError

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")
from rasterio import features  # noqa: E402
from rasterio.warp import transform, transform_bounds  # noqa: E402

pytestmark = pytest.mark.usefixtures("load_once")

SIZE = (40, 60)
KINDS = ("gpkg", "geojson")
POLYGON, MULTI = shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON
GEOSTATIONARY = "+proj=geos +h=35785831 +lon_0=0 +sweep=y"
DISK = (2e5, 0, -6e6, 0, -2e5, 6e6)  # the whole Earth and beyond
LOCAL = 'LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'


def place(crs: str, *transform: float) -> Georeference:
    return Georeference({"crs": rasterio.CRS.from_string(crs), "transform": rasterio.Affine(*transform)})


PLACE = place(PROJECTED, 0.5, 0, 5e5, 0, -0.5, 5e6)


class Layer:
    """What a file holds: `meta`, polygons, and the fields by name."""

    def __init__(self, path: Path, types: tuple[int, ...] = (POLYGON,)) -> None:
        self.meta, _, shapes, values = pyogrio.raw.read(path)
        self.shapes = shapely.from_wkb(shapes)
        self.fields = dict(zip(self.meta["fields"].tolist(), values, strict=True))
        assert shapely.is_valid(self.shapes).all()
        assert set(shapely.get_type_id(self.shapes).tolist()) <= {*types}

    def __len__(self) -> int:
        return len(self.shapes)


def four_bands() -> np.ndarray:
    """(4, *SIZE) of 16 bits, 0 in a corner."""
    values = np.random.default_rng(5).integers(1, 4000, (4, *SIZE)).astype(np.uint16)
    values[:, :10, :20] = 0
    return values


def mask_of() -> np.ndarray:
    """Blocks of three ids, and pixels without data."""
    blocks = np.random.default_rng(0).integers(0, 3, (SIZE[0] // 4, SIZE[1] // 4))
    ids = np.kron(blocks, np.ones((4, 4))).astype(np.uint8)
    ids[5:9, 7:30] = IGNORED
    return ids


def write(path: Path, ids: np.ndarray, options: PolygonOptions, reference: Georeference) -> PolygonWriter:
    """Write the layer of a mask, in parts of 7 rows."""
    ground, names = GroundAreas.of(reference, ids.shape), Classes.generic(N_CLASS)
    writer = PolygonWriter(path, ids.shape, names, options, reference, ground, name="mask", probabilities=False)
    for top in range(0, len(ids), 7):
        part = ids[top : top + 7]
        writer.write(part, None if ground is None else ground.rows(top, len(part)), None)
    writer.close()
    return writer


def polygonize(checkpoint: Path, *images: Path, out: Path, kind: str = "gpkg", more: tuple[str, ...] = ()) -> int:
    return run(checkpoint, *images, output=out, options=["--polygons", kind, *more])


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_mask_with_the_summarys_areas_and_the_probabilities_means(checkpoint, tmp_path, kind) -> None:
    write_raster(tmp_path / "a.tif", four_bands(), nodata=0)
    out, more = tmp_path / "out", ("--probabilities", "--bands", "4,3,2")
    assert polygonize(checkpoint, tmp_path / "a.tif", out=out, kind=kind, more=more) == 0
    made = {"a_mask.tif", "a_probabilities.tif", f"a.{kind}", "summary.json"}
    assert {path.name for path in out.iterdir()} == made
    layer, total = Layer(out / f"a.{kind}"), summary(out)["total"]
    assert layer.meta["crs"] == {"gpkg": PROJECTED, "geojson": "EPSG:4326"}[kind]
    ids, pixels, metres = (layer.fields[name] for name in ("class", "pixels", "square_metres"))
    assert total["features"] == len(layer)
    assert np.bincount(ids, pixels, N_CLASS).tolist() == total["pixels"]
    np.testing.assert_allclose(np.bincount(ids, metres, N_CLASS), total["square_metres"], rtol=1e-12)
    assert [*layer.fields["name"]] == [f"class {k}" for k in ids]
    with rasterio.open(out / "a_mask.tif") as file, rasterio.open(out / "a_probabilities.tif") as shares:
        mask, where, crs = file.read(1), file.transform, file.crs
        own = np.take_along_axis(shares.read(), np.minimum(mask, N_CLASS - 1)[None], 0)[0]
    means = layer.fields["mean_probability"]
    assert ((means > 0) & (means <= 1)).all()
    for k in range(N_CLASS):
        weights = pixels[ids == k] / max(1, pixels[ids == k].sum())
        assert (means[ids == k] * weights).sum() == pytest.approx(own[mask == k].mean() if len(weights) else 0)
    if kind == "gpkg":
        drawn = features.rasterize(
            zip(layer.shapes, ids, strict=True), mask.shape, fill=IGNORED, transform=where, dtype="uint8"
        )
        assert np.array_equal(drawn, mask)
    else:
        expected = transform_bounds(crs, "EPSG:4326", *rasterio.transform.array_bounds(*mask.shape, where))
        np.testing.assert_allclose(shapely.total_bounds(layer.shapes), expected, atol=1e-8)
        assert shapely.is_ccw(shapely.get_exterior_ring(layer.shapes)).all()


def test_a_picture_has_polygons_in_pixels_which_is_said(checkpoint, tmp_path, caplog) -> None:
    save(tmp_path / "a.png", SIZE)
    caplog.set_level("INFO")
    for kind in KINDS:
        out = tmp_path / kind
        assert polygonize(checkpoint, tmp_path / "a.png", out=out, kind=kind) == 0
        layer, mask = Layer(out / f"a.{kind}"), np.asarray(Image.open(out / "a_mask.png"))
        assert np.array_equal(features.rasterize(zip(layer.shapes, layer.fields["class"], strict=True), SIZE), mask)
        assert all(value is None or np.isnan(value) for value in layer.fields["square_metres"])
        assert "mean_probability" not in layer.fields
    assert caplog.text.count("the polygons of a.png are in pixels: ") == 2
    assert "pyogrio" not in caplog.text


@pytest.mark.parametrize("given", ["transform", "gcps"])
def test_layers_lie_where_their_masks_lie(tmp_path, given) -> None:
    ids, reference = mask_of(), place(PROJECTED, 0.3, 0.4, 5e5, 0.4, -0.3, 5e6)
    where = reference.keywords["transform"]
    if given == "gcps":
        where = PLACE.keywords["transform"]
        corners = [(0, 0), (0, 60), (40, 0), (40, 60)]
        points = [rasterio.control.GroundControlPoint(r, c, *(where * (c, r))) for r, c in corners]
        reference = Georeference({"crs": PLACE.keywords["crs"], "gcps": points})
    write(tmp_path / "a.gpkg", ids, PolygonOptions("gpkg"), reference)
    layer = Layer(tmp_path / "a.gpkg")
    back = shapely.transform(layer.shapes, lambda xy: np.stack(~where * tuple(xy.T), axis=1))
    drawn = features.rasterize(zip(back, layer.fields["class"], strict=True), ids.shape, fill=IGNORED, dtype="uint8")
    assert np.array_equal(drawn, ids)


def test_parts_that_are_written_one_by_one_make_one_layer(tmp_path, monkeypatch) -> None:
    ids = mask_of()
    write(tmp_path / "whole.gpkg", ids, PolygonOptions("gpkg"), PLACE)
    monkeypatch.setattr("prediction.polygons._PENDING_VERTICES", 1)
    monkeypatch.setattr("prediction.regions.STRIP_PIXELS", 1)
    for kind in KINDS:
        written = write(tmp_path / f"parts.{kind}", ids, PolygonOptions(kind), PLACE)
        assert written.features == len(Layer(tmp_path / f"parts.{kind}"))
    whole, parts = Layer(tmp_path / "whole.gpkg"), Layer(tmp_path / "parts.gpkg")
    found, expected = ({shapely.to_wkb(shapely.normalize(one)) for one in each.shapes} for each in (parts, whole))
    assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.geojson", "parts.gpkg", "whole.gpkg"]


@pytest.mark.parametrize(("text", "least"), [("20px", 20), ("5.0m2", 20), ("0px", 0)])
def test_small_regions_are_left_out_and_the_others_stay(tmp_path, text, least) -> None:
    ids = mask_of()
    ids[::9, ::9] = 2  # specks
    write(tmp_path / "all.gpkg", ids, PolygonOptions("gpkg"), PLACE)
    write(tmp_path / "a.gpkg", ids, PolygonOptions("gpkg", Quantity.parse(text)), PLACE)
    kept, every = Layer(tmp_path / "a.gpkg"), Layer(tmp_path / "all.gpkg")
    pixels = every.fields["pixels"]
    assert sorted(kept.fields["pixels"]) == sorted(pixels[pixels >= least])
    assert shapely.area(kept.shapes).sum() == pytest.approx(pixels[pixels >= least].sum() * PIXEL**2)


def test_an_image_without_data_has_an_empty_layer(checkpoint, tmp_path) -> None:
    write_raster(tmp_path / "a.tif", np.zeros((3, 20, 30), np.uint16), nodata=0)
    for kind in KINDS:
        out = tmp_path / kind
        assert polygonize(checkpoint, tmp_path / "a.tif", out=out, kind=kind) == 0
        info = pyogrio.read_info(out / f"a.{kind}")
        assert info["features"] == summary(out)["images"][0]["features"] == 0
        if kind == "gpkg":  # a file of GeoJSON has no schema
            assert info["fields"].tolist() == ["class", "name", "pixels", "square_metres"]
            assert (info["geometry_type"], info["crs"], info["layer_name"]) == ("Polygon", PROJECTED, "a")


def test_a_second_run_keeps_layers_and_counts_them(checkpoint, tmp_path) -> None:
    image, out = write_raster(tmp_path / "a.tif", four_bands()), tmp_path / "out"
    assert run(checkpoint, image, output=out) == 0
    assert summary(out)["total"]["features"] is None
    mask = (out / "a_mask.tif").stat().st_mtime_ns
    assert polygonize(checkpoint, image, out=out) == 0
    count, layer = summary(out)["total"]["features"], (out / "a.gpkg").stat().st_mtime_ns
    assert count == len(Layer(out / "a.gpkg"))
    assert polygonize(checkpoint, image, out=out, more=("--overlay",)) == 0
    assert ((out / "a.gpkg").stat().st_mtime_ns, (out / "a_mask.tif").stat().st_mtime_ns) == (layer, mask)
    assert summary(out)["total"]["features"] == count
    assert polygonize(checkpoint, image, out=out, more=("--overwrite", "--min_area", "9px")) == 0
    assert summary(out)["total"]["features"] == len(Layer(out / "a.gpkg")) < count


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stops_leaves_no_layer_and_the_next_removes_what_a_killed_one_left(
    checkpoint, tmp_path, monkeypatch, kind
) -> None:
    image, out = write_raster(tmp_path / "a.tif", four_bands()), tmp_path / "out"
    out.mkdir()
    for name in (f".a.1.part.{kind}", f".a.1.part.{kind}-journal"):
        (out / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr("prediction.polygons.PolygonWriter.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert polygonize(checkpoint, image, out=out, kind=kind, more=("--cog",)) == 130
    assert not [path.name for path in out.iterdir() if path.suffix in (".tif", f".{kind}") and path.name[0] != "."]
    assert polygonize(checkpoint, image, out=out, kind=kind, more=("--cog",)) == 0
    assert {path.name for path in out.iterdir()} == {"a_mask.tif", f"a.{kind}", "summary.json"}


@pytest.mark.parametrize(
    "failing", ["prediction.polygons.PolygonWriter._flush", "imaging.raster_writer.CogWriter._copy"]
)
def test_a_result_that_fails_leaves_nothing_of_itself_and_of_others(tmp_path, monkeypatch, failing) -> None:
    def fail(_: object) -> None:
        raise InputError("full disk")

    monkeypatch.setattr(failing, fail)
    options = OutputOptions(tmp_path / "out", polygons=PolygonOptions("geojson"), cog=True)
    other = tmp_path / "out" / ".a.b.1.part.geojson"  # of an image called a.b
    other.parent.mkdir()
    other.touch()
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    with (
        pytest.raises(InputError, match="full disk"),
        Outputs(MemorySource(image), output_paths(options, "a", False), Classes.generic(3), options, PLACE) as outputs,
    ):
        outputs.emit(0, Rows(torch.from_numpy(mask_of())))
    assert list(other.parent.iterdir()) == [other]


def test_metres_need_a_georeference_and_geojson_a_place_on_the_earth(checkpoint, tmp_path, capsys) -> None:
    save(tmp_path / "a.png", SIZE)
    write_raster(tmp_path / "b.tif", four_bands())
    write_raster(tmp_path / "c.tif", four_bands(), crs=rasterio.CRS.from_wkt(LOCAL))
    images, out = [tmp_path / name for name in ("a.png", "b.tif", "c.tif")], tmp_path / "out"
    assert polygonize(checkpoint, *images, out=out, kind="geojson", more=("--min_area", "1m2")) == 1
    failures = summary(out)["failures"]
    assert [failure.partition(": ")[0].split()[0] for failure in failures] == [str(images[0]), str(images[2])]
    assert "--min_area 1m2" in failures[0]
    assert "WGS 84; give --polygons gpkg" in failures[1]
    assert "Traceback" not in capsys.readouterr().err
    assert (out / "b.geojson").exists()


def test_a_missing_package_and_a_missing_driver_are_named(monkeypatch) -> None:
    for package in ("pyogrio", "shapely"):
        told = rf"--polygons gpkg needs the package {package}, which is not installed: pip"
        with monkeypatch.context() as patch, pytest.raises(InputError, match=told):
            patch.setitem(sys.modules, package, None)
            PolygonOptions("gpkg")
    monkeypatch.setattr(pyogrio, "list_drivers", lambda **_: {"GeoJSON": "rw"})
    with pytest.raises(InputError, match="--polygons gpkg needs GDAL's driver GPKG"):
        PolygonOptions("gpkg")


def shapes_of(path: Path, ids: np.ndarray, crs: str, *transform: float) -> list:
    """The polygons of a mask's GeoJSON, of shapely's."""
    writer = write(path, ids, PolygonOptions("geojson"), place(crs, *transform))
    found = json.loads(path.read_text())
    assert len(found["features"]) == writer.features == len(Layer(path, (POLYGON, MULTI)))
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
    shapes = shapes_of(tmp_path / "a.geojson", ids, "EPSG:3035", pixel, 0, 3e6, 0, -pixel, 4e6)
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
    shapes = shapes_of(tmp_path / "a.geojson", ids, "EPSG:4326", 0.5, 0, west, 0, -0.5, 10)
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
    shapes = shapes_of(tmp_path / "a.geojson", ids, "EPSG:32601", 1e4, 0, 2e5, 0, -1e4, 7e6)
    outer, inner = sorted(shapes, key=lambda shape: -shape.area)
    assert inner.area > 0
    assert shapely.area(shapely.intersection(outer, inner)) == pytest.approx(0, abs=1e-6)


def test_a_region_off_the_earth_is_its_images_failure_in_geojson_alone(checkpoint, tmp_path) -> None:
    planes, disk = random_image((60, 60)).numpy(), place(GEOSTATIONARY, *DISK)
    images = [write_raster(tmp_path / "disk.tif", planes, **disk.keywords), write_raster(tmp_path / "b.tif", planes)]
    for kind, code in (("geojson", 1), ("gpkg", 0)):
        out = tmp_path / kind
        assert polygonize(checkpoint, *images, out=out, kind=kind) == code
        found = summary(out)
        assert len(found["failures"]) == code
        for line in found["failures"]:
            assert str(out / "disk.geojson") in line and "no place on the Earth" in line
        assert sorted(path.name for path in out.glob("*_mask.tif")) == ["b_mask.tif", "disk_mask.tif"][: 2 - code]
        assert all(one["areas"] is None for one in found["images"] if "disk" in one["image"])
    # areas of such an image are unknown each time
    assert [GroundAreas.of(disk, (60, 60)) for _ in range(3)] == [None] * 3
    with pytest.raises(InputError, match="surrounds a pole") as caught:
        shapes_of(tmp_path / "a.geojson", np.zeros((10, 10), np.uint8), "EPSG:3995", 1e5, 0, -5e5, 0, -1e5, 5e5)
    assert caught.value.kind


@pytest.mark.parametrize("fault", ["fails", "elsewhere"])
def test_without_proj_nothing_is_segmented(checkpoint, tmp_path, monkeypatch, capsys, fault) -> None:
    def broken(*_: object) -> tuple[list[float], list[float]]:
        if fault == "fails":
            raise rasterio.errors.CRSError("The EPSG code is unknown. PROJ: Cannot find proj.db")
        return [15.1], [45.2]

    image = write_raster(tmp_path / "a.tif", random_image(SIZE).numpy())
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
    path, crs = write_raster(tmp_path / "a.tif", random_image(SIZE).numpy()), rasterio.CRS.from_epsg(32633)
    with rasterio.open(path) as file:
        where = file.transform
        moved = rasterio.Affine(*where[:2], where.c + 1, *where[3:6])
        spelt = rasterio.CRS.from_wkt(crs.to_wkt().replace("WGS 84 / UTM zone 33N", "mine"))
        points = [rasterio.control.GroundControlPoint(0, 0, 5e5, 5e6)]
        for keywords, same in (
            ({}, True),
            ({"crs": crs, "transform": where}, True),
            ({"crs": spelt, "transform": where}, True),
            ({"crs": crs, "transform": moved}, False),
            ({"crs": rasterio.CRS.from_epsg(32634), "transform": where}, False),
            ({"crs": None, "transform": where}, False),
            ({"crs": crs, "gcps": points}, False),
        ):
            assert same_place(Georeference(keywords), file, SIZE) is same
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
