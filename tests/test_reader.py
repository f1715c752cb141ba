"""The one reader: pixels of random files, pictures, GeoTIFFs; labels of every type; how sources shrink; writers."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import image_tensor, shrink_image
from files import WHERE, Stored, draw_file, png, read_label, write_raster
from pictures import PROJECTED, exif_of, random_image
from PIL import Image, ImageOps

from dataset.base import Item, SegmentationDataset
from dataset.label_file import UNKNOWN, Colors, fit_of, open_label
from imaging.georeference import Georeference, read_georeference
from imaging.image_file import SAMPLE_SIDE, View, open_image, spaced
from imaging.pictures import picture, shrink
from imaging.probe import RASTERIO, probe
from imaging.raster_writer import BLOCK, RasterWriter
from imaging.sources import CropSource, MemorySource, load_in_memory
from prediction.overlay import _outlines
from prediction.run import find_images
from prediction.writers import PngWriter
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.stretch import Stretch
from utils.tiling import Box, Size

FILES = 320
RNG = np.random.default_rng(0)
SIZE = (37, 53)


def planes(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return RNG.integers(0, 256 if dtype == "uint8" else 4000, shape or (3, *SIZE)).astype(dtype)


def pillow(size: Size = SIZE, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(planes(*size, 3)).convert(mode)


def pixels(path: Path, stretch: Stretch | None = None) -> torch.Tensor:
    with open_image(path, View(None, stretch or Stretch())) as source:
        assert probe(path).size == source.size
        return source.read(Box(0, 0, *source.size))


def expected_pixels(file: Stored) -> tuple[np.ndarray, np.ndarray | None]:
    """(3, H, W) uint8 and (H, W) bool or None, computed from what is stored without any of our code but the stretch."""
    values, valid = file.shown(file.values), None if file.valid is None else file.shown(file.valid)
    if file.lossy:
        image = ImageOps.exif_transpose(Image.open(file.path)).convert("RGB")
        return np.asarray(image).transpose(2, 0, 1), None
    if file.palette is not None:
        return file.palette[values[0]].transpose(2, 0, 1), None
    chosen = values[:3] if len(values) > 2 else values[[0, 0, 0]]
    if valid is not None:  # of the bands that are shown
        nodata = float(file.about["nodata"])
        valid = (chosen != np.array(nodata, chosen.dtype)).any(0)
    if values.dtype.kind == "f":
        finite = np.isfinite(chosen).all(0)
        valid = finite if valid is None else valid & finite
    if values.dtype != np.uint8:
        stretch = Stretch()
        chosen = stretch.apply(chosen, stretch.limits(chosen, valid))
    elif file.top < 255:
        chosen = np.round(chosen * (255 / file.top)).astype(np.uint8)
    return chosen if valid is None else chosen * valid, valid


def windows(image, rng) -> np.ndarray:
    """(3, H, W), read in four windows."""
    height, width = image.size
    row, column = int(rng.integers(1, height)), int(rng.integers(1, width))
    rows = [
        torch.cat([image.read(Box(top, 0, rows, column)), image.read(Box(top, column, rows, width - column))], 2)
        for top, rows in ((0, row), (row, height - row))
    ]
    return torch.cat(rows, 1).numpy()


def read_both(file: Stored, rng) -> dict[str, np.ndarray]:
    """The pixels that each user of the reader gets."""
    data = SegmentationDataset([Item("a", file.path, None)], Classes.generic(3), 8)
    with open_image(file.path) as image:
        found = {"windows": windows(image, rng)}
    return {"training": data.read(0)[0].numpy(), "evaluation": data[0].image.numpy(), **found}


def test_random_files_give_what_they_store_in_training_evaluation_and_prediction(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    rng = np.random.default_rng(11)
    kinds, without = set(), 0
    for k in range(FILES):
        file = draw_file(rng, tmp_path, k)
        info = probe(file.path)
        kinds.add((info.format, info.dtype, info.bands))
        pixels, valid = expected_pixels(file)
        assert info.size == pixels.shape[1:]
        for user, found in read_both(file, rng).items():
            assert np.array_equal(found, pixels), (user, info, file.about)
        with open_image(file.path) as image:
            found = image.valid(Box(0, 0, *image.size))
        assert found is None or np.array_equal(found, np.ones(info.size) if valid is None else valid), info
        assert valid is None or found is not None, info
        if info.decoders[-1] != "rasterio" and info.format != "JPEG2000":  # of which Pillow reads some
            without += 1
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, "rasterio", None)
                for user, found in read_both(file, rng).items():
                    assert np.array_equal(found, pixels), (user, "without rasterio", info, file.about)
        file.path.unlink()
    assert len(kinds) > 50 and without > 100
    assert spaced(3).tolist() == [0, 1, 2]
    rows = spaced(10_000)
    assert (len(rows), set(np.diff(rows))) == (SAMPLE_SIDE, {9, 10})


def test_pictures_give_what_pillow_shows(tmp_path) -> None:
    read = 0
    for mode, suffix in product(("RGB", "L", "1", "P", "RGBA", "LA", "CMYK"), ("png", "tif", "jpg", "bmp", "webp")):
        path = tmp_path / f"{mode}.{suffix}"
        try:
            pillow(mode=mode).save(path)
        except OSError:  # the format has no such mode
            continue
        assert torch.equal(pixels(path), image_tensor(Image.open(path).convert("RGB"))), path.name
        read += 1
    assert read > 20


def test_greys_of_16_bits_are_stretched_and_in_memory_kept_apart(tmp_path) -> None:
    Image.fromarray(np.linspace(1000, 3000, 50 * 20).reshape(50, 20).astype(np.uint16)).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png", Stretch.parse("1000,3000"))
    assert found.shape == (3, 50, 20)
    assert (found[0, 0, 0], found[0, -1, -1]) == (0, 255)
    assert abs(float(found.float().mean()) - 127.5) < 0.5
    clipped = pixels(tmp_path / "a.png", Stretch.parse("10%,90%"))[0]
    assert [(clipped == end).float().mean() for end in (0, 255)] == pytest.approx([0.1, 0.1], abs=0.01)
    missing = np.array([[[5.0, 5.0, np.nan]]])
    assert Stretch().apply(missing, Stretch().limits(missing)).tolist() == [[[0, 0, 0]]]
    held = picture(Image.fromarray(np.array([[0, 700, 1000]], np.uint16)), View(None, Stretch.parse("0,1000")))
    assert held.read(Box(0, 0, 1, 3))[0].tolist() == [[0, 178, 255]]


@pytest.mark.parametrize("size", [(64, 64), (100, 333), (333, 100), (1, 200), (200, 1), (64, 200), (40, 30)])
def test_a_source_shrinks_to_what_pillow_makes_of_it_and_band_by_band_differs_by_rounding_alone(
    monkeypatch, size
) -> None:
    image = pillow(size)
    source = MemorySource(image_tensor(image))
    assert torch.equal(shrink(source, (64, 64)), image_tensor(shrink_image(image, 64)))
    expected = shrink(source, (64, 48))
    for rows in (1, 7, 1000):
        monkeypatch.setattr("imaging.pictures._STRIP_PIXELS", rows * size[1])
        assert (shrink(source, (64, 48), most=1).int() - expected.int()).abs().max() <= 1


def test_parts_and_held_images_read_the_same_pixels() -> None:
    image = random_image((40, 60))
    part = CropSource(MemorySource(image), Box(5, 7, 30, 20))
    for source in (part, load_in_memory(part), load_in_memory(part, most=1)):
        assert source.size == (30, 20)
        assert torch.equal(source.read(Box(2, 3, 10, 11)), image[:, 7:17, 10:21])
    assert isinstance(load_in_memory(part), MemorySource)
    assert load_in_memory(part, most=1) is part


def test_colour_tables_are_applied_and_rasters_are_read_in_windows(tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = planes(1, *SIZE) % 2
    path = write_raster(tmp_path / "a.tif", values, **WHERE)
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (10, 20, 30, 255), 1: (40, 50, 60, 255)})
    assert torch.equal(pixels(path)[1] == 50, torch.from_numpy(values[0] == 1))
    pillow().save(tmp_path / "plain.tif")
    assert probe(write_raster(tmp_path / "geo.tif", planes(), **WHERE)).decoder == RASTERIO
    assert probe(write_raster(tmp_path / "deep.tif", planes(dtype="uint16"))).decoder == RASTERIO
    assert probe(tmp_path / "plain.tif").decoder != RASTERIO


@pytest.mark.parametrize("rows", [1, 100, BLOCK, 700])
def test_what_is_written_by_rows_is_read_back_with_its_georeference(tmp_path, rows) -> None:
    rasterio = pytest.importorskip("rasterio")
    ids = planes(1, 700, 300) % 7
    reference = read_georeference(probe(write_raster(tmp_path / "a.tif", planes(), **WHERE)))
    writer = RasterWriter(tmp_path / "b.tif", (700, 300), "uint8", 1, reference, 255)
    writer.colors({3: (1, 2, 3)})
    for top in range(0, 700, rows):
        writer.write(ids[:, top : top + rows])
    writer.close()
    with rasterio.open(tmp_path / "b.tif") as file:
        assert (file.crs, file.nodata) == (rasterio.CRS.from_string(PROJECTED), 255)
        assert file.transform == reference.keywords["transform"]
        assert file.colormap(1)[3] == (1, 2, 3, 255)
        assert np.array_equal(file.read(), ids)
    values = RNG.random((2, 30, 40)).astype(np.float16)
    writer = RasterWriter(tmp_path / "c.tif", (30, 40), "float16", 2, Georeference(), float("nan"))
    writer.describe(("one", "two"))
    writer.write(values)
    writer.close()
    with rasterio.open(tmp_path / "c.tif") as file:
        assert file.descriptions == ("one", "two")
        assert np.array_equal(file.read(), values.astype(np.float32))


def several(path: Path, first: Image.Image, *others: Image.Image) -> Path:
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("case", ["bands", "thumbnail first", "another shape", "gif", "png", "webp", "nitf"])
def test_a_file_of_several_images_is_refused_as_image_and_as_label(tmp_path, case) -> None:
    if case == "bands":
        path = several(tmp_path / "a.tif", *(pillow(mode="L") for _ in range(3)))
    elif case == "thumbnail first":
        path = several(tmp_path / "a.tif", pillow((10, 15)), pillow())
    elif case == "another shape":
        path = several(tmp_path / "a.tif", pillow(), pillow((20, 53)))
    elif case == "nitf":
        path = tmp_path / "a.ntf"
        shutil = pytest.importorskip("rasterio.shutil")
        shutil.copy(write_raster(tmp_path / "b.tif", planes(1, *SIZE)), path, "NITF", NUMI=2)
    else:
        path = several(tmp_path / f"a.{case}", pillow(), pillow())
    for read in (pixels, lambda path: read_label(path, Classes.generic(3))):
        with pytest.raises(InputError, match=rf"{path.name} cannot be used: it holds several images .*; save the one"):
            read(path)


def test_copies_masks_previews_and_overviews_are_not_several_images(tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    whole, size = pillow((40, 60)), (40, 60)
    late = several(tmp_path / "a.tif", whole, pillow((10, 15)))  # a preview that does not say so
    assert torch.equal(pixels(late), image_tensor(whole))
    assert probe(several(tmp_path / "a.gif", whole)).size == size
    whole.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[pillow((10, 15))])
    assert probe(tmp_path / "a.jpg").size == size
    values = planes(3, 300, 411)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(write_raster(tmp_path / "b.tif", values), "r+") as file:
            file.write_mask(np.full(values.shape[1:], 255, np.uint8))
        with rasterio.open(tmp_path / "b.tif", "r+") as file:
            file.build_overviews([2, 4, 8])
    np.testing.assert_array_equal(pixels(tmp_path / "b.tif"), values)


@pytest.mark.parametrize("form", ["NC", "NC4"])
def test_netcdf_and_hdf5_are_read_and_their_parts_can_be_saved(tmp_path, form) -> None:
    """NC4 is HDF5, which Pillow knows by name alone."""
    shutil = pytest.importorskip("rasterio.shutil")
    values = planes()
    for path, source in ((tmp_path / "one.nc", values[:1]), (tmp_path / "three.nc", values)):
        shutil.copy(write_raster(tmp_path / "a.tif", source, **WHERE), path, "netCDF", FORMAT=form)
    np.testing.assert_array_equal(pixels(tmp_path / "one.nc"), values[[0, 0, 0]])
    with pytest.raises(InputError, match=r"no bands of its own; save one .* file: rio convert 'netcdf:.*Band1' part"):
        probe(tmp_path / "three.nc")


def test_a_name_that_is_no_file_is_refused_with_what_helps() -> None:
    for name in ('NETCDF:"a.nc":band', "/vsizip/a.zip/a.tif", "https://example.org/a.tif"):
        with pytest.raises(InputError, match=r"only files are read: save it as one, where GDAL opens it: rio convert"):
            find_images([name])
    with pytest.raises(InputError, match=r"there is no image$"):
        find_images(["a.tif"])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (17, 23), (40, 31)])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_an_outline_holds_the_pixels_near_another_class_in_their_row_or_column(size, width) -> None:
    rng = np.random.default_rng([*size, width])
    ids = np.kron(rng.choice([0, 1, 6, 255], size), np.ones((3, 3), np.uint8)).astype(np.uint8)
    expected = np.zeros(ids.shape, bool)
    for row, column in np.ndindex(*ids.shape):
        up, left = max(0, row - width), max(0, column - width)
        near = *ids[up : row + width + 1, column], *ids[row, left : column + width + 1]
        expected[row, column] = any(other != ids[row, column] for other in near)
    np.testing.assert_array_equal(_outlines(ids, width), expected)


def write_png(path: Path, values: np.ndarray, size: Size, *palette: list) -> None:
    """Write (C, h, W) in parts of 7 rows."""
    writer = PngWriter(path, size, *palette)
    for top in range(0, values.shape[1], 7):
        writer.write(values[:, top : top + 7])
    writer.close()


@pytest.mark.parametrize("n_class", [2, 256])
def test_a_png_holds_the_ids_and_the_palette_or_the_colours_that_were_written(tmp_path, n_class) -> None:
    ids, palette = RNG.integers(0, n_class, (1, 50, 33), np.uint8), [(k, 255 - k, k // 2) for k in range(256)]
    write_png(tmp_path / "ids.png", ids, (50, 33), palette)
    with Image.open(tmp_path / "ids.png") as shown:
        assert shown.mode == "P"
        assert shown.getpalette() == [value for color in palette for value in color]
        np.testing.assert_array_equal(np.asarray(shown), ids[0])
    colors = planes(3, 20, 9)  # without a palette
    for rows in (20, 12):
        write_png(tmp_path / f"{rows}.png", colors[:, :rows], (20, 9))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "20.png")), colors.transpose(1, 2, 0))
    assert not (tmp_path / "12.png").exists()  # rows are missing


VALUES = (0, 7, 300, 65535)
CLASSES = Classes(("a", "b", "c", "d"), ((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), values=VALUES, ignored=(9,))
PLAIN = Classes.generic(7)
TYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64")


def stored(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of classes, and the ignored one, that `dtype` holds, and their ids."""
    most = np.finfo(dtype).max if dtype.startswith("float") else np.iinfo(dtype).max
    table = {**{value: k for k, value in enumerate(VALUES)}, 9: IGNORED}
    values = RNG.choice([value for value in table if value <= most], (23, 31))
    return values.astype(dtype), np.vectorize(table.get)(values).astype(np.uint8)


