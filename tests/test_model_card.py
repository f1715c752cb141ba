"""The model card beside a finished training's checkpoint says what the run recorded, and nothing else."""

import json
import re
import shlex
from pathlib import Path

import pytest
import runs

import train_deep_globe
from dataset.deep_globe import DEEP_GLOBE
from evaluation.report import per_cent
from training.model_card import read_epochs
from utils.stages import STAGES

pytestmark = pytest.mark.slow


def card_of(folders: runs.Folders, mode: int) -> str:
    return (folders.models / f"{runs.NAMES[mode]}.md").read_text(encoding="utf-8")


def table_row(card: str, name: str) -> list[str]:
    """The cells behind the one that is `name`."""
    (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, flags=re.MULTILINE)
    return line.split(" | ")


def epochs_of(folders: runs.Folders, mode: int) -> list[dict]:
    return [json.loads(line) for line in (folders.logs / f"{runs.NAMES[mode]}.jsonl").read_text().splitlines()]


def test_the_scores_are_those_of_the_log(reference) -> None:
    for mode, stage in STAGES.items():
        card, epochs = card_of(reference.folders, mode), epochs_of(reference.folders, mode)
        best = max(epochs, key=lambda line: line["validation"][stage.headline]["mIoU"])
        both = [line["validation"] for line in (best, epochs[-1])]
        expected = [per_cent(scores[name]["mIoU"]) for name in stage.predictions for scores in both]
        assert table_row(card, "mIoU") == ["", *expected]
        for k, name in enumerate(DEEP_GLOBE.names):
            expected = [per_cent(scores[one]["iou"][k]) for one in stage.predictions for scores in both]
            assert table_row(card, f"{k} {name}{', not in the mIoU' if k == 0 else ''}")[1:] == expected
        assert f"best, epoch {best['epoch']}" in card
        assert f"last, epoch {len(epochs)}" in card


def test_data_classes_and_network_are_in_the_card_and_the_settings_where_it_says(reference) -> None:
    for mode, stage in STAGES.items():
        card = card_of(reference.folders, mode)
        assert table_row(card, "training images") == ["5, split train"]
        assert table_row(card, "validation images") == ["2, split crossvali"]
        assert table_row(card, "data set") == ["`--dataset deep_globe`"]
        assert "size_g 64, size_p 64, min_overlap 16, backbone resnet18" in card
        assert table_row(card, "epochs") == ["2 of 2"]
        assert table_row(card, "1 urban")[0] == "0, 255, 255"
        assert "None" not in card
        (run,) = table_row(card, "settings, device, versions, commit")
        record = json.loads(Path(run.strip("`")).read_text())
        assert (record["options"]["lr"], record["options"]["batch_size"]) == (stage.lr, 2)
        assert {"device", "versions", "git_commit"} <= record.keys()
    assert table_row(card_of(reference.folders, 1), "started from") == ["random weights"]
    assert table_row(card_of(reference.folders, 3), "started from") == ["`one.pth` and `two.pth`"]


def test_the_commands_in_the_card_are_understood(reference) -> None:
    for mode in STAGES:
        card = card_of(reference.folders, mode)
        (line,) = re.findall(r"^python train_deep_globe\.py (.*)$", card, flags=re.MULTILINE)
        options = train_deep_globe.command_line.build_parser().parse_args(shlex.split(line))
        train_deep_globe.command_line.check(options)
        assert (options.model_path / getattr(options, STAGES[mode].reads)).is_file()


def test_a_new_run_keeps_the_older_card_and_an_unfinished_one_has_none(reference, tmp_path: Path) -> None:
    folders = reference.folders.beside(tmp_path)
    card = folders.models / "one.md"
    card.write_text("an older card")
    result = runs.run(folders.arguments(1, "--num_epochs=1"), tmp_path / "out", prepare=fail_in_validation)
    assert result.code == 1
    assert not card.exists()
    assert card.with_suffix(".previous.md").read_text() == "an older card"
    result = runs.run(folders.arguments(1, "--num_epochs=1", "--overwrite"), tmp_path / "out2")
    assert result.code == 0, result.output
    assert card.read_text().startswith("# one\n")
    assert f"Model card: {card}" in result.output
    assert card.with_suffix(".previous.md").read_text() == "an older card"


def fail_in_validation() -> None:
    from training import run
    from utils.errors import RunError

    def fail(*others: object, **more: object) -> None:
        raise RunError("stopped by the test")

    run.evaluate_images = fail


def test_lines_of_other_runs_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"started": "a", "epoch": 1}, {"started": "b", "epoch": 1, "loss": 2}, {"started": "b", "epoch": 2}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"started": "b", "ep')
    assert read_epochs(path, "b") == {1: lines[1], 2: lines[2]}
    assert read_epochs(tmp_path / "missing.jsonl", "b") == {}
