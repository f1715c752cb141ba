"""Files that hold several images: none is taken for the whole, and GDAL's formats are read where GDAL reads them."""

from pathlib import Path

import numpy as np
import pytest
from files import WHERE, read_label, write_raster
from PIL import Image

from imaging.image_file import open_image
from imaging.probe import probe
from prediction.run import find_images
from utils.classes import Classes
from utils.errors import InputError
from utils.tiling import Box

RNG = np.random.default_rng(0)
SIZE = (40, 60)


def picture(size: tuple[int, int] = SIZE, bands: tuple[int, ...] = (3,)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (*size, *bands)).astype(np.uint8))


def several(path: Path, first: Image.Image, *others: Image.Image) -> Path:
    first.save(path, save_all=True, append_images=others)
    return path


def pixels(path: Path) -> np.ndarray:
    with open_image(path) as image:
        return image.read(Box(0, 0, *image.size)).numpy()


@pytest.mark.parametrize("case", ["bands", "thumbnail first", "another shape", "gif", "png", "webp", "nitf"])
def test_a_file_of_several_images_is_refused_as_image_and_as_label(tmp_path, case) -> None:
    grey = picture(bands=())
    if case == "bands":
        path = several(tmp_path / "a.tif", grey, picture(bands=()), picture(bands=()))
    elif case == "thumbnail first":
        path = several(tmp_path / "a.tif", picture((10, 15)), picture())
    elif case == "another shape":
        path = several(tmp_path / "a.tif", picture(), picture((20, 60)))
    elif case == "nitf":
        shutil = pytest.importorskip("rasterio.shutil")
        shutil.copy(
            write_raster(tmp_path / "b.tif", np.asarray(grey)[None]), path := tmp_path / "a.ntf", "NITF", NUMI=2
        )
    else:
        path = several(tmp_path / f"a.{case}", picture(), picture())
    for read in (pixels, lambda path: read_label(path, Classes.generic(3))):
        with pytest.raises(InputError, match=rf"{path.name} cannot be used: it holds several images .*; save the one"):
            read(path)


def test_copies_masks_and_previews_are_not_several_images(tmp_path) -> None:
    whole = picture()
    late = several(tmp_path / "a.tif", whole, picture((10, 15)))  # a preview that does not say so
    np.testing.assert_array_equal(pixels(late), np.asarray(whole).transpose(2, 0, 1))
    assert probe(several(tmp_path / "a.gif", whole)).size == SIZE
    whole.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture((10, 15))])
    assert probe(tmp_path / "a.jpg").size == SIZE


def test_overviews_and_masks_of_a_raster_are_not_several_images(tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = RNG.integers(0, 255, (3, 300, 411)).astype(np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(write_raster(tmp_path / "a.tif", values), "r+") as file:
            file.write_mask(np.full(values.shape[1:], 255, np.uint8))
        with rasterio.open(tmp_path / "a.tif", "r+") as file:
            file.build_overviews([2, 4, 8])
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), values)


@pytest.mark.parametrize("form", ["NC", "NC4"])
def test_netcdf_and_hdf5_are_read_and_their_parts_can_be_saved(tmp_path, form) -> None:
    """NC4 is HDF5, which Pillow knows by name alone."""
    shutil = pytest.importorskip("rasterio.shutil")
    values = RNG.integers(0, 255, (3, *SIZE)).astype(np.uint8)
    for path, source in ((tmp_path / "one.nc", values[:1]), (tmp_path / "three.nc", values)):
        shutil.copy(write_raster(tmp_path / "a.tif", source, **WHERE), path, "netCDF", FORMAT=form)
    np.testing.assert_array_equal(pixels(tmp_path / "one.nc"), values[[0, 0, 0]])
    with pytest.raises(InputError, match=r"no bands of its own; save one .* file: rio convert 'netcdf:.*Band1' part"):
        probe(tmp_path / "three.nc")


@pytest.mark.parametrize("name", ['NETCDF:"a.nc":band', "/vsizip/a.zip/a.tif", "https://example.org/a.tif"])
def test_a_name_that_is_no_file_is_refused_with_what_helps(name) -> None:
    with pytest.raises(InputError, match=r"only files are read: save it as one, where GDAL opens it: rio convert"):
        find_images([name])
    with pytest.raises(InputError, match=r"there is no image$"):
        find_images(["a.tif"])
