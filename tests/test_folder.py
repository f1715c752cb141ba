"""A data set of one's own: found by its file, split as it says, described by looking at its labels.

Training, evaluation, `describe` and `--check_data` on the files that people have, whole and broken.
"""

import json
import os
import sys
import time
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import DRAWN, draw_file, png, read_label, write_raster
from pictures import run as predict_files
from pictures import save, summary, write_checkpoint
from PIL import Image

import train_deep_globe
from dataset.base import Item, SegmentationDataset
from dataset.census import VOID
from dataset.describe import main
from dataset.folder import FolderFile
from dataset.layout import hashed_split, read_list
from dataset.registry import Description, describe
from training.limits import check_batches, problem_of
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.selection import CoarseToFine
from utils.settings import TrainingSettings

RNG = np.random.default_rng(0)
COLORS = np.array([(0, 0, 0), (200, 0, 0), (0, 90, 0)], np.uint8)
NAMES = tuple(f"img{k}" for k in range(10))


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pairs(
    root: Path, images: str = "{id}.png", labels: str = "{id}_mask.png", values: Any = (0, 255), names=NAMES
) -> dict[str, np.ndarray]:
    """Grey images and labels that show `values`; returns the ids of each."""
    found = {name: RNG.integers(0, len(values), (6, 9)) for name in names}
    for name, ids in found.items():
        write(root / images.replace("{id}", name), RNG.integers(0, 255, (6, 9), np.uint8))
        write(root / labels.replace("{id}", name), np.array(values, np.uint8)[ids])
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


def arguments(root: Path, *options: str, images: str = "{id}.png", labels: str = "{id}_mask.png") -> list[str]:
    return [str(root), "--images", images, "--labels", labels, "--quiet", *options]


def run(root: Path, *options: str, **patterns: str) -> int:
    return main(arguments(root, *options, **patterns))


def test_labels_beside_their_images_in_other_folders_and_with_other_suffixes_are_no_images(tmp_path: Path) -> None:
    expected = write_pairs(tmp_path)
    description = written(tmp_path, splits={"fractions": {}})
    assert description.splits == ("train",)
    data = description.open("train", 8)
    assert ids(data.items) == list(NAMES)
    for sample in data:
        np.testing.assert_array_equal(sample.label, expected[sample.id])
    patterns = {"images": "{id}_image.png", "labels": "{id}.png"}  # the more special one owns a file that fits both
    write_pairs(tmp_path / "special", **patterns)
    description = written(tmp_path / "special", **patterns, splits={"fractions": {}})
    assert ids(description.find("train")) == list(NAMES)
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
    for text, message in ((None, r"cannot be read: .*dataset.describe --help"), ("{", "is not JSON")):
        if text:
            (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=rf"dataset.json {message}"):
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
    for path, mode in ((tmp_path / "img0_mask.png", "1"), (tmp_path / "img1_mask.png", "RGB")):
        Image.open(path).convert(mode).save(path)
    assert run(tmp_path, "--names", "skin", "lesion") == 0
    white = sum(int(label.sum()) for label in expected.values())
    assert f"255  {white:>13}  {100 * white / 540:>6.2f} %      10  lesion" in capsys.readouterr().out
    description, classes = describe("folder", tmp_path), describe("folder", tmp_path).classes
    assert (classes.names, classes.left_out, classes.foreground) == (("skin", "lesion"), (0,), (1,))
    assert classes.measures == ("jaccard", "accuracy")
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
def test_describe_guesses_255_to_be_ignored_beside_ids_only(tmp_path, values, ignored, n_class) -> None:
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
    for split, names in {"train": NAMES[:3], "val": NAMES[3:6]}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(names))
    options = "--lists", str(tmp_path), "--overwrite"
    assert run(tmp_path, *options, images="train/{id}.png", labels="train/{id}_mask.png") == 0
    assert ids(describe("folder", tmp_path).find("val")) == list(NAMES[3:6])


