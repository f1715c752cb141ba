"""Training, evaluation, `describe` and `--check_data` on the files that people have."""

import json
import os
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from files import png, write_raster
from PIL import Image

import train_deep_globe
from dataset.base import Item, SegmentationDataset
from dataset.census import VOID
from dataset.describe import main as describe
from dataset.layout import hashed_split, read_list
from dataset.registry import describe as open_described
from training.limits import check_batches, problem_of
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.selection import CoarseToFine
from utils.settings import TrainingSettings

RNG = np.random.default_rng(4)
SIZE = (40, 50)


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.write_bytes(png(RNG.integers(0, 256, (3, *size)), 8, orientation))


def write_set(folder: Path, count: int = 4, classes: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        write_image(folder / f"{k}.png")
        Image.fromarray(RNG.integers(0, classes, SIZE).astype(np.uint8)).save(folder / f"{k}_mask.png")
    return folder


def run_describe(folder: Path, *options: str, labels: str = "{id}_mask.png") -> int:
    return describe([str(folder), "--images", "{id}.png", "--labels", labels, "--quiet", "--val", "0", *options])


def run_check(folder: Path, *options: str) -> int:
    arguments = ["--check_data", "--dataset=folder", f"--data_path={folder}", "--num_workers=0", *options]
    return train_deep_globe.main(arguments)


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
    assert run_describe(tmp_path) == 0
    told = capsys.readouterr().out
    assert "Turned for display: 2 images, labels taken as displayed" in told
    assert "Turned for display: 1 images, labels taken as stored, turned with the image" in told
    assert run_check(tmp_path, "--stretch=0,4000") == 0
    told = capsys.readouterr().out
    assert "Turned for display, labels taken as displayed: 2 images" in told
    assert "Turned for display, labels taken as stored, turned with the image: 1 images" in told
    assert "Stretched from uint16 (0,4000): 1 images" in told


def test_describe_shows_nodata_as_a_row_of_its_own(tmp_path, capsys) -> None:
    pytest.importorskip("rasterio")
    write_image(tmp_path / "a.png")
    label = RNG.integers(0, 3, (1, *SIZE)).astype(np.float32)
    label[:, :2], label[:, 2] = -9999, np.nan
    write_raster(tmp_path / "a.tif", label, nodata=-9999)
    assert run_describe(tmp_path, labels="{id}.tif") == 0
    told = capsys.readouterr().out
    assert "no data" in told
    assert f"{3 * SIZE[1]}" in next(line for line in told.splitlines() if "no data" in line)
    assert open_described("folder", tmp_path).classes.values == (0, 1, 2)
    data = open_described("folder", tmp_path).open("train", 8)
    assert (data[0].label[:3] == IGNORED).all()


@pytest.mark.parametrize(("value", "text"), [(0.9, "0.9, which is no whole number; they were resized"), (-5, "-5; ")])
def test_describe_refuses_fractions_and_negative_values_by_what_they_are(tmp_path, capsys, value, text) -> None:
    write_image(tmp_path / "a.png")
    label = RNG.integers(0, 3, SIZE).astype(np.float32)
    label[0, 0] = value
    Image.fromarray(label).save(tmp_path / "a.tif")
    assert run_describe(tmp_path, labels="{id}.tif") == 2
    assert f"a.tif holds {text}" in capsys.readouterr().err


def test_ids_above_255_become_classes_by_the_sets_file(tmp_path) -> None:
    write_image(tmp_path / "a.png")
    label = RNG.choice(np.array([0, 300, 400], np.uint16), SIZE)
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    assert run_describe(tmp_path) == 0
    found = open_described("folder", tmp_path)
    assert found.classes.values == (0, 300, 400)
    ids = found.open("train", 8)[0].label.numpy()
    assert np.array_equal(np.array([0, 300, 400])[ids], label)


def voc_palette() -> np.ndarray:
    palette = np.zeros((256, 3), np.uint8)
    palette[:21], palette[255] = Classes.generic(21).palette, VOID
    return palette


def test_describe_takes_no_void_colour_for_a_class(tmp_path, capsys) -> None:
    """As palette indices, where 255 is void, and as colours."""
    ids = RNG.choice(np.array([0, 1, 4, 15, 255], np.uint8), SIZE)
    for name, colored in (("palette", False), ("rgb", True)):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(3):
            write_image(folder / f"{k}.png")
            used = np.where(ids == 255, 0, ids).astype(np.uint8) if k == 2 else ids  # the last shows no void
            image = Image.fromarray(used)
            image.putpalette(voc_palette().tobytes())
            (image.convert("RGB") if colored else image).save(folder / f"{k}_mask.png")
        assert run_describe(folder) == 0
        found = open_described("folder", folder)
        assert len(found.classes) == 4, capsys.readouterr().out
        assert found.classes.ignored == ((VOID,) if colored else (255,))
        table = np.full(256, IGNORED)
        for k, color in enumerate(found.classes.palette):
            table[voc_palette().tolist().index(list(color))] = k
        for k, sample in enumerate(found.open("train", 8)):
            used = np.where(ids == 255, 0, ids) if k == 2 else ids
            assert np.array_equal(sample.label.numpy(), table[used])


def test_a_set_with_one_class_is_refused_by_what_it_lacks(tmp_path, capsys) -> None:
    write_set(tmp_path, 2, classes=1)
    assert run_describe(tmp_path) == 2
    assert "the labels hold only 0 beside what is ignored, in all files; a data set has two" in capsys.readouterr().err


def test_odd_files_are_named_and_skipped_by_describe_and_check(tmp_path, capsys) -> None:
    pytest.importorskip("rasterio")
    write_set(tmp_path, 3)
    name = os.fsdecode(b"caf\xe9")
    for path in ("{}.png", "{}_mask.png"):
        (tmp_path / path.format(0)).rename(tmp_path / path.format(name))
    write_raster(tmp_path / "9.png", RNG.integers(0, 9, (1, *SIZE)).astype(np.complex64))
    Image.fromarray(RNG.integers(0, 3, SIZE).astype(np.uint8)).save(tmp_path / "9_mask.png")
    (tmp_path / "1_mask.png").write_bytes(b"no image")
    assert run_describe(tmp_path) == 1
    told = capsys.readouterr()
    assert "2 images; the labels hold" in told.out
    assert "skipped: " in told.out
    assert "9.png cannot be used: its samples are complex" in told.out
    assert "1_mask.png cannot be read: not an image" in told.out
    assert "Traceback" not in told.err
    assert run_check(tmp_path) == 2
    told = capsys.readouterr()
    assert "Read: 4 of train" in told.out
    assert "Wrong: 1 of train: not supported" in told.out
    assert "Wrong: 1 of train: unreadable" in told.out


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
    assert run_describe(tmp_path, "--lists", str(tmp_path / "lists")) == 0
    written = (tmp_path / "dataset.json").read_text()
    mended = "// made by describe\n" + written.replace("\n", "   \n# a comment\n", 1)
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + mended.replace("\n", "\r\n").encode())
    found = open_described("folder", tmp_path)
    assert [item.id for item in found.find("train")] == ["0", "1"]
    assert json.loads(written)["images"] == "{id}.png"


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"size_p": 508, "sub_batch_size": 6, **changes})


