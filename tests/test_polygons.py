"""`predict.py --polygons`: layers equal their masks, lie where these lie, and hold what the summary says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS
from pictures import PIXEL, PROJECTED, run, save, summary, write_raster
from PIL import Image

from imaging.georeference import Georeference, GroundAreas
from imaging.sources import MemorySource
from prediction.outputs import OutputOptions, Outputs, output_paths
from prediction.polygon_options import PolygonOptions, Quantity
from prediction.polygons import PolygonWriter
from prediction.scenes import Rows
from utils.classes import IGNORED, Classes
from utils.errors import InputError

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")
from rasterio.features import rasterize  # noqa: E402
from rasterio.warp import transform_bounds  # noqa: E402

pytestmark = pytest.mark.usefixtures("load_once")

SIZE = (40, 60)
PLACE = Georeference(
    {"crs": rasterio.CRS.from_string(PROJECTED), "transform": rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)}
)


class Layer:
    """What a file holds: `meta`, polygons, and the fields by name."""

    def __init__(self, path: Path) -> None:
        self.meta, _, shapes, values = pyogrio.raw.read(path)
        self.shapes = shapely.from_wkb(shapes)
        self.fields = dict(zip(self.meta["fields"].tolist(), values, strict=True))
        assert shapely.is_valid(self.shapes).all()
        assert set(shapely.get_type_id(self.shapes).tolist()) <= {shapely.GeometryType.POLYGON}

    def __len__(self) -> int:
        return len(self.shapes)


def four_bands(size=SIZE) -> np.ndarray:
    """(4, H, W) of 16 bits, 0 in a corner."""
    values = np.random.default_rng(5).integers(1, 4000, (4, *size)).astype(np.uint16)
    values[:, :10, :20] = 0
    return values


def mask_of(size=SIZE, seed=0) -> np.ndarray:
    """Blocks of three ids, and pixels without data."""
    rng = np.random.default_rng(seed)
    ids = np.kron(rng.integers(0, 3, (size[0] // 4, size[1] // 4)), np.ones((4, 4))).astype(np.uint8)
    ids[5:9, 7:30] = IGNORED
    return ids


def write(path: Path, ids: np.ndarray, options: PolygonOptions, reference: Georeference) -> PolygonWriter:
    """Write the layer of a mask, in parts of 7 rows."""
    ground = GroundAreas.of(reference, ids.shape)
    names = Classes.generic(3)
    writer = PolygonWriter(path, ids.shape, names, options, reference, ground, name="mask", probabilities=False)
    for top in range(0, len(ids), 7):
        part = ids[top : top + 7]
        writer.write(part, None if ground is None else ground.rows(top, len(part)), None)
    writer.close()
    return writer


@pytest.mark.parametrize("kind", ["gpkg", "geojson"])
def test_a_layer_is_its_mask_with_the_summarys_areas_and_the_probabilities_means(checkpoint, tmp_path, kind) -> None:
    write_raster(tmp_path / "a.tif", four_bands(), nodata=0)
    out = tmp_path / "out"
    options = ["--polygons", kind, "--probabilities", "--bands", "4,3,2"]
    assert run(checkpoint, tmp_path / "a.tif", output=out, options=options) == 0
    assert {path.name for path in out.iterdir()} == {
        *("a_mask.tif", "a_probabilities.tif", f"a.{kind}", "summary.json"),
    }
    layer, total = Layer(out / f"a.{kind}"), summary(out)["total"]
    assert layer.meta["crs"] == {"gpkg": PROJECTED, "geojson": "EPSG:4326"}[kind]
    ids, pixels, metres = (layer.fields[name] for name in ("class", "pixels", "square_metres"))
    assert total["features"] == len(layer)
    assert np.bincount(ids, pixels, N_CLASS).tolist() == total["pixels"]
    np.testing.assert_allclose(np.bincount(ids, metres, N_CLASS), total["square_metres"], rtol=1e-12)
    assert [*layer.fields["name"]] == [f"class {k}" for k in ids]
    with rasterio.open(out / "a_mask.tif") as file, rasterio.open(out / "a_probabilities.tif") as shares:
        mask, place, crs = file.read(1), file.transform, file.crs
        own = np.take_along_axis(shares.read(), np.minimum(mask, N_CLASS - 1)[None], 0)[0]
    means = layer.fields["mean_probability"]
    assert ((means > 0) & (means <= 1)).all()
    for k in range(N_CLASS):
        weights = pixels[ids == k] / max(1, pixels[ids == k].sum())
        assert (means[ids == k] * weights).sum() == pytest.approx(own[mask == k].mean() if len(weights) else 0)
    if kind == "gpkg":
        drawn = rasterize(zip(layer.shapes, ids, strict=True), mask.shape, fill=IGNORED, transform=place, dtype="uint8")
        assert np.array_equal(drawn, mask)
    else:
        expected = transform_bounds(crs, "EPSG:4326", *rasterio.transform.array_bounds(*mask.shape, place))
        np.testing.assert_allclose(shapely.total_bounds(layer.shapes), expected, atol=1e-8)
        assert shapely.is_ccw(shapely.get_exterior_ring(layer.shapes)).all()


def test_a_picture_has_polygons_in_pixels_which_is_said(checkpoint, tmp_path, caplog) -> None:
    save(tmp_path / "a.png", SIZE)
    caplog.set_level("INFO")
    for kind in ("gpkg", "geojson"):
        out = tmp_path / kind
        assert run(checkpoint, tmp_path / "a.png", output=out, options=["--polygons", kind]) == 0
        layer, mask = Layer(out / f"a.{kind}"), np.asarray(Image.open(out / "a_mask.png"))
        assert np.array_equal(rasterize(zip(layer.shapes, layer.fields["class"], strict=True), SIZE), mask)
        assert all(value is None or np.isnan(value) for value in layer.fields["square_metres"])
        assert "mean_probability" not in layer.fields
    assert caplog.text.count("the polygons of a.png are in pixels: ") == 2
    assert "pyogrio" not in caplog.text


@pytest.mark.parametrize("more", [{"transform": rasterio.Affine(0.3, 0.4, 5e5, 0.4, -0.3, 5e6)}, {"gcps": True}])
def test_layers_lie_where_their_masks_lie(tmp_path, more) -> None:
    ids = mask_of()
    transform = more.get("transform", PLACE.keywords["transform"])
    keywords = {"crs": PLACE.keywords["crs"], "transform": transform}
    if "gcps" in more:
        corners = [(0, 0), (0, 60), (40, 0), (40, 60)]
        points = [rasterio.control.GroundControlPoint(r, c, *(transform * (c, r))) for r, c in corners]
        keywords = {"crs": PLACE.keywords["crs"], "gcps": points}
    write(tmp_path / "a.gpkg", ids, PolygonOptions("gpkg"), Georeference(keywords))
    layer = Layer(tmp_path / "a.gpkg")
    back = shapely.transform(layer.shapes, lambda xy: np.stack(~transform * tuple(xy.T), axis=1))
    drawn = rasterize(zip(back, layer.fields["class"], strict=True), ids.shape, fill=IGNORED, dtype="uint8")
    assert np.array_equal(drawn, ids)


def test_parts_that_are_written_one_by_one_make_one_layer(tmp_path, monkeypatch) -> None:
    ids = mask_of()
    write(tmp_path / "whole.gpkg", ids, PolygonOptions("gpkg"), PLACE)
    monkeypatch.setattr("prediction.polygons._PENDING_VERTICES", 1)
    monkeypatch.setattr("prediction.regions.STRIP_PIXELS", 1)
    for kind in ("gpkg", "geojson"):
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


@pytest.mark.parametrize("kind", ["gpkg", "geojson"])
def test_an_image_without_data_has_an_empty_layer(checkpoint, tmp_path, kind) -> None:
    write_raster(tmp_path / "a.tif", np.zeros((3, 20, 30), np.uint16), nodata=0)
    assert run(checkpoint, tmp_path / "a.tif", output=tmp_path / "out", options=["--polygons", kind]) == 0
    info = pyogrio.read_info(tmp_path / "out" / f"a.{kind}")
    assert info["features"] == summary(tmp_path / "out")["images"][0]["features"] == 0
    if kind == "gpkg":  # a file of GeoJSON has no schema
        assert info["fields"].tolist() == ["class", "name", "pixels", "square_metres"]
        assert (info["geometry_type"], info["crs"], info["layer_name"]) == ("Polygon", PROJECTED, "a")


def test_a_second_run_keeps_layers_and_counts_them(checkpoint, tmp_path) -> None:
    image, out = write_raster(tmp_path / "a.tif", four_bands()), tmp_path / "out"
    assert run(checkpoint, image, output=out) == 0
    assert summary(out)["total"]["features"] is None
    mask = (out / "a_mask.tif").stat().st_mtime_ns
    assert run(checkpoint, image, output=out, options=["--polygons", "gpkg"]) == 0
    count, layer = summary(out)["total"]["features"], (out / "a.gpkg").stat().st_mtime_ns
    assert count == len(Layer(out / "a.gpkg"))
    assert run(checkpoint, image, output=out, options=["--polygons", "gpkg", "--overlay"]) == 0
    assert ((out / "a.gpkg").stat().st_mtime_ns, (out / "a_mask.tif").stat().st_mtime_ns) == (layer, mask)
    assert summary(out)["total"]["features"] == count
    assert run(checkpoint, image, output=out, options=["--polygons", "gpkg", "--overwrite", "--min_area", "9px"]) == 0
    assert summary(out)["total"]["features"] == len(Layer(out / "a.gpkg")) < count


@pytest.mark.parametrize("kind", ["gpkg", "geojson"])
def test_a_run_that_stops_leaves_no_layer_and_the_next_removes_what_a_killed_one_left(
    checkpoint, tmp_path, monkeypatch, kind
) -> None:
    image, out = write_raster(tmp_path / "a.tif", four_bands()), tmp_path / "out"
    out.mkdir()
    for name in (f".a.1.part.{kind}", f".a.1.part.{kind}-journal"):
        (out / name).touch()
    options = ["--polygons", kind, "--cog"]
    with monkeypatch.context() as patch:
        patch.setattr("prediction.polygons.PolygonWriter.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(checkpoint, image, output=out, options=options) == 130
    assert not [path.name for path in out.iterdir() if path.suffix in (".tif", f".{kind}") and path.name[0] != "."]
    assert run(checkpoint, image, output=out, options=options) == 0
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
    local = rasterio.CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]')
    write_raster(tmp_path / "c.tif", four_bands(), crs=local)
    images = [tmp_path / name for name in ("a.png", "b.tif", "c.tif")]
    options = ["--polygons", "geojson", "--min_area", "1m2"]
    assert run(checkpoint, *images, output=tmp_path / "out", options=options) == 1
    failures = summary(tmp_path / "out")["failures"]
    assert [failure.partition(": ")[0].split()[0] for failure in failures] == [str(images[0]), str(images[2])]
    assert "--min_area 1m2" in failures[0]
    assert "WGS 84; give --polygons gpkg" in failures[1]
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "out" / "b.geojson").exists()


@pytest.mark.parametrize("package", ["pyogrio", "shapely"])
def test_a_missing_package_is_named(monkeypatch, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"--polygons gpkg needs the package {package}, which is not installed: pip"):
        PolygonOptions("gpkg")


def test_a_missing_driver_is_named(monkeypatch) -> None:
    monkeypatch.setattr(pyogrio, "list_drivers", lambda **_: {"GeoJSON": "rw"})
    with pytest.raises(InputError, match="--polygons gpkg needs GDAL's driver GPKG"):
        PolygonOptions("gpkg")
