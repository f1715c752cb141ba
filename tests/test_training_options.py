"""A run of stage 2 with every option of training that differs from the released way: records, files, resume."""

import json
import signal

import pytest
import runs

from models import checkpoint
from training.options import RELEASED

pytestmark = pytest.mark.slow

OPTIONS = {"patches": 2, "sub_batches": "step", "turns": "mirror", "loss_size": "full", "val_every": 2, "ema": 0.9}
WINDOWS = ["--window=72", "--windows=1", "--augment"]
ARGUMENTS = [*(f"--{name}={value}" for name, value in OPTIONS.items()), *WINDOWS, "--num_epochs=3", "--lr=1e-3"]


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory) -> runs.Folders:
    root = tmp_path_factory.mktemp("trained")
    folders = reference.folders.beside(root / "whole")
    result = runs.run(folders.arguments(2, *ARGUMENTS), root / "whole.txt")
    assert result.code == 0, result.output
    assert "5 training images (5 samples an epoch, windows of 72)" in result.output
    return folders


def tensors(folders: runs.Folders, ending: str) -> dict:
    return checkpoint.read(folders.models / f"two{ending}.pth").tensors


def test_all_is_recorded_and_an_epoch_without_validation_says_so(trained) -> None:
    assert OPTIONS.keys() == RELEASED.keys()
    assert all(OPTIONS[name] != value for name, value in RELEASED.items())
    recorded = json.loads((trained.logs / "two" / "run.json").read_text())["options"]
    assert {name: recorded[name] for name in OPTIONS} == OPTIONS
    lines = trained.epochs("two")
    assert [line["validation"] is None for line in lines] == [True, False, False]
    assert not lines[0]["best"]
    text = (trained.logs / "two.log").read_text().split("=" * 32)
    assert "val = nan" in text[0] and "nan" not in text[2].split("\n")[1].split("Local")[0]


def test_the_average_is_what_was_validated(trained, tmp_path) -> None:
    """The file beside the last epoch's gives the scores of the log; the best one is one of these, too."""
    last, average, best = (tensors(trained, ending) for ending in ("", ".ema", ".best"))
    differs = {name.split(".")[0] for name, x in last.items() if not x.equal(average[name])}
    assert differs == {"local", "ensemble"}
    if trained.epochs("two")[-1]["best"]:
        runs.assert_equal_weights(best, average)
    where = ["--evaluation", "--path_g2l=two.ema.pth", "--task_name=evaluated", f"--log_path={tmp_path}"]
    # --size_g would shrink all images alike, where validation shrinks them as windows
    arguments = [one for one in trained.arguments(2, *where) if one not in ("--path_g=one.pth", "--size_g=64")]
    result = runs.run(arguments, tmp_path / "evaluated.txt")
    assert result.code == 0, result.output
    found = json.loads((tmp_path / "evaluated.json").read_text())
    told = trained.epochs("two")[-1]["validation"]
    for name, scores in told.items():
        assert found[name]["iou"] == scores["iou"], name


def test_killed_in_an_epoch_and_at_its_end_it_ends_with_the_same_bits(trained, tmp_path) -> None:
    folders = runs.Folders(tmp_path / "killed", trained.data)
    folders.models.mkdir(parents=True)
    (folders.models / "one.pth").hardlink_to(trained.models / "one.pth")
    arguments = folders.arguments(2, *ARGUMENTS, runs.SAVE_OFTEN, "--resume=auto")
    # an epoch saves after each of its three steps, then the last, the average, perhaps the best, and again
    for moment in (("after renaming", 8), ("before renaming", 3)):
        killed = runs.run(arguments, tmp_path / "killed.txt", prepare=runs.die_while_saving, extra=moment)
        assert killed.code == -signal.SIGKILL, killed.output
    result = runs.run(arguments, tmp_path / "rest.txt")
    assert result.code == 0, result.output
    for ending in ("", ".ema", ".best"):
        runs.assert_equal_weights(tensors(folders, ending), tensors(trained, ending))
    assert (folders.logs / "two.log").read_text() == (trained.logs / "two.log").read_text()
    for key in ("epoch", "loss", "best", "train", "validation", "learning_rate"):
        assert [line[key] for line in folders.epochs("two")] == [line[key] for line in trained.epochs("two")], key
