"""The one reader: random files give the same pixels everywhere, namely those that they store."""

import sys

import numpy as np
import pytest
import torch
from files import Stored, draw_file
from PIL import Image, ImageOps

from dataset.base import Item, SegmentationDataset
from imaging.image_file import SAMPLE_SIDE, open_image, spaced
from imaging.probe import probe
from utils.classes import Classes
from utils.stretch import Stretch
from utils.tiling import Box

pytest.importorskip("rasterio")
FILES = 320


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
    assert len(kinds) > 50
    assert without > 100


def test_the_sample_is_spread_evenly_and_the_same_however_it_is_read(tmp_path) -> None:
    assert spaced(3).tolist() == [0, 1, 2]
    rows = spaced(10_000)
    assert len(rows) == SAMPLE_SIDE
    assert set(np.diff(rows)) == {9, 10}
