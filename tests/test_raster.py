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
from utils.stretch import Stretch
from utils.tiling import Box

rasterio = pytest.importorskip("rasterio")
SIZE = (70, 90)


def planes(count=3, dtype="uint8", seed=0) -> np.ndarray:
    top = 256 if dtype == "uint8" else 4000
    return np.random.default_rng(seed).integers(0, top, (count, *SIZE)).astype(dtype)


@contextmanager
def opened(path, bands=None, stretch=None) -> Iterator[ImageFile]:
    with open_image(path, View(bands, stretch or Stretch())) as source:
        yield source


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
    values = np.random.default_rng(0).random((2, 30, 40)).astype(np.float16)
    writer = RasterWriter(tmp_path / "c.tif", (30, 40), "float16", 2, Georeference(), float("nan"))
    writer.describe(("one", "two"))
    writer.write(values)
    writer.close()
    with rasterio.open(tmp_path / "c.tif") as file:
        assert file.descriptions == ("one", "two")
        assert np.array_equal(file.read(), values.astype(np.float32))