def test_describe_refuses_smoothed_labels_unless_they_are_named(tmp_path, refused) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 255
    label[0, :10] = range(20, 220, 20)
    write(tmp_path / "a.png", label)
    write(tmp_path / "a_mask.png", label)
    expected = "12 grey values, but 0 and 255 make 99.4 % of the pixels; they were resized"
    assert expected in refused(main, *arguments(tmp_path))
    assert run(tmp_path, "--names", *(f"class{k}" for k in range(12))) == 0
    write(tmp_path / "a_mask.png", np.arange(1600).reshape(40, 40).astype(np.uint8))
    expected = "a_mask.png holds 256 different values, at most 64 make classes"
    assert expected in refused(main, *arguments(tmp_path, "--overwrite"))


def test_describe_refuses_what_does_not_fit(tmp_path, refused) -> None:
    write_pairs(tmp_path)
    for options, message in {
        ("--names", "a"): "--names gives 1 names, but the labels hold 2 classes: 0, 255",
        ("--left_out", "sky"): "--left_out sky is no class; there are background, foreground",
        ("--val", "1.5"): "splits.fractions must be 0 or more and together below 1",
        ("--lists", str(tmp_path)): "holds no lists; expected are train.txt",
    }.items():
        assert message in refused(main, *arguments(tmp_path, *options))
    assert not (tmp_path / "dataset.json").exists()
    assert run(tmp_path) == 0
    assert "exists; name another by --output, or add --overwrite" in refused(main, *arguments(tmp_path))
    write(tmp_path / "img3_mask.png", np.zeros((5, 9), np.uint8))
    expected = "img3_mask.png is 5 x 9 pixels, but its image is 6 x 9"
    assert expected in refused(main, *arguments(tmp_path, "--overwrite"))


SIZE = (40, 50)


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.write_bytes(png(RNG.integers(0, 256, (3, *size)), 8, orientation))


def write_set(folder: Path, count: int = 4, classes: int = 3, size: tuple[int, int] = SIZE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        write_image(folder / f"{k}.png", size)
        Image.fromarray(RNG.integers(0, classes, size).astype(np.uint8)).save(folder / f"{k}_mask.png")
    return folder


def run_check(folder: Path, *options: str) -> int:
    where = ["--check_data", "--dataset=folder", f"--data_path={folder}", "--num_workers=0"]
    return train_deep_globe.main([*where, *options])


def test_missing_pixels_of_the_image_are_left_out_of_the_label(tmp_path) -> None:
    pytest.importorskip("rasterio")
    values = RNG.normal(0, 1, (3, *SIZE)).astype(np.float32)
    values[1, 3:6], values[:, 10:12] = np.nan, -9999
    write_raster(tmp_path / "a.tif", values, nodata=-9999)
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path / "b.png")
    data = SegmentationDataset([Item("a", tmp_path / "a.tif", tmp_path / "b.png")], Classes.generic(3), 8)
    missing = np.isnan(values[1]) | (values[1] == -9999)
    assert np.array_equal(data[0].label.numpy(), np.where(missing, IGNORED, 1))
    assert not data[0].image.numpy()[:, missing].any()


def test_turned_and_stretched_images_are_counted_and_told_how_their_labels_fit(tmp_path, capsys) -> None:
    write_set(tmp_path, 4)
    write_image(tmp_path / "0.png", SIZE, 3)
    write_image(tmp_path / "1.png", SIZE[::-1], 6)
    write_image(tmp_path / "2.png", SIZE, 6)  # its label has the stored size
    (tmp_path / "3.png").write_bytes(png(RNG.integers(0, 2048, (3, *SIZE)), 16))
    assert run(tmp_path, "--val", "0") == 0
    told = capsys.readouterr().out
    assert "Turned for display: 2 images, labels taken as displayed" in told
    assert "Turned for display: 1 images, labels taken as stored, turned with the image" in told
    assert run_check(tmp_path, "--stretch=0,4000") == 0
    told = capsys.readouterr().out
    assert "Turned for display, labels taken as displayed: 2 images" in told
    assert "Turned for display, labels taken as stored, turned with the image: 1 images" in told
    assert "Stretched from uint16 (0,4000): 1 images" in told


