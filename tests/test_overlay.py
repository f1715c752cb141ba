"""Overlays and the files of results."""

import numpy as np
import pytest
from PIL import Image

from prediction.overlay import _outlines
from prediction.writers import PngWriter


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (17, 23), (40, 31)])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_an_outline_holds_the_pixels_near_another_class_in_their_row_or_column(size, width) -> None:
    rng = np.random.default_rng([*size, width])
    ids = np.kron(rng.choice([0, 1, 6, 255], size), np.ones((3, 3), np.uint8)).astype(np.uint8)
    expected = np.zeros(ids.shape, bool)
    for row, column in np.ndindex(*ids.shape):
        near = [
            *ids[max(0, row - width) : row + width + 1, column],
            *ids[row, max(0, column - width) : column + width + 1],
        ]
        expected[row, column] = any(other != ids[row, column] for other in near)
    np.testing.assert_array_equal(_outlines(ids, width), expected)


@pytest.mark.parametrize("n_class", [2, 256])
def test_a_png_holds_the_ids_and_the_palette_or_the_colours_that_were_written(tmp_path, n_class) -> None:
    rng = np.random.default_rng(0)
    ids, palette = rng.integers(0, n_class, (50, 33), np.uint8), [(k, 255 - k, k // 2) for k in range(256)]
    writer = PngWriter(tmp_path / "ids.png", ids.shape, palette)
    for top in range(0, 50, 7):
        writer.write(ids[None, top : top + 7])
    writer.close()
    with Image.open(tmp_path / "ids.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == [value for color in palette for value in color]
        np.testing.assert_array_equal(np.asarray(picture), ids)
    colors = rng.integers(0, 256, (3, 20, 9), np.uint8)  # without a palette
    for rows in (20, 12):
        writer = PngWriter(tmp_path / f"{rows}.png", (20, 9))
        for top in range(0, rows, 8):
            writer.write(colors[:, top : min(top + 8, rows)])
        writer.close()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "20.png")), colors.transpose(1, 2, 0))
    assert not (tmp_path / "12.png").exists()  # rows are missing
