"""GeoTIFF: windows, bands, stretch, missing data, and the georeference there and back."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pictures import PROJECTED, random_image, write_raster

from imaging.georeference import Georeference, read_georeference
from imaging.image_file import ImageFile, View, open_image
from imaging.probe import RASTERIO, probe
from imaging.raster_writer import BLOCK, RasterWriter
from utils.errors import InputError
from utils.stretch import Stretch
from utils.tiling import Box

rasterio = pytest.importorskip("rasterio")
SIZE = (70, 90)
WINDOW = Box(11, 20, 30, 40)


def planes(count=3, dtype="uint8", seed=0) -> np.ndarray:
    top = 256 if dtype == "uint8" else 4000
    return np.random.default_rng(seed).integers(0, top, (count, *SIZE)).astype(dtype)


@contextmanager
def opened(path, bands=None, stretch=None) -> Iterator[ImageFile]:
    with open_image(path, View(bands, stretch or Stretch())) as source:
        yield source


def test_windows_are_those_of_the_whole_image(tmp_path):
    values = planes()
    with opened(write_raster(tmp_path / "a.tif", values)) as raster:
        assert raster.size == SIZE
        assert torch.equal(raster.read(WINDOW), WINDOW.of(torch.from_numpy(values)))


@pytest.mark.parametrize(
    ("count", "bands", "expected"),
    [
        (1, None, (0, 0, 0)),
        (2, None, (0, 0, 0)),
        (4, None, (0, 1, 2)),
        (4, (4, 3, 2), (3, 2, 1)),
        (4, (2,) * 3, (1,) * 3),
    ],
)
def test_bands(tmp_path, count, bands, expected):
    values = planes(count)
    # GDAL would take the fourth of four bands for transparency
    path = write_raster(tmp_path / "a.tif", values, photometric="minisblack", alpha="no")
    with opened(path, bands) as raster:
        assert torch.equal(raster.read(WINDOW), WINDOW.of(torch.from_numpy(values[list(expected)])))


def test_a_band_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--bands 1,2,4.*a\.tif has 3"):
        opened(write_raster(tmp_path / "a.tif", planes()), (1, 2, 4)).__enter__()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_more_than_8_bits_are_stretched_alike_in_every_window(tmp_path, dtype):
    values = planes(dtype=dtype)
    with opened(write_raster(tmp_path / "a.tif", values)) as raster:
        whole = raster.read(Box(0, 0, *SIZE))
        assert torch.equal(raster.read(WINDOW), WINDOW.of(whole))
    assert whole.min() == 0
    assert whole.max() == 255
    with opened(tmp_path / "a.tif", stretch=Stretch.parse("0,4000")) as raster:
        fixed = raster.read(Box(0, 0, *SIZE)).float()
    assert (fixed - torch.from_numpy(values.astype(np.float32)) * 255 / 4000).abs().max() <= 0.51


def test_missing_data_are_read_as_black_and_known(tmp_path):
    values = planes(dtype="uint16") + 1
    values[:, 20:30] = 65535
    with opened(write_raster(tmp_path / "a.tif", values, nodata=65535)) as raster:
        assert raster.read(Box(20, 0, 10, 90)).max() == 0
        valid = raster.valid(Box(0, 0, *SIZE))
        assert not valid[20:30].any()
        assert valid.sum() == 60 * 90
        # percentiles are those of the data: 65535 would make all else dark
        assert raster.read(Box(0, 0, 20, 90)).float().mean() > 100


def test_colour_tables_are_applied(tmp_path):
    values = (planes(1) % 2).astype(np.uint8)
    write_raster(tmp_path / "a.tif", values)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_colormap(1, {0: (10, 20, 30, 255), 1: (40, 50, 60, 255)})
    with opened(tmp_path / "a.tif") as raster:
        found = raster.read(Box(0, 0, *SIZE))
    assert torch.equal(found[1] == 50, torch.from_numpy(values[0] == 1))


def test_which_files_are_read_in_windows(tmp_path):
    from PIL import Image

    Image.fromarray(planes().transpose(1, 2, 0)).save(tmp_path / "plain.tif")
    assert probe(write_raster(tmp_path / "geo.tif", planes())).decoder == RASTERIO
    deep = write_raster(tmp_path / "deep.tif", planes(dtype="uint16"), crs=None, transform=None)
    assert probe(deep).decoder == RASTERIO
    assert probe(tmp_path / "plain.tif").decoder != RASTERIO


@pytest.mark.parametrize("rows", [1, 100, BLOCK, 700])
def test_what_is_written_by_rows_is_read_back_with_its_georeference(tmp_path, rows):
    ids = random_image((700, 300))[:1] % 7
    reference = read_georeference(probe(write_raster(tmp_path / "a.tif", planes())))
    writer = RasterWriter(tmp_path / "b.tif", (700, 300), "uint8", 1, reference, 255)
    writer.colors({3: (1, 2, 3)})
    for top in range(0, 700, rows):
        writer.write(ids[:, top : top + rows].numpy())
    writer.close()
    with rasterio.open(tmp_path / "b.tif") as file:
        assert file.crs == rasterio.CRS.from_string(PROJECTED)
        assert file.transform == reference.keywords["transform"]
        assert file.nodata == 255
        assert file.colormap(1)[3] == (1, 2, 3, 255)
        assert np.array_equal(file.read(), ids.numpy())


def test_half_floats_come_back(tmp_path):
    values = np.random.default_rng(0).random((2, 30, 40)).astype(np.float16)
    writer = RasterWriter(tmp_path / "a.tif", (30, 40), "float16", 2, Georeference(), float("nan"))
    writer.describe(("one", "two"))
    writer.write(values)
    writer.close()
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.descriptions == ("one", "two")
        assert np.array_equal(file.read(), values.astype(np.float32))


def test_a_raster_cut_short_is_refused_by_name(tmp_path):
    path = write_raster(tmp_path / "a.tif", planes())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"a\.tif cannot be read"), open_image(path) as source:
        source.read(Box(0, 0, *SIZE))


def test_without_rasterio_there_is_a_clear_line(tmp_path, monkeypatch):
    path = write_raster(tmp_path / "a.tif", planes())
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(InputError, match="pip install rasterio"):
        read_georeference(probe(path))
    # its pixels are plain: training needs no more
    with open_image(path) as source:
        assert torch.equal(source.read(Box(0, 0, *SIZE)), torch.from_numpy(planes()))
