"""Inria Aerial: its layout, its splits, and labels whose 255 is building."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.inria import INRIA, LAYOUT
from dataset.layout import SplitChoice
from dataset.registry import describe
from utils.errors import InputError

CITIES = ("austin", "tyrol-w")


def write_set(root: Path, tiles: range = range(1, 13)) -> None:
    """Tiles of two cities with labels, and two without."""
    for folder in ("train/images", "train/gt", "test/images"):
        (root / folder).mkdir(parents=True)
    for name in [f"{city}{tile}" for city in CITIES for tile in tiles]:
        Image.new("RGB", (12, 8)).save(root / "train/images" / f"{name}.tif")
        Image.new("L", (12, 8), 255).save(root / "train/gt" / f"{name}.tif")
    for tile in (1, 2):
        Image.new("RGB", (12, 8)).save(root / "test/images" / f"sfo{tile}.tif")


def ids(root: Path, split: str, choice: SplitChoice | None = None) -> list[str]:
    return [item.id for item in describe("inria", root, choice).find(split)]


@pytest.mark.parametrize("inner", ["", "AerialImageDataset"])
def test_the_first_five_tiles_of_each_city_are_for_validation(tmp_path, inner) -> None:
    write_set(tmp_path / inner)
    assert ids(tmp_path, "val") == [f"{city}{tile}" for city in CITIES for tile in range(1, 6)]
    assert ids(tmp_path, "train") == [f"{city}{tile}" for city in CITIES for tile in range(6, 13)]


def test_test_images_have_no_labels(tmp_path) -> None:
    write_set(tmp_path)
    description = describe("inria", tmp_path)
    assert description.unlabelled == ("test",)
    data = description.open("test", 8)
    assert [sample.id for sample in data] == ["sfo1", "sfo2"]
    assert data[0].label is None


def test_lists_replace_the_default_split(tmp_path) -> None:
    write_set(tmp_path / "set")
    lists = SplitChoice(lists=tmp_path)
    for split, names in {"train": "austin1\n\n# a remark\ntyrol-w2\n", "test": "austin9\n"}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    assert ids(tmp_path / "set", "train", lists) == ["austin1", "tyrol-w2"]
    assert ids(tmp_path / "set", "test", lists) == ["austin9"]
    assert describe("inria", tmp_path / "set", lists).unlabelled == ()
    with pytest.raises(InputError, match=r"split val has no list; there are .*train.txt"):
        ids(tmp_path / "set", "val", lists)
    with pytest.raises(InputError, match=r"holds no lists; expected are train.txt, val.txt, test.txt"):
        ids(tmp_path / "set", "train", SplitChoice(lists=tmp_path / "set"))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("austin1\n", "austin2\naustin1\n", r"share 1 ids \(austin1\)"),
        ("austin1\naustin1\n", "", "austin1 stands there more than once"),
        ("austin1.tif\n", "", r"train.txt: 1 of 1 ids have no image \(austin1.tif\).*such as austin1"),
        ("# none\n", "", "train.txt is empty"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, train, val, message) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "val.txt").write_text(val)
    with pytest.raises(InputError, match=message):
        ids(tmp_path / "set", "train", SplitChoice(lists=tmp_path))


def test_another_layout_is_refused_with_the_expected_one(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no .tif images; expected is train/images/CITY1.tif"):
        ids(tmp_path, "train")
    write_set(tmp_path)
    (tmp_path / "train/gt/austin7.tif").unlink()
    with pytest.raises(InputError, match=r"1 of 14 images have no label: .*austin7.tif; expected") as error:
        ids(tmp_path, "train")
    assert LAYOUT in str(error.value)
    (tmp_path / "train/images/austin7.tif").rename(tmp_path / "train/images/austin.tif")
    with pytest.raises(InputError, match=r"austin.tif: the name is not a city and a number.*--split_lists"):
        ids(tmp_path, "train")
    write_set(tmp_path / "few", range(1, 3))
    with pytest.raises(InputError, match=r"split train is empty.*tiles 1 to 5 of each city are val"):
        ids(tmp_path / "few", "train")


@pytest.mark.parametrize("form", ["grey", "one bit", "rgb", "palette"])
def test_white_is_building_in_every_form_and_smoothed_labels_are_refused(tmp_path, form) -> None:
    write_set(tmp_path)
    expected = np.random.default_rng(0).integers(0, 2, (8, 12), np.uint8)
    grey = Image.fromarray(expected * 255)
    image = {"grey": grey, "one bit": grey.convert("1"), "rgb": grey.convert("RGB"), "palette": grey.convert("P")}[form]
    image.save(tmp_path / "train/gt/austin6.tif")
    np.testing.assert_array_equal(describe("inria", tmp_path).open("train", 8)[0].label, expected)
    Image.new("L", (12, 8), 128).save(tmp_path / "train/gt/austin6.tif")
    smoothed = r"austin6.tif: grey 128 at row 0, column 0 \(96 such .*0 \(background\), 255 \(building\).*thresh"
    with pytest.raises(InputError, match=smoothed):
        describe("inria", tmp_path).open("train", 8)[0]
    assert (INRIA.left_out, INRIA.measures) == ((0,), ("accuracy",))  # so the mIoU is the IoU of buildings
