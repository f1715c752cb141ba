"""What a network was trained on is said: no score without it, and no training on nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
from builders import build_header
from PIL import Image

import train_deep_globe
from dataset.layout import SplitChoice
from models import checkpoint
from models.header import Header, TrainedOn
from training import options as command_line
from training import setup

pytestmark = pytest.mark.slow

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
    assert "3 of 3 validation images were trained on: the scores, and the choice" in caplog.text
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


# what a checkpoint records


def test_an_evaluation_says_how_many_of_its_images_were_trained_on(tmp_path: Path, caplog) -> None:
    data = write_set(tmp_path / "data", 5, splits=split(tmp_path / "x", range(3), range(3, 5)))
    folders = runs.Folders(tmp_path, data)
    assert run(folders) == 0
    for ids, count in ((range(3, 5), 0), (range(1, 5), 2), (range(3), 3)):
        caplog.clear()
        split(tmp_path / "x", range(0), ids)  # other lists for the same file of the data set
        assert run(folders, *EVALUATION, "--task_name=e", "--split=val") == 0
        record = json.loads((folders.logs / "e.json").read_text())
        assert record["images_trained_on"] == count
        assert (f"{count} of {len(ids)} images were trained on" in caplog.text) == (count > 0)


def test_other_images_with_the_same_ids_were_not_trained_on(tmp_path: Path, caplog) -> None:
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", 3))
    assert run(folders) == 0
    caplog.clear()
    assert run(runs.Folders(tmp_path, write_set(tmp_path / "other", 3)), *EVALUATION) == 0
    assert "were trained on" not in caplog.text


def test_a_later_stage_knows_the_images_of_an_earlier_one(tmp_path: Path, caplog) -> None:
    data = write_set(tmp_path / "data", 5, splits=split(tmp_path / "x", range(3), range(3, 5)))
    folders = runs.Folders(tmp_path, data)
    assert run(folders) == 0
    split(tmp_path / "x", range(2, 5), range(2))
    caplog.clear()
    assert run(folders, mode=2) == 0
    assert "2 of 2 validation images were trained on" in caplog.text
    header = checkpoint.read(folders.models / "two.pth").header
    assert len(header.trained_on.hashes()) == 5


def test_the_choice_of_a_split_is_taken_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
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
    assert take_over(TrainedOn("isic", split_seed=3)) == ("as given", None)  # another data set
    assert take_over(None) == ("as given", None)  # a file of before
    assert take_over(TrainedOn("dubai")) == ("as given", None)
    assert take_over(TrainedOn("dubai", split_seed=3)) == ("as given", None)
    assert "with --split_seed 3, which there is no longer; give --split_lists" in caplog.text
    assert len(opened) == 1
    assert take_over(held_out, init_from=None) == ("as given", None)
    caplog.clear()
    assert take_over(TrainedOn("dubai", split_lists=str(tmp_path / "gone"))) == ("as given", None)
    assert "a folder that is not here; give --split_lists" in caplog.text


def test_headers_keep_what_was_trained_on_and_the_scale() -> None:
    trained = TrainedOn("isic", split_seed=3, images="00112233445566ff" * 2)
    header = build_header(1, trained_on=trained, scale=8.0)
    assert Header.from_record(header.to_record()) == header
    assert str(trained) == "isic, split_seed 3, 1 images"
    record = header.to_record()
    older = {name: value for name, value in record.items() if name not in ("trained_on", "scale")}
    assert (Header.from_record(older).trained_on, Header.from_record(older).scale) == (None, None)
    for changes in (
        {"scale": 0},
        {"scale": "8"},
        {"trained_on": {"dataset": 3}},
        {"trained_on": {"dataset": "a", "images": "x" * 16}},
        {"trained_on": {"dataset": "a", "images": "00"}},
        {"trained_on": [1]},
    ):
        with pytest.raises((ValueError, TypeError)):
            Header.from_record({**record, **changes})
