"""Inria Aerial and ISIC: their layouts, splits by tile, hash or list, labels whose 255 is the object."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.inria import INRIA, LAYOUT
from dataset.layout import SplitChoice, hashed_split
from dataset.loader import SampleLoader
from dataset.registry import describe
from utils.errors import InputError

CITIES = ("austin", "tyrol-w")
LAYOUTS = {
    "one folder": (".", "."),
    "two folders": ("images", "masks"),
    "2016": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
    "2017": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    "2018": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
}
FRACTIONS = {"val": 0.1, "test": 0.1}  # of ISIC's hash


def write_inria(root: Path, tiles: range = range(1, 13)) -> None:
    """Tiles of two cities with labels, and two without."""
    for folder in ("train/images", "train/gt", "test/images"):
        (root / folder).mkdir(parents=True)
    for name in [f"{city}{tile}" for city in CITIES for tile in tiles]:
        Image.new("RGB", (12, 8)).save(root / "train/images" / f"{name}.tif")
        Image.new("L", (12, 8), 255).save(root / "train/gt" / f"{name}.tif")
    for tile in (1, 2):
        Image.new("RGB", (12, 8)).save(root / "test/images" / f"sfo{tile}.tif")


def write_isic(root: Path, numbers: range, layout: str = "one folder") -> list[str]:
    """Images whose right half is lesion, 8 to 39 pixels high; returns their ids."""
    image, label = (root / folder for folder in LAYOUTS[layout])
    for folder in (image, label):
        folder.mkdir(parents=True, exist_ok=True)
    ids, ending = [f"ISIC_{number:07}" for number in numbers], "_Segmentation" if layout == "2016" else "_segmentation"
    for id_, number in zip(ids, numbers, strict=True):
        mask = np.zeros((8 + number % 32, 20), np.uint8)
        mask[:, 10:] = 255
        Image.new("RGB", mask.shape[::-1]).save(image / f"{id_}.jpg")
        Image.fromarray(mask).save(label / f"{id_}{ending}.png")
    return ids


def ids_of(name: str, root: Path, split: str, choice: SplitChoice | None = None) -> list[str]:
    return [item.id for item in describe(name, root, choice).find(split)]


@pytest.mark.parametrize("inner", ["", "AerialImageDataset"])
def test_inrias_first_five_tiles_of_each_city_are_for_validation_and_test_has_no_labels(tmp_path, inner) -> None:
    write_inria(tmp_path / inner)
    assert ids_of("inria", tmp_path, "val") == [f"{city}{tile}" for city in CITIES for tile in range(1, 6)]
    assert ids_of("inria", tmp_path, "train") == [f"{city}{tile}" for city in CITIES for tile in range(6, 13)]
    description = describe("inria", tmp_path)
    data = description.open("test", 8)
    assert (description.unlabelled, [sample.id for sample in data]) == (("test",), ["sfo1", "sfo2"])
    assert data[0].label is None


def test_lists_replace_the_default_split(tmp_path) -> None:
    write_inria(tmp_path / "set")
    lists = SplitChoice(lists=tmp_path)
    for split, names in {"train": "austin1\n\n# a remark\ntyrol-w2\n", "test": "austin9\n"}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    assert ids_of("inria", tmp_path / "set", "train", lists) == ["austin1", "tyrol-w2"]
    assert ids_of("inria", tmp_path / "set", "test", lists) == ["austin9"]
    assert describe("inria", tmp_path / "set", lists).unlabelled == ()
    with pytest.raises(InputError, match=r"split val has no list; there are .*train.txt"):
        ids_of("inria", tmp_path / "set", "val", lists)
    with pytest.raises(InputError, match=r"holds no lists; expected are train.txt, val.txt, test.txt"):
        ids_of("inria", tmp_path / "set", "train", SplitChoice(lists=tmp_path / "set"))
    for train, val, message in (
        ("austin1\n", "austin2\naustin1\n", r"share 1 ids \(austin1\)"),
        ("austin1\naustin1\n", "", "austin1 stands there more than once"),
        ("austin1.tif\n", "", r"train.txt: 1 of 1 ids have no image \(austin1.tif\).*such as austin1"),
        ("# none\n", "", "train.txt is empty"),
    ):
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "val.txt").write_text(val)
        with pytest.raises(InputError, match=message):
            ids_of("inria", tmp_path / "set", "train", lists)


def test_another_layout_of_inria_is_refused_with_the_expected_one(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no .tif images; expected is train/images/CITY1.tif"):
        ids_of("inria", tmp_path, "train")
    write_inria(tmp_path)
    (tmp_path / "train/gt/austin7.tif").unlink()
    with pytest.raises(InputError, match=r"1 of 14 images have no label: .*austin7.tif; expected") as error:
        ids_of("inria", tmp_path, "train")
    assert LAYOUT in str(error.value)
    (tmp_path / "train/images/austin7.tif").rename(tmp_path / "train/images/austin.tif")
    with pytest.raises(InputError, match=r"austin.tif: the name is not a city and a number.*--split_lists"):
        ids_of("inria", tmp_path, "train")
    write_inria(tmp_path / "few", range(1, 3))
    with pytest.raises(InputError, match=r"split train is empty.*tiles 1 to 5 of each city are val"):
        ids_of("inria", tmp_path / "few", "train")


def test_white_is_building_in_every_form_and_smoothed_labels_are_refused(tmp_path) -> None:
    write_inria(tmp_path)
    expected = np.random.default_rng(0).integers(0, 2, (8, 12), np.uint8)
    grey = Image.fromarray(expected * 255)
    for image in (grey, grey.convert("1"), grey.convert("RGB"), grey.convert("P")):
        image.save(tmp_path / "train/gt/austin6.tif")
        np.testing.assert_array_equal(describe("inria", tmp_path).open("train", 8)[0].label, expected, image.mode)
    Image.new("L", (12, 8), 128).save(tmp_path / "train/gt/austin6.tif")
    smoothed = r"austin6.tif: grey 128 at row 0, column 0 \(96 such .*0 \(background\), 255 \(building\).*thresh"
    with pytest.raises(InputError, match=smoothed):
        describe("inria", tmp_path).open("train", 8)[0]
    assert (INRIA.left_out, INRIA.measures) == ((0,), ("accuracy",))  # so the mIoU is the IoU of buildings


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_isic_is_found_and_more_images_move_none_to_another_split(tmp_path, layout) -> None:
    written = write_isic(tmp_path, range(40), layout)
    (tmp_path / LAYOUTS[layout][0] / "ISIC_0000001_superpixels.png").touch()
    before = {split: ids_of("isic", tmp_path, split) for split in ("train", "val", "test")}
    assert sorted(id_ for names in before.values() for id_ in names) == written
    label = describe("isic", tmp_path).open("train", 8)[0].label
    assert (label[:, :10] == 0).all() and (label[:, 10:] == 1).all()
    (batch, *_) = SampleLoader(describe("isic", tmp_path).open("train", 8), batch_size=6)  # of images of mixed sizes
    assert len({sample.image.shape for sample in batch}) == 6
    assert all(sample.label.shape == sample.image.shape[1:] for sample in batch)
    write_isic(tmp_path, range(100, 140), layout)
    for split, names in before.items():
        assert set(names) <= set(ids_of("isic", tmp_path, split))
    (tmp_path / "val.txt").write_text("\n".join(written[:3]))
    assert ids_of("isic", tmp_path, "val", SplitChoice(lists=tmp_path)) == written[:3]


def test_the_hash_splits_by_seed_and_id_alone() -> None:
    names = [f"ISIC_{number:07}" for number in range(4000)]
    splits = [hashed_split(name, FRACTIONS, 0) for name in names]
    counts = Counter(splits)
    assert counts.keys() == {"train", "val", "test"}
    assert abs(counts["val"] - 400) < 60 and abs(counts["test"] - 400) < 60
    # pinned: another machine or version that dealt differently would test on what was trained on
    assert " ".join(splits[:8]) == "train train val train test train train train"
    assert splits != [hashed_split(name, FRACTIONS, 1) for name in names]


def test_another_layout_of_isic_missing_labels_duplicates_and_empty_splits_are_refused(tmp_path) -> None:
    expected = r"no images of ISIC; expected is ISIC_0000000.jpg .* with .*_segmentation.png"
    with pytest.raises(InputError, match=expected):
        ids_of("isic", tmp_path, "train")
    (only,) = write_isic(tmp_path, range(1, 2))
    empty = next(split for split in ("val", "test") if hashed_split(only, FRACTIONS, 0) != split)
    with pytest.raises(InputError, match=rf"split {empty} is empty.*--split_lists"):
        ids_of("isic", tmp_path, empty)
    names = write_isic(tmp_path, range(30))
    name = ids_of("isic", tmp_path, "train")[0]
    assert name in names
    (tmp_path / f"{name}_segmentation.png").unlink()
    with pytest.raises(InputError, match=rf"images have no label: .*{name}.jpg; expected is ISIC_"):
        ids_of("isic", tmp_path, "train")
    write_isic(tmp_path, range(int(name[5:]), int(name[5:]) + 1), "two folders")
    with pytest.raises(InputError, match=rf"{name}.jpg and .*{name}.jpg are both {name}'s"):
        ids_of("isic", tmp_path, "train")
