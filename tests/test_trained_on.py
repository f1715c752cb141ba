"""What a network was trained on is said: no score without it, and no training on nothing."""

import json
from pathlib import Path

import pytest
import runs
from builders import build_header, describe_set, write_noise
from PIL import Image

import train_deep_globe
from dataset.layout import SplitChoice
from models import checkpoint
from models.header import TrainedOn
from training import options as command_line
from training import setup

pytestmark = pytest.mark.slow

SIDE = 80


def write_set(folder: Path, images: int = 5, value: int | None = None, splits: dict | None = None) -> Path:
    """Write a set of two classes, whose labels are noise, or `value` everywhere."""
    folder.mkdir()
    for k in range(images):
        label = write_noise(folder, str(k), (SIDE, SIDE)).label
        if value is not None:
            Image.new("L", (SIDE, SIDE), value).save(label)
    return describe_set(folder, splits)


def split(folder: Path, train: range, val: range) -> dict:
    """Write lists of ids; returns the splits of a set beside them."""
    for name, ids in (("train", train), ("val", val)):
        (folder / f"{name}.txt").write_text("\n".join(map(str, ids)))
    return {"lists": {"train": "../train.txt", "val": "../val.txt"}}


def run(folders: runs.Folders, *more: str, mode: int = 1) -> int:
    return train_deep_globe.main(folders.arguments(mode, "--dataset=folder", "--num_epochs=1", *more))


EVALUATION = ("--evaluation", "--path_g=one.pth")


def test_validation_on_training_images_is_said_where_the_score_is(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", 3))
    assert run(folders) == 0
    assert "3 of 3 validation images were trained on: the scores, and the choice" in caplog.text
    assert "in epoch 1 (on training images): " in caplog.text
    caplog.clear()
    data = write_set(tmp_path / "apart", 3, splits=split(tmp_path, range(2), range(2, 3)))
    assert run(runs.Folders(tmp_path / "b", data)) == 0
    assert "training images: the scores" not in caplog.text
    assert "in epoch 1: " in caplog.text


def test_without_any_labelled_pixel_a_training_is_refused_and_an_evaluation_has_no_scores(
    tmp_path, capsys, caplog
) -> None:
    blank = runs.Folders(tmp_path, write_set(tmp_path / "blank", 3, value=255))
    for more in ((), ("--window=40", "--windows=2")):
        assert run(blank, *more) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: no pixel of the ") and "has a class" in told
        assert not list(blank.models.glob("*.pth"))
    assert run(runs.Folders(tmp_path, write_set(tmp_path / "data", 3))) == 0
    capsys.readouterr()
    assert run(blank, *EVALUATION, "--task_name=blank", f"--report={tmp_path / 'report'}") == 0
    assert "no pixel of split train has a class: there are no scores" in caplog.text
    assert "mIoU" not in capsys.readouterr().out
    assert not (blank.logs / "blank.json").exists()
    assert "has no labels" in (tmp_path / "report" / "report.html").read_text()


def test_evaluations_and_later_stages_say_how_many_of_their_images_were_trained_on(tmp_path, caplog) -> None:
    data = write_set(tmp_path / "data", 5, splits=split(tmp_path, range(3), range(3, 5)))
    for k in (3, 4):
        Image.new("L", (SIDE, SIDE), 255).save(data / f"{k}_label.png")
    folders = runs.Folders(tmp_path, data)
    assert run(folders) == 0
    assert "no pixel of the validation images has a class" in caplog.text
    for ids, count in ((range(1, 5), 2), (range(3), 3)):
        caplog.clear()
        split(tmp_path, range(0), ids)  # other lists for the same file of the data set
        assert run(folders, *EVALUATION, "--task_name=e", "--split=val") == 0
        assert json.loads((folders.logs / "e.json").read_text())["images_trained_on"] == count
        assert f"{count} of {len(ids)} images were trained on" in caplog.text
    caplog.clear()  # other images with the same ids
    assert run(runs.Folders(tmp_path, write_set(tmp_path / "other", 3)), *EVALUATION, "--task_name=e") == 0
    assert json.loads((folders.logs / "e.json").read_text())["images_trained_on"] == 0
    assert "were trained on" not in caplog.text
    split(tmp_path, range(2, 5), range(2))
    assert run(folders, mode=2) == 0
    assert "2 of 2 validation images were trained on" in caplog.text
    assert len(checkpoint.read(folders.models / "two.pth").header.trained_on.hashes()) == 5


def test_the_choice_of_a_split_is_taken_over(monkeypatch, tmp_path, caplog) -> None:
    """By evaluations and later stages; a choice that is given stays, with a note."""
    caplog.set_level("INFO")
    opened = []
    monkeypatch.setattr(setup, "describe", lambda *arguments: opened.append(arguments) or "another split")

    def take_over(record: TrainedOn | None, *given: str, **more: None) -> object:
        options = command_line.build_parser().parse_args(["--dataset=dubai", "--data_path=data", *given])
        files = {"path_g": checkpoint.Checkpoint(Path("one.pth"), build_header(1, trained_on=record), {})}
        options, described = setup.take_over_split(options, files | more, "as given")
        return described, options.hold_out

    held_out = TrainedOn("dubai", hold_out="tile3")
    assert take_over(held_out) == ("another split", "tile3")
    assert opened == [("dubai", Path("data"), SplitChoice(hold_out="tile3"))]
    assert "one.pth was trained with --hold_out tile3, which is taken over" in caplog.text
    assert take_over(held_out, "--hold_out=tile3") == ("as given", "tile3")
    caplog.clear()
    assert take_over(held_out, "--hold_out=tile1") == ("as given", "tile1")
    assert "note: --hold_out tile1; one.pth was trained with --hold_out tile3" in caplog.text
    # another data set, a file of before, no choice, one that there is no longer
    for record in (TrainedOn("isic", split_seed=3), None, TrainedOn("dubai"), TrainedOn("dubai", split_seed=3)):
        assert take_over(record) == ("as given", None)
    assert "with --split_seed 3, which there is no longer; give --split_lists" in caplog.text
    assert len(opened) == 1
    assert take_over(held_out, init_from=None) == ("as given", None)
    caplog.clear()
    assert take_over(TrainedOn("dubai", split_lists=str(tmp_path / "gone"))) == ("as given", None)
    assert "a folder that is not here; give --split_lists" in caplog.text