@pytest.mark.parametrize(
    ("size", "changes", "refused"),
    [
        ((32, 32), {}, True),
        ((1, 1), {}, True),
        ((33, 20), {}, False),
        ((20, 33), {}, False),
        ((100, 100), {}, False),
        ((60, 60), {"size_p": 32, "min_overlap": 4}, False),  # nine patches, six at a time
        ((60, 100), {"size_p": 32, "min_overlap": 4, "sub_batch_size": 7}, True),  # two rows of four: one is left
        ((60, 100), {"size_p": 32, "min_overlap": 4, "sub_batch_size": 1}, True),
        ((60, 60), {"size_p": 32, "min_overlap": 4, "selection": CoarseToFine(1)}, True),
    ],
)
def test_images_that_leave_a_norm_layer_one_value_are_refused(size, changes, refused) -> None:
    item = Item("a", Path("a.png"), None)
    assert (problem_of(item, size, settings(**changes)) is not None) == refused


@pytest.mark.parametrize(
    ("images", "batch", "size_g", "more", "refused"),
    [
        (13, 6, 32, {}, True),
        (13, 6, 64, {}, False),
        (12, 6, 32, {}, False),
        (12, 1, 32, {}, True),
        (12, 6, 32, {"world": 4}, True),
        (12, 6, 32, {"world": 4, "joint": True}, False),
        (1, 6, 32, {}, True),
    ],
)
def test_a_lone_image_of_the_smallest_size_is_refused(images, batch, size_g, more, refused) -> None:
    if not refused:
        check_batches(images, batch, size_g, **more)
        return
    with pytest.raises(InputError, match="--size_g 32 with one image in a batch"):
        check_batches(images, batch, size_g, **more)


def test_check_data_names_images_that_are_too_small(tmp_path, capsys) -> None:
    write_set(tmp_path, 2)
    write_image(tmp_path / "tiny.png", (20, 30))
    Image.fromarray(RNG.integers(0, 3, (20, 30)).astype(np.uint8)).save(tmp_path / "tiny_mask.png")
    assert run_describe(tmp_path) == 0
    assert run_check(tmp_path) == 2
    told = capsys.readouterr().out
    assert "tiny.png is 20 x 30 pixels, and mode 2 would train on a single patch" in told
    assert "Wrong: 1 of train: too small" in told
    assert run_check(tmp_path, "--size_g=32", "--batch_size=2") == 2
    assert "--size_g 32 with one image in a batch" in capsys.readouterr().out


def test_without_rasterio_files_that_need_it_are_refused_in_one_line(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    values = RNG.integers(0, 200, (6, *SIZE)).astype(np.uint8)
    write_raster(tmp_path / "bands.tif", values)
    write_raster(tmp_path / "lerc.tif", values[:1].astype(np.float64), compress="lerc")
    write_raster(tmp_path / "sparse.tif", values[:3], True, tiled=True, blockxsize=16, blockysize=16, photometric="rgb")
    write_raster(tmp_path / "deep.jp2", values[:3].astype(np.uint16), driver="JP2OpenJPEG")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for name in ("bands.tif", "lerc.tif", "sparse.tif", "deep.jp2"):
        data = SegmentationDataset([Item("a", tmp_path / name, None)], Classes.generic(3), 8)
        with pytest.raises(InputError, match=rf"{name} \(.*\) needs the package rasterio, .*: pip install rasterio"):
            data.read(0)
