"""Scenes of Dubai: nine parts are one image, splits go by tiles, and what is wrong on disk is refused by name."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from files import WHERE, write_raster
from PIL import Image

import train_deep_globe
from dataset.dubai import DUBAI, main
from dataset.layout import SplitChoice
from dataset.pairs import Item, JoinedParts, PairReader
from dataset.registry import describe
from utils.classes import IGNORED
from utils.errors import InputError
from utils.tiling import Box

HEIGHTS, WIDTHS = (7, 6, 7), (10, 11, 10)
"""Of the parts, as published ones differ by a pixel."""

COLORS = np.array([*DUBAI.palette, *DUBAI.ignored], np.uint8)
"""By code: five classes, then what counts nowhere."""


def write_tile(root: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A tile of random colours, its fifth mask with a palette; returns image (3, H, W) and ids (H, W)."""
    rng = np.random.default_rng(number)
    size = sum(HEIGHTS), sum(WIDTHS)
    pixels, codes = rng.integers(0, 256, (3, *size), np.uint8), rng.integers(0, len(COLORS), size)
    folder = root / f"Tile {number}"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k in range(9):
        row, column = divmod(k, 3)
        box = Box(sum(HEIGHTS[:row]), sum(WIDTHS[:column]), HEIGHTS[row], WIDTHS[column])
        part, own = (box.of(torch.from_numpy(whole)).numpy() for whole in (pixels, codes))
        mask = Image.fromarray(COLORS[own])
        (mask.quantize(len(COLORS)) if k == 4 else mask).save(folder / "masks" / f"image_part_{k + 1:03d}.png")
        image = Image.fromarray(part.transpose(1, 2, 0))
        image.save(folder / "images" / f"image_part_{k + 1:03d}.jpg", "PNG")
    return pixels, np.where(codes < len(DUBAI), codes, IGNORED)


def write_set(root: Path, tiles=range(1, 9)) -> Path:
    for number in tiles:
        write_tile(root, number)
    return root


def ids(root: Path, split: str, choice: SplitChoice | None = None) -> list[str]:
    return [item.id for item in describe("dubai", root, choice).find(split)]


def test_nine_parts_are_read_as_one_image_and_one_label_or_any_box_of_them(tmp_path) -> None:
    pixels, expected = write_tile(tmp_path, 1)
    (sample,) = describe("dubai", tmp_path).open("train", 8)
    assert sample.id == "tile1"
    np.testing.assert_array_equal(sample.image, pixels)
    np.testing.assert_array_equal(sample.label, expected)
    (item,) = describe("dubai", tmp_path).find("train")
    reader, rng = PairReader(DUBAI), np.random.default_rng(0)
    assert reader.size(item) == expected.shape
    for _ in range(40):
        (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in expected.shape)
        box = Box(int(top), int(left), int(bottom - top), int(right - left))
        found, found_ids = reader.read(item, box)
        np.testing.assert_array_equal(found, box.of(torch.from_numpy(pixels)))
        np.testing.assert_array_equal(found_ids, box.of(torch.from_numpy(expected)))


def test_parts_that_a_box_does_not_touch_are_not_read(tmp_path) -> None:
    write_tile(tmp_path, 1)
    (item,) = describe("dubai", tmp_path).find("train")
    reader = PairReader(DUBAI)
    reader.size(item)  # the grid needs all headers
    for pair in (pair for k, pair in enumerate(item.pairs()) if k not in (4, 5)):
        for path in pair:
            path.unlink()
    reader.read(item, Box(HEIGHTS[0], WIDTHS[0], HEIGHTS[1], WIDTHS[1] + WIDTHS[2]))
    with pytest.raises(InputError, match=r"Tile 1/images/image_part_001.jpg cannot be read"):
        reader.read(item, Box(HEIGHTS[0] - 1, WIDTHS[0] - 1, 2, 2))


def test_parts_may_be_rasters(tmp_path) -> None:
    pytest.importorskip("rasterio")
    values = np.random.default_rng(0).integers(0, 256, (3, 20, 30), np.uint8)
    for k in (0, 1):
        write_raster(tmp_path / f"{k}.tif", values[:, :, 15 * k : 15 * k + 15], **WHERE)
    item = Item("joined", JoinedParts(((tmp_path / "0.tif", tmp_path / "1.tif"),)), None)
    found, label = PairReader(DUBAI).read(item, Box(3, 10, 9, 12))
    np.testing.assert_array_equal(found, values[:, 3:12, 10:22])
    assert label is None


def test_scenes_are_written_as_pictures_for_prediction(tmp_path, capsys) -> None:
    pixels, _ = write_tile(tmp_path / "set", 3)
    assert main([str(tmp_path / "set"), "tile3", "--output", str(tmp_path / "scenes")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "scenes" / "tile3.png")), pixels.transpose(1, 2, 0))
    assert main([str(tmp_path / "set"), "tile4", "--output", str(tmp_path / "scenes")]) == 2
    assert "has no tile4; choose from tile3" in capsys.readouterr().err


