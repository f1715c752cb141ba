"""What a network was trained on is said: no score without it, and no training on nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

import train_deep_globe

RNG = np.random.default_rng(0)
SIDE = 80


def write_set(folder: Path, images: int = 5, value: int | None = None, splits: dict | None = None) -> Path:
    """Write a set of two classes, whose labels are noise, or `value` everywhere."""
    folder.mkdir()
    for k in range(images):
        Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{k}.png")
        label = RNG.integers(0, 2, (SIDE, SIDE), np.uint8) if value is None else np.full((SIDE, SIDE), value, np.uint8)
        Image.fromarray(label).save(folder / f"{k}_label.png")
    record = {"images": "{id}.png", "labels": "{id}_label.png", "classes": [{"name": "a"}, {"name": "b"}]}
    (folder / "dataset.json").write_text(json.dumps({**record, "splits": splits or {"fractions": {}}}))
    return folder


def split(folder: Path, train: range, val: range) -> dict:
    for name, ids in (("train", train), ("val", val)):
        (folder.parent / f"{name}.txt").write_text("\n".join(map(str, ids)))
    return {"lists": {"train": "../train.txt", "val": "../val.txt"}}


def run(folders: runs.Folders, *more: str, mode: int = 1) -> int:
    return train_deep_globe.main(folders.arguments(mode, "--dataset=folder", "--num_epochs=1", *more))


EVALUATION = ("--evaluation", "--path_g=one.pth")


def test_validation_on_training_images_is_said_where_the_score_is(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", 3))
    assert run(folders) == 0
    assert "3 of 3 validation images are training images: the scores, and the choice" in caplog.text
    assert "in epoch 1 (on training images): " in caplog.text
    caplog.clear()
    folders = runs.Folders(
        tmp_path / "b", write_set(tmp_path / "apart", 3, splits=split(tmp_path / "x", range(2), range(2, 3)))
    )
    assert run(folders) == 0
    assert "training images: the scores" not in caplog.text
    assert "in epoch 1: " in caplog.text


@pytest.mark.parametrize("more", [(), ("--window=40", "--windows=2")])
def test_a_training_without_any_labelled_pixel_is_refused(tmp_path: Path, capsys, more: tuple[str, ...]) -> None:
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", 3, value=255))
    assert run(folders, *more) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: no pixel of the ")
    assert "has a class" in told
    assert not list(folders.models.glob("*.pth"))


def test_an_evaluation_without_any_labelled_pixel_has_no_scores(tmp_path: Path, capsys, caplog) -> None:
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", 3))
    assert run(folders) == 0
    capsys.readouterr()
    blank = runs.Folders(tmp_path, write_set(tmp_path / "blank", 3, value=255))
    assert run(blank, *EVALUATION, "--task_name=blank", f"--report={tmp_path / 'report'}") == 0
    assert "no pixel of split train has a class: there are no scores" in caplog.text
    assert "mIoU" not in capsys.readouterr().out
    assert not (folders.logs / "blank.json").exists()
    assert "has no labels" in (tmp_path / "report" / "report.html").read_text()


def test_a_validation_without_any_labelled_pixel_is_said(tmp_path: Path, caplog) -> None:
    data = write_set(tmp_path / "data", 3, splits=split(tmp_path / "x", range(2), range(2, 3)))
    Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)).save(data / "2_label.png")
    assert run(runs.Folders(tmp_path, data)) == 0
    assert "no pixel of the validation images has a class" in caplog.text
