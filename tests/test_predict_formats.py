"""Files that people have, of any kind: none is read wrongly or ends the run, nothing is lost in silence."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_header, build_model
from files import png, png_chunk
from files import write_raster as write_any
from pictures import PIXEL, exif_of, random_image, run, save, summary, write_raster
from PIL import Image

from models import checkpoint as checkpoints
from predict import Segmenter
from utils.classes import IGNORED
from utils.errors import InputError
from utils.stretch import Stretch

rasterio = pytest.importorskip("rasterio")
from rasterio.warp import transform as to  # noqa: E402
from rasterio.warp import transform_bounds  # noqa: E402

pytestmark = pytest.mark.usefixtures("load_once")

SIZE = (40, 60)
RNG = np.random.default_rng(2)


def deep(bands: int = 3, dtype: str = "uint16") -> np.ndarray:
    """(bands, *SIZE) of 11 bits."""
    return RNG.integers(0, 2048, (bands, *SIZE)).astype(dtype)


def noise(folder: Path, name: str = "a.tif", **more) -> Path:
    """A GeoTIFF of three bands of noise, 0..255."""
    return write_raster(folder / name, random_image(SIZE).numpy(), **more)


def test_16_bits_give_one_mask_in_every_format(segmenter, tmp_path) -> None:
    values = deep()
    expected = segmenter.segment(write_raster(tmp_path / "geo.tif", values))
    head = f"P6 {SIZE[1]} {SIZE[0]} 65535\n".encode()
    (tmp_path / "a.ppm").write_bytes(head + values.transpose(1, 2, 0).astype(">u2").tobytes())
    (tmp_path / "a.png").write_bytes(png(values, 16))
    write_any(tmp_path / "a.tif", values, photometric="rgb")
    write_any(tmp_path / "bands.tif", values, interleave="band")
    write_any(tmp_path / "a.jp2", values, driver="JP2OpenJPEG", quality="100", reversible="YES")
    for name in ("a.ppm", "a.png", "a.tif", "bands.tif", "a.jp2"):
        assert np.array_equal(segmenter.segment(tmp_path / name), expected), name


def test_stretch_and_bands_are_the_checkpoints_and_said_once(tmp_path, caplog) -> None:
    path = tmp_path / "own.pth"
    checkpoints.save(path, build_model(), build_header(1, stretch="0,4000", bands="3,2,1"))
    for name in ("a.tif", "b.tif"):
        write_raster(tmp_path / name, deep())
    caplog.set_level("INFO")
    assert run(path, tmp_path / "a.tif", tmp_path / "b.tif", output=tmp_path / "out") == 0
    lines = [line for line in caplog.messages if "stretch" in line]
    assert lines == ["2 images of more than 8 bits are stretched: --stretch 0,4000"]
    assert (summary(tmp_path / "out")["stretch"], summary(tmp_path / "out")["bands"]) == ("0,4000", "3,2,1")
    plain = Segmenter.from_checkpoint(path, device="cpu").segment(tmp_path / "a.tif")
    with rasterio.open(tmp_path / "out" / "a_mask.tif") as mask:
        assert np.array_equal(mask.read(1), plain)
    given = Segmenter.from_checkpoint(path, device="cpu", stretch="2%,98%", bands="1,2,3")
    assert not np.array_equal(given.segment(tmp_path / "a.tif"), plain)


def test_bands_and_stretch_of_a_plain_tiff_and_an_array(segmenter, tmp_path) -> None:
    values = RNG.integers(0, 256, (4, *SIZE)).astype(np.uint8)
    expected = segmenter.segment(np.ascontiguousarray(values[[3, 2, 1]].transpose(1, 2, 0)))
    for name, more in {"a": {"photometric": "rgb", "alpha": "no"}, "b": {"photometric": "minisblack"}, "c": {}}.items():
        path = write_any(tmp_path / f"{name}.tif", values, **more)
        assert np.array_equal(segmenter.segment(path, bands=(4, 3, 2)), expected), name
    values = deep().transpose(1, 2, 0)
    expected = segmenter.segment(values, bands=(3, 2, 1), stretch=Stretch(0, 3000, False))
    np.testing.assert_array_equal(segmenter.segment(values, bands="3,2,1", stretch="0,3000"), expected)


def points() -> list:
    return [rasterio.control.GroundControlPoint(k % 2, k, k, k % 2) for k in range(4)]


def test_no_odd_file_ends_the_run(checkpoint, tmp_path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write_any(folder / "complex.tif", deep().astype(np.complex64))
    write_any(folder / "points.tif", deep(1), gcps=points(), crs=rasterio.CRS())
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": 40, "width": 60, "photometric": "palette"}
    with rasterio.open(folder / "palette.tif", "w", **profile) as file:
        file.write_colormap(1, {k: (k % 256, 0, 0, 255) for k in range(3000)})
        file.write(deep(1))
    entry = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 282, 5, 1, 9999, 0)  # a resolution of 1 / 0 beyond its end
    whole = png(random_image(SIZE).numpy(), 8)
    (folder / "exif.png").write_bytes(whole[:33] + png_chunk(b"eXIf", entry) + whole[33:])
    noise(folder).rename(folder / os.fsdecode(b"caf\xe9.tif"))
    name = os.fsdecode(b"caf\xe9.png")
    save(folder / name)
    (folder / "text.png").write_text("no image")
    (folder / ("x" * 250 + ".png")).write_bytes((folder / name).read_bytes())
    assert run(checkpoint, folder, output=tmp_path / "out") == 1
    assert "Traceback" not in capsys.readouterr().err
    found = summary(tmp_path / "out")
    done = sorted(Path(one["image"]).name for one in found["images"])
    assert done == sorted(["points.tif", "palette.tif", "exif.png", name])
    failures = "\n".join(found["failures"])
    complex_, utf8 = "complex.tif cannot be used: its samples are complex", "caf\\udce9.tif"
    for text in (complex_, utf8, "text.png cannot be read", "xxx is too long"):
        assert text in failures
    assert len(found["failures"]) == 4


WORLD = "0.5\n0\n0\n-0.5\n500000.25\n4999999.75\n"


def test_a_georeference_beside_the_file_is_kept(checkpoint, tmp_path, caplog, monkeypatch) -> None:
    for name in ("world.png", "aux.png"):
        save(tmp_path / name, SIZE)
    (tmp_path / "world.pgw").write_text(WORLD)
    srs = f"<SRS>{rasterio.CRS.from_epsg(32633).to_wkt().replace('<', '&lt;')}</SRS>"
    place = "<GeoTransform>500000,0.5,0,5000000,0,-0.5</GeoTransform>"
    (tmp_path / "aux.png.aux.xml").write_text(f"<PAMDataset>{srs}{place}</PAMDataset>")
    write_any(tmp_path / "tiff.tif", random_image(SIZE).numpy(), photometric="rgb")
    (tmp_path / "tiff.tfw").write_text(WORLD)
    images = [tmp_path / name for name in ("world.png", "aux.png", "tiff.tif")]
    assert run(checkpoint, *images, output=tmp_path / "out") == 0
    for name in ("world", "aux", "tiff"):
        with rasterio.open(tmp_path / "out" / f"{name}_mask.tif") as mask:
            assert mask.transform[:6] == (0.5, 0, 500000, 0, -0.5, 5000000)
            assert (mask.crs == rasterio.CRS.from_epsg(32633)) == (name == "aux")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    caplog.set_level("INFO")
    assert run(checkpoint, *images, output=tmp_path / "without") == 0
    assert [line for line in caplog.messages if "georeference" in line] == [
        "the georeference of world.png, aux.png, tiff.tif is not kept: it takes the package rasterio, which is not "
        "installed: pip install rasterio"
    ]
    assert (tmp_path / "without" / "aux_mask.png").exists()


def test_rational_polynomials_are_kept_and_control_points_without_reference_said(checkpoint, tmp_path, caplog) -> None:
    numbers = [1.0] + [0.0] * 19
    rpcs = rasterio.rpc.RPC(0, 1, 0, 1, numbers, numbers, 0, 1, 0, 1, numbers, numbers, 0, 1)
    write_any(tmp_path / "rpc.tif", random_image(SIZE).numpy()[:1], rpcs=rpcs)
    write_any(tmp_path / "points.tif", random_image(SIZE).numpy(), gcps=points(), crs=rasterio.CRS())
    caplog.set_level("INFO")
    assert run(checkpoint, tmp_path / "rpc.tif", tmp_path / "points.tif", output=tmp_path / "out") == 0
    with rasterio.open(tmp_path / "out" / "rpc_mask.tif") as mask:
        assert mask.rpcs is not None
    assert "the georeference of points.tif is not kept: its control points name no reference system" in caplog.text


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_turned_picture_keeps_its_place_on_the_ground(checkpoint, tmp_path, orientation, caplog) -> None:
    caplog.set_level("INFO")
    Image.fromarray(random_image(SIZE).permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=exif_of(orientation))
    (tmp_path / "a.pgw").write_text(WORLD)
    assert run(checkpoint, tmp_path / "a.png", output=tmp_path / "out") == 0
    with rasterio.open(tmp_path / "out" / "a_mask.tif") as mask:
        corners = [mask.transform * corner for corner in ((0, 0), (mask.width, mask.height))]
        assert np.sort(np.round(corners, 6), axis=0).tolist() == [[500000, 4999980], [500030, 5000000]]
        column, row = ~mask.transform * (500000.25, 4999999.75)  # the first pixel that is stored
    assert (mask.height, mask.width) == (SIZE if orientation < 5 else SIZE[::-1])  # as it is displayed
    last = mask.width - 0.5, mask.height - 0.5
    assert (column, row) == pytest.approx({1: (0.5, 0.5), 3: last, 6: (last[0], 0.5), 7: last}[orientation])
    assert ("1 images are turned as they are displayed" in caplog.text) == (orientation > 1)


def test_nan_and_infinity_are_left_out_of_masks_and_areas(checkpoint, segmenter, tmp_path) -> None:
    values = RNG.normal(0, 1, (3, *SIZE)).astype(np.float32)
    values[0, :10, :10], values[1, 20, :5], values[2, 30, 7] = np.nan, np.inf, -np.inf
    write_raster(tmp_path / "a.tif", values)
    write_any(tmp_path / "b.tif", values, photometric="rgb")
    missing = ~np.isfinite(values).all(0)
    assert run(checkpoint, tmp_path / "a.tif", tmp_path / "b.tif", output=tmp_path / "out") == 0
    with rasterio.open(tmp_path / "out" / "a_mask.tif") as mask:
        masks = [mask.read(1), np.asarray(Image.open(tmp_path / "out" / "b_mask.png"))]
        assert mask.nodata == IGNORED
    for ids in (*masks, segmenter.segment(tmp_path / "a.tif")):
        assert np.array_equal(ids == IGNORED, missing)
    assert [one["left_out"] for one in summary(tmp_path / "out")["images"]] == [missing.sum()] * 2


def meridian_and_parallel(latitude: float) -> tuple[float, float]:
    """Metres of a degree of latitude and of longitude: the customary series for WGS 84."""
    at = np.radians(latitude)
    north = 111132.92 - 559.82 * np.cos(2 * at) + 1.175 * np.cos(4 * at) - 0.0023 * np.cos(6 * at)
    return north, 111412.84 * np.cos(at) - 93.5 * np.cos(3 * at) + 0.118 * np.cos(5 * at)


def area_of(checkpoint: Path, folder: Path, **place) -> float | None:
    """The square metres of an image at a place."""
    assert run(checkpoint, noise(folder, **place), output=folder / "out") == 0
    found = summary(folder / "out")["total"]["square_metres"]
    return None if found is None else sum(found)


@pytest.mark.parametrize("latitude", [0, 70])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32631", "feet", "EPSG:6933"])
def test_areas_are_true_on_the_ground(checkpoint, tmp_path, latitude, crs) -> None:
    if crs == "feet":  # Lambert's conformal cone, whose parallels are far from some of these latitudes
        crs = "+proj=lcc +lat_1=30 +lat_2=60 +lat_0=45 +lon_0=3 +datum=WGS84 +units=us-ft"
        latitude = latitude or 20
    east, north, *_ = transform_bounds("EPSG:4326", crs, 3.0, latitude, 3.0, latitude)
    pixel = 1e-5 if crs == "EPSG:4326" else 1.0
    place = rasterio.transform.from_origin(east, north, pixel, pixel)
    # corners of the raster in degrees: a parallelogram of so many metres
    corners = [place * corner for corner in ((0, 0), (SIZE[1], 0), (0, SIZE[0]))]
    x, y = (np.array(axis) for axis in to(crs, "EPSG:4326", *map(list, zip(*corners, strict=True))))
    up, along = meridian_and_parallel(float(y.mean()))
    sides = [((x[k] - x[0]) * along, (y[k] - y[0]) * up) for k in (1, 2)]
    expected = abs(sides[0][0] * sides[1][1] - sides[0][1] * sides[1][0])
    assert area_of(checkpoint, tmp_path, crs=crs, transform=place) == pytest.approx(expected, rel=2e-4)


def test_areas_of_tall_images_follow_the_latitude_and_of_a_local_reference_the_plane(checkpoint, tmp_path) -> None:
    place = rasterio.transform.from_origin(0, 80, 0.01, 1)  # 40 degrees from top to bottom
    latitudes = np.linspace(40, 80, 40_001)
    up, along = meridian_and_parallel((latitudes[1:] + latitudes[:-1]) / 2)
    expected = (up * along).sum() * 0.001 * 0.6
    assert area_of(checkpoint, tmp_path, crs="EPSG:4326", transform=place) == pytest.approx(expected, rel=1e-3)
    (tmp_path / "local").mkdir()
    local = 'LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
    found = area_of(checkpoint, tmp_path / "local", crs=local)
    assert found is None or found == pytest.approx(SIZE[0] * SIZE[1] * PIXEL**2)


WRONG = {
    "stretch": ["2%,198%", "-1%,5%", "9,1", "0,inf", "nan,1", "x", "", 5, (0, 100), "1,2,3"],
    "bands": ["x", "", "0", "1,,2", "1.5", 3, 2.5, (0, 1, 2), (1.0, 2, 3), [], "1,2,-3", [1] * 17],
}


def test_no_picture_and_wrong_stretch_and_bands_are_refused_in_one_line(checkpoint, segmenter) -> None:
    for image, message in (
        (torch.zeros(3, 4, 5), "not a Tensor; a tensor"),
        (np.zeros((0, 5, 3), np.uint8), r"not empty, not \(0, 5, 3\) uint8"),
        (np.zeros((0, 0), np.uint8), "not empty"),
        (np.zeros((4, 5, 3)), "float64"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\)"),
        (b"bytes", "not a bytes"),
        (None, "not a NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            segmenter.segment(image)
    told = {"stretch": "give two rising percentiles", "bands": "give 1 to 16 band numbers"}
    for name, value in ((name, value) for name, values in WRONG.items() for value in values):
        with pytest.raises(InputError, match=rf"^--{name} .*: {told[name]}"):
            segmenter.segment(np.zeros((4, 5), np.uint8), **{name: value})
        with pytest.raises(InputError, match=rf"^--{name} .*: {told[name]}"):
            Segmenter.from_checkpoint(checkpoint, device="cpu", **{name: value})


def test_masked_pixels_of_an_array_have_no_data(segmenter) -> None:
    """As NaN has none; values behind the mask change nothing, percentiles included."""
    values = deep(dtype="float32").transpose(1, 2, 0)
    missing = np.zeros(values.shape, bool)
    missing[:9, 5:] = True
    missing[20:, :, 0] = True  # of one band alone, as in files
    nowhere = missing.all(2, keepdims=True)
    found = segmenter.segment(np.ma.masked_array(np.where(nowhere, 1e6, values), missing), bands=(1, 2, 3))
    np.testing.assert_array_equal(found, segmenter.segment(np.where(nowhere, np.nan, values), bands=(1, 2, 3)))
    assert np.array_equal(found == 255, missing.all(2))
    grey = np.ma.masked_less(np.arange(48 * 64).reshape(48, 64).astype(np.uint8), 9)
    assert np.array_equal(segmenter.segment(grey) == 255, grey.mask)


def test_a_picture_of_every_mode_of_pillow_is_segmented(segmenter) -> None:
    """La is grey that is multiplied by its transparency."""
    grey, colour = (
        ("1", "L", "LA", "La", "I", "F", "I;16"),
        ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    )
    for mode in (*grey, *colour, "P", "PA"):
        assert segmenter.segment(Image.new(mode, (40, 30))).shape == (30, 40), mode
    plain = Image.fromarray(np.arange(48 * 64).reshape(48, 64).astype(np.uint8))
    opaque = plain.convert("LA").convert("La")
    np.testing.assert_array_equal(segmenter.segment(opaque), segmenter.segment(plain))