@pytest.mark.parametrize(
    ("dtype", "compress"),
    [*((dtype, None) for dtype in TYPES), *product(("uint8", "int32", "float64"), ("deflate", "lerc", "zstd"))],
)
def test_ids_of_every_type_are_read_exactly(tmp_path, dtype, compress, monkeypatch) -> None:
    values, meant = stored(dtype)
    path = write_raster(tmp_path / "a.tif", values[None], **({"compress": compress} if compress else {}))
    np.testing.assert_array_equal(read_label(path, CLASSES), meant)
    with open_label(path, CLASSES) as label:
        np.testing.assert_array_equal(label.read(Box(5, 6, 10, 11)).numpy(), meant[5:15, 6:17])
    monkeypatch.setattr("dataset.label_file.STRIP_PIXELS", 100)
    np.testing.assert_array_equal(read_label(path, CLASSES), meant)
    if probe(path).decoders[-1] != "rasterio":
        monkeypatch.setitem(sys.modules, "rasterio", None)
        np.testing.assert_array_equal(read_label(path, CLASSES), meant)


LEAST = {"float32": -3.4028234663852886e38, "float64": -1.7976931348623157e308}
NODATA = [("int16", -9999), ("int32", -9999), ("float32", -9999), ("uint8", 255), ("uint16", 65535), *LEAST.items()]