def test_describe_refuses_fractions_negative_values_and_a_single_class_by_what_they_are(tmp_path, refused) -> None:
    write_image(tmp_path / "a.png")
    label = RNG.integers(0, 3, SIZE).astype(np.float32)
    for value, text in ((0.9, "0.9, which is no whole number; they were resized"), (-5, "-5; ")):
        label[0, 0] = value
        Image.fromarray(label).save(tmp_path / "a.tif")
        assert f"a.tif holds {text}" in refused(main, *arguments(tmp_path, labels="{id}.tif"))
    message = refused(main, *arguments(write_set(tmp_path / "one", 2, classes=1)))
    assert "the labels hold only 0 beside what is ignored, in all files; a data set has two" in message


def test_ids_above_255_become_classes_and_nodata_a_row_of_its_own(tmp_path, capsys) -> None:
    write_image(tmp_path / "a.png")
    label = RNG.choice(np.array([0, 300, 400], np.uint16), SIZE)
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    assert run(tmp_path, "--val", "0") == 0
    found = describe("folder", tmp_path)
    assert found.classes.values == (0, 300, 400)
    ids = found.open("train", 8)[0].label.numpy()
    assert np.array_equal(np.array([0, 300, 400])[ids], label)
    pytest.importorskip("rasterio")
    (tmp_path / "a_mask.png").unlink()
    label = RNG.integers(0, 3, (1, *SIZE)).astype(np.float32)
    label[:, :2], label[:, 2] = -9999, np.nan
    write_raster(tmp_path / "a.tif", label, nodata=-9999)
    assert run(tmp_path, "--val", "0", "--overwrite", labels="{id}.tif") == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "no data" in line)
    assert f"{3 * SIZE[1]}" in row
    found = describe("folder", tmp_path)
    assert found.classes.values == (0, 1, 2)
    assert (found.open("train", 8)[0].label[:3] == IGNORED).all()


VOC_PALETTE = np.array([*Classes.generic(21).palette, *[(0, 0, 0)] * 234, VOID], np.uint8)


def test_describe_takes_no_void_colour_for_a_class(tmp_path, capsys) -> None:
    """As palette indices, where 255 is void, and as colours."""
    ids = RNG.choice(np.array([0, 1, 4, 15, 255], np.uint8), SIZE)
    shown = [ids, ids, np.where(ids == 255, 0, ids).astype(np.uint8)]  # the last shows no void
    for name, colored in (("palette", False), ("rgb", True)):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(3):
            write_image(folder / f"{k}.png")
            image = Image.fromarray(shown[k])
            image.putpalette(VOC_PALETTE.tobytes())
            (image.convert("RGB") if colored else image).save(folder / f"{k}_mask.png")
        assert run(folder, "--val", "0") == 0
        found = describe("folder", folder)
        assert len(found.classes) == 4, capsys.readouterr().out
        assert found.classes.ignored == ((VOID,) if colored else (255,))
        table = np.full(256, IGNORED)
        for k, color in enumerate(found.classes.palette):
            table[VOC_PALETTE.tolist().index(list(color))] = k
        for sample, used in zip(found.open("train", 8), shown, strict=True):
            assert np.array_equal(sample.label.numpy(), table[used])


