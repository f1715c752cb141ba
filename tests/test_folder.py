"""A data set of one's own: found by its file, split as it says, described by looking at its labels."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.base import Item
from dataset.describe import main
from dataset.folder import FolderFile
from dataset.registry import Description, describe
from utils.errors import InputError

RNG = np.random.default_rng(0)
COLORS = np.array([(0, 0, 0), (200, 0, 0), (0, 90, 0)], np.uint8)
NAMES = tuple(f"img{k}" for k in range(10))


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pairs(
    root: Path,
    images: str = "{id}.png",
    labels: str = "{id}_mask.png",
    values: np.ndarray | tuple[Any, ...] = (0, 255),
    names: tuple[str, ...] = NAMES,
) -> dict[str, np.ndarray]:
    """Grey images and labels that show `values`; returns the ids of each."""
    values = np.array(values, np.uint8)
    found = {}
    for name in names:
        found[name] = RNG.integers(0, len(values), (6, 9))
        write(root / images.replace("{id}", name), RNG.integers(0, 255, (6, 9), np.uint8))
        write(root / labels.replace("{id}", name), values[found[name]])
    return found


def record(**changes: Any) -> dict[str, Any]:
    """A file's contents that need nothing else."""
    classes = [{"name": "skin", "value": 0, "counts": False}, {"name": "lesion", "value": 255, "foreground": True}]
    return {"images": "{id}.png", "labels": "{id}_mask.png", "classes": classes, **changes}


def written(folder: Path, **changes: Any) -> Description:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(record(**changes)))
    return describe("folder", folder)