def test_splits_go_by_tile_and_lists_or_a_scene_that_is_held_out_replace_them(tmp_path) -> None:
    """The tiles may lie in the only folder."""
    root = write_set(tmp_path / "set" / "Semantic segmentation dataset").parent
    assert ids(root, "train") == ["tile1", "tile2", "tile5", "tile7"]
    assert ids(root, "val") == ["tile3", "tile6"]
    assert ids(root, "test") == ["tile4", "tile8"]
    (tmp_path / "train.txt").write_text("tile3\n")
    assert ids(root, "train", SplitChoice(lists=tmp_path)) == ["tile3"]
    write_set(tmp_path, (1, 3, 4, 7))
    choice = SplitChoice(hold_out="tile7")
    assert describe("dubai", tmp_path, choice).splits == ("train", "val")
    assert ids(tmp_path, "val", choice) == ["tile7"]
    assert ids(tmp_path, "train", choice) == ["tile1", "tile3", "tile4"]
    with pytest.raises(InputError, match=r"--hold_out tile2 is no scene that is there; choose one of tile1, tile3"):
        ids(tmp_path, "val", SplitChoice(hold_out="tile2"))
    for name, lists in (("inria", None), ("dubai", Path("lists"))):
        with pytest.raises(InputError, match="--hold_out goes with dubai, where no lists are given"):
            describe(name, tmp_path, SplitChoice(hold_out="tile1", lists=lists))


def test_missing_tiles_are_told_once_and_an_empty_split_is_refused(tmp_path, caplog) -> None:
    write_set(tmp_path, (1, 3, 6, 7))
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path, "train") == ["tile1", "tile7"]
        assert ids(tmp_path, "val") == ["tile3", "tile6"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 2 of the 4 tiles of train are not there (tile2, tile5); going on without"
    ]
    with pytest.raises(InputError, match=r"split test is empty.*train: 1 2 5 7; val: 3 6; test: 4 8"):
        ids(tmp_path, "test")


PIXELS = np.tile(COLORS[0], (HEIGHTS[0], WIDTHS[0], 1))
PIXELS[2, 3] = (60, 16, 153)
HIGHER = np.zeros((HEIGHTS[1] + 1, WIDTHS[1], 3), np.uint8)

WRONG = {  # what becomes of a file of the tile (None: it goes), what is said, and whether the other tile is counted
    "masks/image_part_001.png": (PIXELS, r"\S+: colour \(60, 16, 153\) at row 2, column 3 is no class's \(1 ", True),
    "images/image_part_005.jpg": (
        HIGHER,
        r"\S+ is 7 x 11 pixels, but its place in the scene is 6 x 11: parts in one row have one height, parts in one "
        "column one width",
        True,
    ),
    "masks/image_part_005.png": (HIGHER, r"\S+ is 7 x 11 pixels, but its image is 6 x 11", False),
    "masks/image_part_007.png": (None, r"1 of 18 parts are missing: .*image_part_007.png; exp", False),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_the_name_of_the_file_by_check_data_too(tmp_path, capsys, name) -> None:
    write_set(tmp_path, (1, 3))
    (pixels, message, counted), path = WRONG[name], tmp_path / "Tile 1" / name
    path.unlink()
    if pixels is not None:
        Image.fromarray(pixels).save(path, "PNG")
    with pytest.raises(InputError, match=message) as refused:
        describe("dubai", tmp_path).open("train", 8)[0]
    assert name in str(refused.value)
    assert train_deep_globe.main(["--dataset=dubai", f"--data_path={tmp_path}", "--check_data", "--num_workers=0"]) == 2
    found = " ".join(capsys.readouterr().out.split())
    assert re.search(message, found) and name in found, found
    assert not counted or "Read: 1 of train, 1 of val" in found


def test_grey_masks_other_layouts_and_other_numbers_of_classes_than_five_are_refused(tmp_path) -> None:
    """Id 0 is no building where black counts nowhere."""
    write_tile(tmp_path, 1)
    Image.new("L", (WIDTHS[0], HEIGHTS[0])).save(tmp_path / "Tile 1/masks/image_part_001.png")
    with pytest.raises(InputError, match=r"image_part_001.png: grey 0 at row 0"):
        describe("dubai", tmp_path).open("train", 8)[0]
    with pytest.raises(InputError, match=r"has no tiles of Dubai; expected is 'Tile 1/images/image_part_001.jpg'"):
        ids(tmp_path / "Tile 1", "train")
    assert (len(DUBAI), DUBAI.left_out) == (5, ())
    with pytest.raises(InputError, match="has 5 classes; leave it out"):
        describe("dubai", tmp_path).classes_for(6)