def test_odd_files_are_named_and_skipped_by_describe_and_check(tmp_path, capsys) -> None:
    pytest.importorskip("rasterio")
    write_set(tmp_path, 3)
    name = os.fsdecode(b"caf\xe9")
    for path in ("{}.png", "{}_mask.png"):
        (tmp_path / path.format(0)).rename(tmp_path / path.format(name))
    write_raster(tmp_path / "9.png", RNG.integers(0, 9, (1, *SIZE)).astype(np.complex64))
    Image.fromarray(RNG.integers(0, 3, SIZE).astype(np.uint8)).save(tmp_path / "9_mask.png")
    (tmp_path / "1_mask.png").write_bytes(b"no image")
    assert run(tmp_path, "--val", "0") == 1
    told = capsys.readouterr()
    parts = ("9.png cannot be used: its samples are complex", "1_mask.png cannot be read: not an image")
    for part in ("2 images; the labels hold", "skipped: ", *parts):
        assert part in told.out
    assert "Traceback" not in told.err
    assert run_check(tmp_path) == 2
    told = capsys.readouterr()
    for part in ("Read: 4 of train", "Wrong: 1 of train: not supported", "Wrong: 1 of train: unreadable"):
        assert part in told.out


def test_ids_are_bytes_for_the_hash_and_the_augmentation(tmp_path) -> None:
    name = os.fsdecode(b"\xff\xfe")
    assert hashed_split(name, {"val": 0.5}, 0) in ("train", "val")
    write_image(tmp_path / "a.png")
    data = SegmentationDataset([Item(name, tmp_path / "a.png", None)], Classes.generic(3), 8, augment=True)
    assert data[0].id == name
    assert data.fingerprint().startswith("1 images")


def test_lists_with_marks_line_ends_blanks_and_comments(tmp_path) -> None:
    lines = [b"# made by hand", b"a1  ", b"\tb 2 # the second", b"", b"c#3", b"d # 4"]
    for mark, end in product((b"", b"\xef\xbb\xbf", b"utf-16"), (b"\n", b"\r\n", b"\r")):
        content = end.join(lines) + end
        content = content.decode().encode("utf-16") if mark == b"utf-16" else mark + content
        (tmp_path / "train.txt").write_bytes(content)
        assert read_list(tmp_path / "train.txt", {"d # 4"}) == ["a1", "b 2", "c#3", "d # 4"]
    (tmp_path / "train.txt").write_bytes(b"\x89PNG\0\0\0\x0d")
    with pytest.raises(InputError, match=r"train\.txt cannot be read: not a text file"):
        read_list(tmp_path / "train.txt")


def test_lists_and_json_are_read_alike_by_describe_and_training(tmp_path) -> None:
    write_set(tmp_path, 3)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_bytes(b"\xef\xbb\xbf0\r\n1 \r\n# no more\r\n")
    (tmp_path / "lists" / "val.txt").write_bytes(b"2\r\n")
    assert run(tmp_path, "--val", "0", "--lists", str(tmp_path / "lists")) == 0
    written = (tmp_path / "dataset.json").read_text()
    mended = "// made by describe\n" + written.replace("\n", "   \n# a comment\n", 1)
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + mended.replace("\n", "\r\n").encode())
    found = describe("folder", tmp_path)
    assert [item.id for item in found.find("train")] == ["0", "1"]
    assert json.loads(written)["images"] == "{id}.png"


SMALL = {"size_p": 32, "min_overlap": 4}


def test_images_and_batches_that_leave_a_norm_layer_one_value_are_refused() -> None:
    wrong = [(1, 1, {}), (32, 32, {}), (60, 100, {**SMALL, "sub_batch_size": 1})]
    wrong += [(60, 60, {**SMALL, "selection": CoarseToFine(1)})]
    wrong += [(60, 100, {**SMALL, "sub_batch_size": 7})]  # two rows of four: one is left
    right = [(33, 20, {}), (20, 33, {}), (100, 100, {}), (60, 60, SMALL)]  # the last: nine patches, six at a time
    for height, width, changes in (*wrong, *right):
        settings = TrainingSettings(**{"size_p": 508, "sub_batch_size": 6, **changes})
        problem = problem_of(Item("a", Path("a.png"), None), (height, width), settings)
        assert (problem is None) == ((height, width, changes) in right), (height, width, changes)
    for images, batch, size_g, more in ((13, 6, 64, {}), (12, 6, 32, {}), (12, 6, 32, {"world": 4, "joint": True})):
        check_batches(images, batch, size_g, **more)
    for images, batch, more in ((13, 6, {}), (12, 1, {}), (12, 6, {"world": 4}), (1, 6, {})):
        with pytest.raises(InputError, match="--size_g 32 with one image in a batch"):
            check_batches(images, batch, 32, **more)