def ids(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def run(root: Path, *options: str, images: str = "{id}.png", labels: str = "{id}_mask.png") -> int:
    return main([str(root), "--images", images, "--labels", labels, "--quiet", *options])


def test_labels_beside_their_images_are_no_images(tmp_path: Path) -> None:
    expected = write_pairs(tmp_path)
    description = written(tmp_path, splits={"fractions": {}})
    assert description.splits == ("train",)
    data = description.open("train", 8)
    assert ids(data.items) == list(NAMES)
    for sample in data:
        np.testing.assert_array_equal(sample.label, expected[sample.id])


def test_the_more_special_pattern_owns_a_file_that_fits_both(tmp_path: Path) -> None:
    write_pairs(tmp_path, images="{id}_image.png", labels="{id}.png")
    description = written(tmp_path, images="{id}_image.png", labels="{id}.png", splits={"fractions": {}})
    assert ids(description.find("train")) == list(NAMES)


def test_two_folders_and_any_suffix(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", "a/{id}.png", "b/{id}.tif", names=NAMES[:5])
    write_pairs(tmp_path / "set", "a/{id}.bmp", "b/{id}.tif", names=NAMES[5:])
    description = written(
        tmp_path / "files", root="../set", images="a/{id}.*", labels="b/{id}.tif", splits={"fractions": {}}
    )
    assert ids(description.find("train")) == list(NAMES)


def test_splits_by_lists_folders_and_fractions_are_exact(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    (tmp_path / "a.txt").write_text("img3\nimg1\n")
    (tmp_path / "b.txt").write_text("img0\n")
    lists = written(tmp_path, splits={"lists": {"train": "a.txt", "test": "b.txt"}})
    assert (lists.splits, lists.validation) == (("train", "test"), "train")
    assert (ids(lists.find("train")), ids(lists.find("test"))) == (["img1", "img3"], ["img0"])

    for folder, names in {"training": NAMES[:4], "held": NAMES[4:]}.items():
        write_pairs(tmp_path / "by", f"{folder}/x/{{id}}.png", f"{folder}/y/{{id}}.png", names=names)
    patterns = {"images": "{split}/x/{id}.png", "labels": "{split}/y/{id}.png"}
    folders = written(tmp_path / "by", **patterns, splits={"folders": {"train": "training", "val": "held"}})
    assert (folders.splits, folders.validation) == (("train", "val"), "val")
    assert (ids(folders.find("train")), ids(folders.find("val"))) == (list(NAMES[:4]), list(NAMES[4:]))

    parts = written(tmp_path, splits={"fractions": {"val": 0.3, "test": 0.3}, "seed": 1})
    found = [ids(parts.find(split)) for split in ("train", "val", "test")]
    assert sorted(chain(*found)) == list(NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "the file has the unknown entry 'colour'; known are root, images"),
        ({"images": "pictures/*.png"}, "images 'pictures/[*].png' must be a path whose last part has {id} once"),
        ({"images": "{id}/a.png"}, "must be a path whose last part has {id} once"),
        ({"images": "{id}/{id}.png"}, "{id} in a folder's name"),
        ({"labels": "{id}.json"}, "labels '{id}.json' ends in no image's suffix; use one of .jpg"),
        ({"labels": "{id}.png"}, "images and labels are both {id}.png"),
        ({"images": "{split}/{id}.png"}, "has {split}, but splits are given by no folders"),
        ({"splits": {"folders": {"train": "a"}}}, "lacks {split}, but splits are given by the folders"),
        ({"splits": {}}, "splits must have one of lists, folders and fractions, not none"),
        ({"splits": {"fractions": {"val": 1.0}}}, "fractions must be 0 or more and together below 1"),
        ({"splits": {"fractions": {"valid": 0.1}}}, "splits.fractions has the unknown entry 'valid'; known are val"),
        ({"splits": {"lists": {"val": "a.txt"}}}, "splits.lists must give a path for train"),
        ({"classes": [{"name": "a"}]}, "classes must be a list of 2 to"),
        ({"classes": [{"name": "a"}, {"value": 1}]}, r"classes\[1\].name must be a text"),
        ({"classes": [{"name": "a"}, {"name": "b", "value": 1}]}, "either all classes have a value, or none has"),
        ({"classes": [{"name": "a", "value": 3}, {"name": "b", "value": 3}]}, "3 stands for more than one"),
        ({"classes": [{"name": "a", "color": [0, 0]}, {"name": "b"}]}, r"classes\[0\].color .* three numbers"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "two classes have the same name"),
        ({"classes": [{"name": k, "counts": False} for k in "ab"]}, "no class counts in the metric"),
        ({"classes": [{"name": k, "foreground": True} for k in "ab"]}, "every class is foreground"),
        ({"classes": [{"name": k} for k in "ab"], "measures": ["jaccard"]}, "need a class with foreground true"),
        ({"measures": ["dice"]}, "must be a list of names out of accuracy, jaccard"),
        ({"ignored": [0]}, "0 stands for more than one of the classes and ignored"),
        ({"ignored": 255}, "ignored must be a list of grey values and colours"),
        *(({"bands": value}, "bands .* must be a list of 1 to 16") for value in ([], [0], "1,2", [True], [1] * 17)),
        *(({"stretch": value}, "stretch .* must be a text") for value in ("9,1", [0, 9], "a")),
        (
            {"classes": [{"name": "a", "value": 9, "color": [5, 5, 5]}, {"name": "b", "value": 5}]},
            "class a has the grey colour .* which is another class's value",
        ),
    ],
)
def test_a_wrong_entry_is_refused_by_file_and_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"dataset.json: .*{message}"):
        written(tmp_path, **changes)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset.json cannot be read: .*dataset.describe --help"):
        describe("folder", tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset.json is not JSON"):
        describe("folder", tmp_path)
    with pytest.raises(InputError, match=r"no file is called .*/\{id\}.png; mend root and images"):
        written(tmp_path).find("train")
    write_pairs(tmp_path)
    (tmp_path / "img0_mask.png").unlink()
    with pytest.raises(InputError, match=r"have no label: .*img0.png; expected is \{id\}_mask.png for each"):
        written(tmp_path, splits={"fractions": {}}).find("train")


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    changes = {"ignored": [7, [9, 9, 200]], "measures": ["jaccard"], "splits": {"lists": {"train": "a.txt"}}}
    file = FolderFile.from_record(record(**changes), tmp_path)
    again = FolderFile.from_record(json.loads(json.dumps(file.to_record())), tmp_path)
    assert again == file
    assert again.classes.ignored == (7, (9, 9, 200))


def test_describe_makes_two_classes_of_black_and_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write_pairs(tmp_path)
    one_bit = Image.open(tmp_path / "img0_mask.png").convert("1")
    one_bit.save(tmp_path / "img0_mask.png")
    Image.open(tmp_path / "img1_mask.png").convert("RGB").save(tmp_path / "img1_mask.png")
    assert run(tmp_path, "--names", "skin", "lesion") == 0
    white = sum(int(label.sum()) for label in expected.values())
    assert f"255  {white:>13}  {100 * white / 540:>6.2f} %      10  lesion" in capsys.readouterr().out
    description = describe("folder", tmp_path)
    assert description.classes.names == ("skin", "lesion")
    assert (description.classes.left_out, description.classes.foreground) == ((0,), (1,))
    assert description.classes.measures == ("jaccard", "accuracy")
    assert len(description.find("val")) == 2  # 0.2 of 10, exactly: the seed is chosen so
    for split in description.splits:
        for sample in description.open(split, 8):
            np.testing.assert_array_equal(sample.label, expected[sample.id])


def test_describe_makes_a_class_of_each_colour(tmp_path: Path) -> None:
    expected = write_pairs(tmp_path, values=COLORS)
    # one label that shows black alone is grey by itself, but the set is not
    write(tmp_path / "img0_mask.png", np.zeros((6, 9), np.uint8))
    expected["img0"] = np.zeros((6, 9), np.int64)
    assert run(tmp_path, "--ignore", "200,0,0", "--val", "0") == 0
    description = describe("folder", tmp_path)
    assert description.classes.palette == ((0, 0, 0), (0, 90, 0))
    meaning = np.array([0, 255, 1])
    for sample in description.open("train", 8):
        np.testing.assert_array_equal(sample.label, meaning[expected[sample.id]])


@pytest.mark.parametrize(
    ("values", "ignored", "n_class"),
    [((0, 1, 2, 255), (255,), 3), ((0, 255), (), 2), ((0, 100, 255), (), 3), ((0, 1), (), 2)],
)
def test_describe_guesses_255_to_be_ignored_beside_ids_only(
    tmp_path: Path, values: tuple[int, ...], ignored: tuple[int, ...], n_class: int
) -> None:
    expected = write_pairs(tmp_path, values=values)
    assert run(tmp_path, "--val", "0") == 0
    description = describe("folder", tmp_path)
    assert (description.classes.ignored, len(description.classes)) == (ignored, n_class)
    meaning = np.array([*range(n_class), 255])
    for sample in description.open("train", 8):
        np.testing.assert_array_equal(sample.label, meaning[expected[sample.id]])


def test_describe_finds_split_folders_and_lists(tmp_path: Path) -> None:
    for split, names in {"train": NAMES[:6], "test": NAMES[6:]}.items():
        write_pairs(tmp_path, f"{split}/{{id}}.png", f"{split}/{{id}}_mask.png", names=names)
    assert run(tmp_path, images="{split}/{id}.png", labels="{split}/{id}_mask.png") == 0
    description = describe("folder", tmp_path)
    assert description.splits == ("train", "test")
    assert ids(description.find("test")) == list(NAMES[6:])
    (tmp_path / "lists").mkdir()
    for split, names in {"train": NAMES[:3], "val": NAMES[3:6]}.items():
        (tmp_path / "lists" / f"{split}.txt").write_text("\n".join(names))
    options = "--lists", str(tmp_path / "lists"), "--overwrite"
    assert run(tmp_path, *options, images="train/{id}.png", labels="train/{id}_mask.png") == 0
    assert ids(describe("folder", tmp_path).find("val")) == list(NAMES[3:6])


def test_describe_refuses_smoothed_labels_unless_they_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 255
    label[0, :10] = range(20, 220, 20)
    write(tmp_path / "a.png", label)
    write(tmp_path / "a_mask.png", label)
    assert run(tmp_path) == 2
    assert "12 grey values, but 0 and 255 make 99.4 % of the pixels; they were resized" in capsys.readouterr().err
    assert run(tmp_path, "--names", *(f"class{k}" for k in range(12))) == 0
    write(tmp_path / "a_mask.png", np.arange(1600).reshape(40, 40).astype(np.uint8))
    assert run(tmp_path, "--overwrite") == 2
    assert "a_mask.png holds 256 different values, at most 64 make classes" in capsys.readouterr().err


def test_describe_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path)
    for options, message in {
        ("--names", "a"): "--names gives 1 names, but the labels hold 2 classes: 0, 255",
        ("--left_out", "sky"): "--left_out sky is no class; there are background, foreground",
        ("--val", "1.5"): "splits.fractions must be 0 or more and together below 1",
        ("--lists", str(tmp_path)): "holds no lists; expected are train.txt",
    }.items():
        assert run(tmp_path, *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "dataset.json").exists()
    assert run(tmp_path) == 0
    assert run(tmp_path) == 2
    assert "exists; name another by --output, or add --overwrite" in capsys.readouterr().err
    write(tmp_path / "img3_mask.png", np.zeros((5, 9), np.uint8))
    assert run(tmp_path, "--overwrite") == 2
    assert "img3_mask.png is 5 x 9 pixels, but its image is 6 x 9" in capsys.readouterr().err