def test_declared_nodata_and_nan_are_left_out_and_other_values_that_are_no_class_refused(tmp_path) -> None:
    """NaN also where nobody declared it."""
    kept = RNG.choice(np.array([0, 1, 6]), (23, 31))
    for dtype, nodata in (*NODATA, ("float32", float("nan")), ("float64", float("nan"))):
        values, expected = kept.astype(dtype), kept.astype(np.uint8)
        values[3:6], expected[3:6] = nodata, IGNORED
        path = write_raster(tmp_path / "a.tif", values[None], nodata=nodata)
        np.testing.assert_array_equal(read_label(path, PLAIN), expected, f"{dtype} {nodata}")
    Image.fromarray(np.array([[0, 1, np.nan, np.inf]], np.float32)).save(tmp_path / "b.tif")
    assert read_label(tmp_path / "b.tif", PLAIN).tolist() == [[0, 1, IGNORED, IGNORED]]
    Image.fromarray(np.array([[0, 1, 0.9]], np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"b\.tif: 0\.9.* at row 0, column 2 .*resized with smoothing"):
        read_label(tmp_path / "b.tif", PLAIN)
    for dtype, value in (("int32", -1), ("int32", 256), ("uint16", 7), ("float32", 1e30)):  # not wrapped
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
    ignored, *others = map(tuple, colors.tolist())
    classes = Classes(("a",) * len(others), tuple(others), ignored=(ignored,))
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
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif_of(orientation))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("own", ["as displayed", "as stored", "with the same tag"])
def test_a_label_lies_on_its_image_as_displayed(tmp_path, orientation, own) -> None:
    shown = np.zeros((20, 30, 3), np.uint8)
    shown[2:5, 3:9] = 255
    for mirrored, k in product((0, 1), range(4)):  # until the picture is shown so when it is turned
        stored = np.rot90(shown[:, ::-1] if mirrored else shown, k)
        image = oriented(tmp_path / "a.png", stored, orientation)
        if np.array_equal(ImageOps.exif_transpose(Image.open(image)), shown):
            break
    expected, label = shown[..., 0] // 255, tmp_path / "b.png"
    if own == "as displayed":
        oriented(label, expected, 1)
    else:
        oriented(label, stored[..., 0] // 255, orientation if own == "with the same tag" else 1)
    if own == "as stored" and orientation < 5:
        return  # its size says that it is displayed so
    np.testing.assert_array_equal(read_label(label, PLAIN, probe(image)), expected)
    stored_alone = own == "as stored" and orientation > 4
    assert fit_of(probe(label), probe(image)).startswith("as stored" if stored_alone else "as displayed")


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
    rasterio = pytest.importorskip("rasterio")
    ids = RNG.integers(0, 7, (1, 9, 13)).astype(np.uint16)
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": 9, "width": 13, "photometric": "palette"}
    with rasterio.open(tmp_path / "c.tif", "w", **profile) as file:
        file.write_colormap(1, {k: (*color, 255) for k, color in enumerate(PLAIN.palette)})
        file.write(ids)
    np.testing.assert_array_equal(read_label(tmp_path / "c.tif", PLAIN), ids[0])