def test_check_data_names_images_that_are_too_small(tmp_path, capsys) -> None:
    write_set(tmp_path, 3)
    write_set(tmp_path, 1, size=(20, 30))
    assert run(tmp_path, "--val", "0") == 0
    assert run_check(tmp_path) == 2
    told = capsys.readouterr().out
    assert "0.png is 20 x 30 pixels, and mode 2 would train on a single patch" in told
    assert "Wrong: 1 of train: too small" in told
    assert run_check(tmp_path, "--size_g=32", "--batch_size=2") == 2
    assert "--size_g 32 with one image in a batch" in capsys.readouterr().out


def test_without_rasterio_files_that_need_it_are_refused_in_one_line(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    values = RNG.integers(0, 200, (6, *SIZE)).astype(np.uint8)
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "photometric": "rgb"}
    paths = [
        write_raster(tmp_path / "bands.tif", values),
        write_raster(tmp_path / "lerc.tif", values[:1].astype(np.float64), compress="lerc"),
        write_raster(tmp_path / "sparse.tif", values[:3], True, **tiles),
        write_raster(tmp_path / "deep.jp2", values[:3].astype(np.uint16), driver="JP2OpenJPEG"),
    ]
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for path in paths:
        data = SegmentationDataset([Item("a", path, None)], Classes.generic(3), 8)
        with pytest.raises(InputError, match=rf"{path.name} \(.*\) needs the package rasterio, .*: pip install raster"):
            data.read(0)


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut off the end, or flip bits: in the header, or anywhere."""
    kind = rng.integers(3)
    if kind == 0:
        return content[: int(rng.integers(0, len(content)))]
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 8))):
        place = int(rng.integers(0, min(len(changed), 200 if kind == 1 else len(changed))))
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("without_rasterio", [False, True])
def test_the_reader_refuses_broken_files_in_one_line(tmp_path, without_rasterio) -> None:
    pytest.importorskip("rasterio")
    rng = np.random.default_rng(5)
    data, refused = SegmentationDataset([], Classes.generic(250), 8), 0
    data.max_pixels = 1_000_000
    for k in range(300):
        path = draw_file(rng, tmp_path, k).path
        path.write_bytes(damage(rng, path.read_bytes()))
        patch = pytest.MonkeyPatch()
        if without_rasterio:
            patch.setitem(sys.modules, "rasterio", None)
        data.items = [Item("a", path, None)]
        for read in (lambda: data.read(0), lambda path=path: read_label(path, data.classes, None, data.max_pixels)):
            start = time.monotonic()
            try:
                read()
            except InputError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
            assert time.monotonic() - start < 20
        patch.undo()
        path.unlink()
    assert refused > 150


def test_predict_skips_broken_files_and_does_the_rest(tmp_path, capsys) -> None:
    pytest.importorskip("rasterio")
    rng = np.random.default_rng(6)
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(120):
        path = DRAWN[k % len(DRAWN)](rng, folder / f"file{k}.png").path
        path.write_bytes(damage(rng, path.read_bytes()))
    save(folder / "whole.png")
    checkpoint = write_checkpoint(tmp_path / "one.pth", 1)
    assert predict_files(checkpoint, folder, *folder.glob("*.ppm"), output=tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "images could not be segmented" in told.err
    found = summary(tmp_path / "out")
    assert len(found["images"]) + len(found["failures"]) == 121
    assert len(found["failures"]) > 40
    assert any(one["image"].endswith("whole.png") for one in found["images"])
    assert all("\n" not in line for line in found["failures"])
    assert not list((tmp_path / "out").glob(".*"))
