"""A run that is killed or stopped, wherever that falls, and goes on ends as if nothing had happened."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

import train_deep_globe
from models import checkpoint
from training import state
from training.options import RELEASED, build_parser
from training.state import RunFiles
from utils.errors import InputError

pytestmark = pytest.mark.slow


def assert_good_files(folders: runs.Folders, mode: int) -> None:
    """What stands under a name that counts can be read."""
    name = runs.NAMES[mode]
    last = checkpoint.read(folders.models / f"{name}.pth")
    assert last.header.stage == mode
    for path in folders.models.glob(f"{name}.*pth"):
        if path.name.endswith(".resume.pth"):
            state.read(path)
        else:
            checkpoint.read(path)


def scalar_steps(folder: Path) -> dict[str, list[int]]:
    events = runs.read_events(folder)
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_end(folders: runs.Folders, expected: runs.Folders, mode: int) -> None:
    """The weights bit by bit; no record lost or told twice; nothing left over."""
    name = runs.NAMES[mode]
    runs.assert_equal_weights(folders.weights(mode), expected.weights(mode))
    best, expected_best = (checkpoint.read(f.models / f"{name}.best.pth").tensors for f in (folders, expected))
    runs.assert_equal_weights(best, expected_best)
    assert (folders.logs / f"{name}.log").read_text() == (expected.logs / f"{name}.log").read_text()
    lines, wanted = folders.epochs(name), expected.epochs(name)
    for key in ("epoch", "loss", "best", "train", "validation", "skipped_steps", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in wanted], key
    for part in ("", "IoU/train iou", "IoU/validation iou"):
        assert scalar_steps(folders.logs / name / part) == scalar_steps(expected.logs / name / part)
    names = {path.name for path in folders.models.iterdir() if path.name.startswith((name, "."))}
    assert names == {f"{name}{ending}.pth" for ending in ("", ".best", ".previous")}


def kill_after_saves(run: runs.Run, path: Path, count: int, delay: float) -> int:
    """Kill `run` `delay` seconds after its `count`-th resume file; returns its exit code."""
    files, seen = 0, path.stat().st_mtime_ns if path.exists() else None
    while files < count and run.processes[0].is_alive():
        now = path.stat().st_mtime_ns if path.exists() else None
        files, seen = files + (now != seen), now
        time.sleep(0.005)
    time.sleep(delay)
    run.signal(signal.SIGKILL)
    return run.wait()[0].code


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_killed_three_times_it_ends_with_the_same_bits(reference, tmp_path, mode) -> None:
    """Twice at random moments, once in the middle of a file; at no time is a good checkpoint missing."""
    rng = random.Random(mode)
    folders = reference.folders.beside(tmp_path)
    arguments = folders.arguments(mode, runs.SAVE_OFTEN, "--resume=auto")
    resume_file = folders.models / f"{runs.NAMES[mode]}.resume.pth"
    for attempt in range(2):
        run = runs.Run(arguments, tmp_path / f"killed{attempt}").start()
        assert kill_after_saves(run, resume_file, rng.randint(1, 3), rng.uniform(0, 0.3)) == -signal.SIGKILL
        assert_good_files(folders, mode)
    saving = runs.run(arguments, tmp_path / "saving", prepare=runs.die_while_saving, extra=("middle", 1))
    assert saving.code == -signal.SIGKILL, saving.output
    assert_good_files(folders, mode)
    result = runs.run(arguments, tmp_path / "rest")
    assert result.code == 0, result.output
    assert_same_end(folders, reference.folders, mode)


MOMENTS = [  # one after another; an epoch saves after each of its three steps, then the last, the best, and again
    ("before renaming", 1),  # the first of all
    ("after renaming", 4),  # there is a new last one, and no new best
    ("before renaming", 2),  # epoch 1 ends again: the best
    ("middle", 3),  # what comes after it
    ("after renaming", 3),
]


def test_killed_around_every_kind_of_file_it_ends_with_the_same_bits(reference, tmp_path) -> None:
    folders = reference.folders.beside(tmp_path)
    arguments = folders.arguments(1, runs.SAVE_OFTEN, "--resume=auto")
    for moment in MOMENTS:
        killed = runs.run(arguments, tmp_path / "killed", prepare=runs.die_while_saving, extra=moment)
        assert killed.code == -signal.SIGKILL, killed.output
        assert_good_files(folders, 1)
    result = runs.run(arguments, tmp_path / "rest")
    assert result.code == 0, result.output
    assert_same_end(folders, reference.folders, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(reference, tmp_path, number) -> None:
    folders = reference.folders.beside(tmp_path)
    run = runs.Run(folders.arguments(1), tmp_path / "stopped").start()
    while "loss=" not in run.text() and run.processes[0].is_alive():
        time.sleep(0.01)
    run.signal(number)
    stopped = run.wait()[0]
    assert stopped.code == 128 + number
    line = r"interrupted in epoch \d after step \d; saved \S*one\.resume\.pth, go on with --resume auto\n"
    assert re.search(line, stopped.output), stopped.output
    result = runs.run(folders.arguments(1, "--resume=auto"), tmp_path / "rest")
    assert result.code == 0, result.output
    assert_same_end(folders, reference.folders, 1)


def call(capsys, *arguments: str) -> tuple[int, str]:
    code = train_deep_globe.main(list(arguments))
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def unfinished(reference, tmp_path_factory) -> runs.Folders:
    """The folders of a run of stage 1 that was killed in its second epoch."""
    root = tmp_path_factory.mktemp("unfinished")
    folders = reference.folders.beside(root)
    killed = runs.run(
        folders.arguments(1, runs.SAVE_OFTEN),
        root / "killed",
        prepare=runs.die_while_saving,
        extra=("after renaming", 7),
    )
    assert killed.code == -signal.SIGKILL, killed.output
    return folders


def test_an_unfinished_run_is_not_overwritten_unasked(unfinished, capsys) -> None:
    path = unfinished.models / "one.resume.pth"
    before = path.stat()
    code, told = call(capsys, *unfinished.arguments(1))
    assert code == 2
    assert told.startswith(f"error: {path} is of an unfinished run")
    assert "--resume auto" in told
    assert "--overwrite" in told
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_option_that_makes_another_experiment_is_refused(unfinished, capsys) -> None:
    for change in ("--lr=0.5", "--batch_size=3"):
        code, told = call(capsys, *unfinished.arguments(1, "--resume=auto", change))
        name, value = change.split("=")
        assert code == 2
        assert re.search(rf"another experiment: {name} was \S+, now {value}; .*--resume_anyway", told), told


def test_options_that_change_what_is_learned_make_another_experiment() -> None:
    """All others may change, those that a file of before lacks count as their defaults."""
    parser = build_parser()
    given = ["--class_weights", "1", "2", "--window=64", "--windows=2"]
    changes = [
        *(["--seed=1"], ["--num_epochs=3"], ["--sub_batch_size=2"], ["--dataset=inria"], ["--loss=ce"], ["--gamma=2"]),
        *(["--class_weights", "1", "3"], ["--coarse_to_fine"], ["--box_margin=0.3"]),
        *(["--window=40"], ["--windows=3"], ["--augment"], ["--patches=2"], ["--turns=mirror"], ["--loss_size=full"]),
        *(["--ema=0.9"], ["--share=none"]),
    ]
    saved = state.options_record(parser.parse_args(given))
    for change in changes:
        now = state.options_record(parser.parse_args([*given, *change]))
        with pytest.raises(InputError, match=f"another experiment: {change[0].split('=')[0]} was"):
            state.changed_options(saved, now, anyway=False)
        assert len(state.changed_options(saved, now, anyway=True)) == 1
    free = state.options_record(parser.parse_args([*given, "--split_lists=b", "--init_from=a.pth", "--val_every=2"]))
    assert len(state.changed_options(saved, free, anyway=False)) == 3
    assert state.changed_options({}, RELEASED, anyway=False) == {}
    now = {"share": "none", "pyramid_width": 256, "pyramid_norm": "none"}
    assert state.changed_options({"share_maps": False}, now, anyway=False) == {}
    with pytest.raises(InputError, match="--share was own, now none"):
        state.changed_options({"share_maps": True}, now, anyway=False)


def test_resume_takes_a_path_and_tells_what_changed(unfinished, tmp_path) -> None:
    """Under another name, with another experiment's option; its own file is left alone."""
    path = unfinished.models / "one.resume.pth"
    more = [f"--resume={path}", "--resume_anyway", "--task_name=other", "--num_epochs=3", "--save_every=5"]
    result = runs.run(unfinished.arguments(1, *more), tmp_path / "other")
    assert result.code == 0, result.output
    assert "changed since: --num_epochs was 2, now 3" in result.output
    assert "changed since: --save_every was 1e-09, now 5.0" in result.output
    assert path.exists()
    assert (unfinished.models / "other.pth").exists()
    assert [line["epoch"] for line in unfinished.epochs("other")] == [2, 3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--batch_size=5", "epoch 2 starts over: its steps hold other images now"),
        ("--seed=1", "epoch 2 starts over"),
        ("--lr=0.5", "changed since: --lr was 5e-05, now 0.5"),
        ("--num_epochs=9", "changed since: --num_epochs was 2, now 9"),
    ],
)
def test_any_change_that_is_allowed_goes_on(unfinished, tmp_path, change, told) -> None:
    """The run was killed in epoch 2 after its first step; steps, schedule and rate follow the new options."""
    folders = unfinished.beside(tmp_path)
    path = unfinished.models / "one.resume.pth"
    arguments = [f"--resume={path}", "--resume_anyway", "--task_name=other", "--early_stopping=1", change]
    result = runs.run(folders.arguments(1, *arguments), tmp_path / "other")
    assert result.code == 0, result.output
    assert told in result.output
    assert folders.epochs("other")[0]["epoch"] == 2
    events = runs.read_events(folders.logs / "other").Scalars("learning_rate")
    values = {event.step: event.value for event in events}
    name, value = change.removeprefix("--").split("=")
    changed = {"batch_size": 2, "num_epochs": 2, "lr": 5e-5, **{name: float(value)}}
    batches = -(-5 // int(changed["batch_size"]))
    total = batches * int(changed["num_epochs"])
    first = batches + (0 if "starts over" in told else 1)
    assert min(values) == first
    for step, rate in values.items():
        assert rate == pytest.approx(changed["lr"] * (1 - step / total) ** 0.9)
    assert max(values) == total - 1 or change == "--num_epochs=9"


def test_fewer_epochs_than_were_begun_are_refused(unfinished, capsys) -> None:
    code, told = call(capsys, *unfinished.arguments(1, "--resume=auto", "--resume_anyway", "--num_epochs=1"))
    assert code == 2
    assert told.splitlines()[-1].startswith("error: --num_epochs 1 is less than the 2 epochs")


def test_overwrite_starts_over(unfinished, reference, tmp_path) -> None:
    folders = reference.folders.beside(tmp_path)
    (folders.models / "one.resume.pth").hardlink_to(unfinished.models / "one.resume.pth")
    result = runs.run(folders.arguments(1, "--overwrite"), tmp_path / "over")
    assert result.code == 0, result.output
    assert_same_end(folders, reference.folders, 1)


def test_resume_auto_starts_where_there_is_nothing(reference) -> None:
    files = RunFiles.of(reference.folders.models, "glnet")
    assert state.resume_source(files, "auto", overwrite=False) is None
    assert not files.resume.exists()


DAMAGES = {
    "cut short": lambda content: None,
    "a checkpoint": lambda content: content["model"],
    "no progress": lambda content: {**content, "progress": 7},
    "unknown standing": lambda content: {**content, "standing": {"epoch": 0, "sleep": 1}},
    "moments of another shape": lambda content: {
        **content,
        "optimizer": {
            **content["optimizer"],
            "state": {k: {**v, "exp_avg": torch.zeros(3)} for k, v in content["optimizer"]["state"].items()},
        },
    },
    "no random state": lambda content: {**content, "random": {}},
    "model of numbers": lambda content: {**content, "model": {"local.head.bias": 3}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_resume_file_is_refused(unfinished, tmp_path, capsys, damage) -> None:
    path = tmp_path / "damaged.resume.pth"
    whole = unfinished.models / "one.resume.pth"
    if damage == "cut short":
        path.write_bytes(whole.read_bytes()[:100_000])
    else:
        torch.save(DAMAGES[damage](torch.load(whole, weights_only=True)), path)
    code, told = call(capsys, *unfinished.arguments(1, f"--resume={path}", "--task_name=another"))
    assert code == 2
    assert told.splitlines()[-1].startswith(f"error: {path}"), told
    assert not (unfinished.models / "another.pth").exists()


def test_a_state_survives_its_file(tmp_path) -> None:
    """Numbers, random states and all; what is no resume file is named."""
    torch.manual_seed(3)
    random.seed(3)
    entries = ("model", "optimizer", "scheduler", "standing", "progress")
    snapshot = {**{name: {} for name in entries}, "sums": [torch.ones(2)], "random": state._random_states()}
    snapshot |= {"options": {"seed": 1}, "logs": {"a.log": 3}}
    expected = torch.rand(3), random.random()
    state.write(tmp_path / "a.resume.pth", snapshot)
    found = state.read(tmp_path / "a.resume.pth")
    state._set_random_states(found["random"])
    assert (found["options"], found["logs"], found["model"]) == ({"seed": 1}, {"a.log": 3}, {})
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    with pytest.raises(InputError, match=r"none\.pth: no such resume file"):
        state.read(tmp_path / "none.pth")
