"""Labels of every type are read exactly, by the one reader, in windows and whole."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from files import png, read_label, write_raster
from pictures import exif_of
from PIL import Image

from dataset.label_file import UNKNOWN, Colors, fit_of, open_label
from imaging.probe import probe
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.tiling import Box

RNG = np.random.default_rng(3)
VALUES = (0, 7, 300, 65535)
CLASSES = Classes(("a", "b", "c", "d"), ((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), values=VALUES, ignored=(9,))
PLAIN = Classes.generic(7)
TYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64")


def fitting(dtype: str) -> np.ndarray:
    """The values of classes, and the ignored one, that `dtype` holds."""
    most = np.finfo(dtype).max if dtype.startswith("float") else np.iinfo(dtype).max
    return np.array([value for value in (*VALUES, 9) if value <= most])


def meant(values: np.ndarray) -> np.ndarray:
    table = {**{value: k for k, value in enumerate(VALUES)}, 9: IGNORED}
    return np.vectorize(table.get)(values).astype(np.uint8)


@pytest.mark.parametrize(
    ("dtype", "compress"),
    [*((dtype, None) for dtype in TYPES), *product(("uint8", "int32", "float64"), ("deflate", "lerc", "zstd"))],
)
def test_ids_of_every_type_are_read_exactly(tmp_path, dtype, compress, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    values = RNG.choice(fitting(dtype), (23, 31)).astype(dtype)
    path = write_raster(tmp_path / "a.tif", values[None], **({"compress": compress} if compress else {}))
    np.testing.assert_array_equal(read_label(path, CLASSES), meant(values))
    with open_label(path, CLASSES) as label:
        found = label.read(Box(5, 6, 10, 11)).numpy()
    np.testing.assert_array_equal(found, meant(values)[5:15, 6:17])
    monkeypatch.setattr("dataset.label_file.STRIP_PIXELS", 100)
    np.testing.assert_array_equal(read_label(path, CLASSES), meant(values))
    if probe(path).decoders[-1] != "rasterio":
        monkeypatch.setitem(sys.modules, "rasterio", None)
        np.testing.assert_array_equal(read_label(path, CLASSES), meant(values))


LEAST = {"float32": -3.4028234663852886e38, "float64": -1.7976931348623157e308}
NODATA = [("int16", -9999), ("int32", -9999), ("float32", -9999), ("uint8", 255), ("uint16", 65535), *LEAST.items()]


@pytest.mark.parametrize(("dtype", "nodata"), [*NODATA, ("float32", float("nan")), ("float64", float("nan"))])
def test_declared_nodata_and_nan_are_left_out(tmp_path, dtype, nodata) -> None:
    """NaN also where nobody declared it."""
    pytest.importorskip("rasterio")
    kept = RNG.choice(np.array([0, 1, 6]), (23, 31))
    values, expected = kept.astype(dtype), kept.astype(np.uint8)
    values[3:6], expected[3:6] = nodata, IGNORED
    path = write_raster(tmp_path / "a.tif", values[None], nodata=nodata)
    np.testing.assert_array_equal(read_label(path, PLAIN), expected)
    Image.fromarray(np.array([[0, 1, np.nan, np.inf]], np.float32)).save(tmp_path / "b.tif")
    assert read_label(tmp_path / "b.tif", PLAIN).tolist() == [[0, 1, IGNORED, IGNORED]]


def test_fractions_are_smoothed_labels(tmp_path) -> None:
    Image.fromarray(np.array([[0, 1, 0.9]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: 0\.9.* at row 0, column 2 .*resized with smoothing"):
        read_label(tmp_path / "a.tif", PLAIN)


@pytest.mark.parametrize(("dtype", "value"), [("int32", -1), ("int32", 256), ("uint16", 7), ("float32", 1e30)])
def test_values_that_are_no_class_are_refused_not_wrapped(tmp_path, dtype, value) -> None:
    pytest.importorskip("rasterio")
    path = write_raster(tmp_path / "a.tif", np.array([[[0, value]]]).astype(dtype))
    with pytest.raises(InputError, match=r"a\.tif: id .* at row 0, column 1 \(1 such pixels\).*0\.\.6, or 255"):
        read_label(path, PLAIN)


def test_ids_of_few_bits_are_not_spread_over_eight_but_for_white_where_255_is_a_class(tmp_path) -> None:
    binary = Classes(("no", "yes"), ((0, 0, 0), (255, 255, 255)), values=(0, 255), ignored=())
    for depth in (1, 2, 4, 8, 16):
        ids = RNG.integers(0, min(7, 1 << depth), (1, 9, 13))
        (tmp_path / "a.png").write_bytes(png(ids, depth))
        np.testing.assert_array_equal(read_label(tmp_path / "a.png", PLAIN), ids[0])
        if depth < 8:
            (tmp_path / "a.png").write_bytes(png(ids % 2 * ((1 << depth) - 1), depth))
            np.testing.assert_array_equal(read_label(tmp_path / "a.png", binary), ids[0] % 2)


@pytest.mark.parametrize("count", [2, 7, 60])
def test_ids_of_colours_are_those_of_comparing_every_pixel_with_every_class(count) -> None:
    colors = np.unique(RNG.integers(0, 256, (count, 3)), axis=0)
    classes = Classes(
        ("a",) * (len(colors) - 1), tuple(map(tuple, colors[1:].tolist())), ignored=(tuple(colors[0].tolist()),)
    )
    near = colors[RNG.integers(0, len(colors), (40, 30))] ^ (RNG.integers(0, 8, (40, 30, 3)) == 0)  # some one off
    expected = np.full((40, 30), UNKNOWN)
    for k, color in enumerate(colors, -1):
        expected[(near == color).all(-1)] = IGNORED if k < 0 else k
    np.testing.assert_array_equal(Colors(classes).ids(near.transpose(2, 0, 1).astype(np.uint8)), expected)
    assert {UNKNOWN, IGNORED, 0} <= set(expected.flat)


def test_colours_of_16_bits_are_those_of_8(tmp_path) -> None:
    ids = RNG.integers(0, 7, (9, 13))
    colors = np.array(PLAIN.palette)[ids].transpose(2, 0, 1)
    (tmp_path / "a.png").write_bytes(png(colors * 257, 16))
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", PLAIN), ids)
    (tmp_path / "b.png").write_bytes(png(colors * 256 + 1, 16))
    with pytest.raises(InputError, match=r"b\.png has 3 bands of uint16; a label has one band"):
        read_label(tmp_path / "b.png", PLAIN)


def oriented(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    Image.fromarray(pixels).save(path, exif=exif_of(orientation))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("own", ["as displayed", "as stored", "with the same tag"])
def test_a_label_lies_on_its_image_as_displayed(tmp_path, orientation, own) -> None:
    from PIL import ImageOps

    shown = np.zeros((20, 30, 3), np.uint8)
    shown[2:5, 3:9] = 255
    # the picture that is shown so when it is turned
    stored = next(
        candidate
        for candidate in (np.rot90(shown[:, ::-1] if mirrored else shown, k) for mirrored in (0, 1) for k in range(4))
        if np.array_equal(displayed(candidate, orientation, ImageOps), shown)
    )
    image = oriented(tmp_path / "a.png", np.ascontiguousarray(stored), orientation)
    if own == "as displayed":
        label = oriented(tmp_path / "b.png", np.ascontiguousarray(shown[..., 0] // 255), 1)
    else:
        tag = orientation if own == "with the same tag" else 1
        label = oriented(tmp_path / "b.png", np.ascontiguousarray(stored[..., 0] // 255), tag)
    if own == "as stored" and orientation < 5:
        return  # its size says that it is displayed so
    np.testing.assert_array_equal(read_label(label, PLAIN, probe(image)), shown[..., 0] // 255)
    stored_alone = own == "as stored" and orientation > 4
    assert fit_of(probe(label), probe(image)).startswith("as stored" if stored_alone else "as displayed")


def displayed(pixels: np.ndarray, orientation: int, tool) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.getexif()[0x0112] = orientation
    return np.asarray(tool.exif_transpose(image))


def test_palette_labels_of_a_set_of_colours_keep_its_void_colour(tmp_path) -> None:
    """The set's classes are in the order of their colours, which is not that of the palette."""
    order = sorted(PLAIN.palette)
    classes = Classes(tuple("abcdefg"), tuple(order), ignored=((224, 224, 192),))
    indices = RNG.choice(np.array([*range(7), 255], np.uint8), (30, 30))
    palette = np.zeros((256, 3), np.uint8)
    palette[:7], palette[255] = PLAIN.palette, (224, 224, 192)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", PLAIN), indices)  # as of Pascal VOC
    image.convert("RGB").save(tmp_path / "b.png")
    expected = np.array([order.index(color) for color in PLAIN.palette] + [IGNORED])[np.minimum(indices, 7)]
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(read_label(tmp_path / name, classes), expected)


def test_a_palette_of_16_bits_is_read(tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    ids = RNG.integers(0, 7, (1, 9, 13)).astype(np.uint16)
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": 9, "width": 13, "photometric": "palette"}
    with rasterio.open(path, "w", **profile) as file:
        file.write_colormap(1, {k: (*color, 255) for k, color in enumerate(PLAIN.palette)})
        file.write(ids)
    np.testing.assert_array_equal(read_label(path, PLAIN), ids[0])
