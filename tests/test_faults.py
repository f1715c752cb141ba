"""What goes wrong in training is told in one line, and leaves what is good."""

import errno
import math
import os
import resource
import signal
from itertools import islice
from pathlib import Path

import pytest
import runs
import torch
from builders import N_CLASS, build_sample, learning_model, train_epoch
from PIL import Image

import helper
import train_deep_globe
from dataset.base import SegmentationDataset
from dataset.registry import describe
from engine import global_only
from helper import EpochState
from training import run as training_run
from utils import files
from utils.diagnosis import diagnose
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES

# numbers that are none


def test_a_step_without_a_finite_loss_changes_nothing(monkeypatch) -> None:
    """Neither weights, nor moments, nor norm statistics, nor the metric; and the steps around it are as without it."""
    stage, samples = STAGES[1], [build_sample((64, 64), k, str(k)) for k in range(3)]

    def train(batches: list) -> tuple[dict, EpochState, list[dict]]:
        model, progress = learning_model(1), EpochState(StageMetrics(stage, N_CLASS))
        seen = train_epoch(model, 1, batches, epoch=progress)
        return {name: x for name, x in model.state_dict().items() if "tracked" not in name}, progress, seen

    inputs = global_only.global_inputs

    def poisoned(batch: list, settings) -> torch.Tensor:
        return inputs(batch, settings) * (math.nan if any(sample.id == "1" for sample in batch) else 1)

    monkeypatch.setattr(global_only, "global_inputs", poisoned)
    expected, without, _ = train([[samples[0]], [samples[2]]])
    found, progress, seen = train([[samples[0]], [samples[1]], [samples[2]]])
    runs.assert_equal_weights(found, expected)
    assert (progress.batches, progress.skipped, without.skipped) == (3, 1, 0)
    assert progress.loss == without.loss
    torch.testing.assert_close(progress.metrics.sums(), without.metrics.sums(), rtol=0, atol=0)
    assert [math.isfinite(values["loss/total"]) for values in seen] == [True, False, True]


def call(capsys, *arguments: str) -> tuple[int, str]:
    code = train_deep_globe.main(list(arguments))
    return code, capsys.readouterr().err.splitlines()[-1]


def test_bad_steps_are_told_with_their_images_and_end_the_run_when_too_many(
    reference, tmp_path, monkeypatch, capsys, caplog
) -> None:
    every = global_only.global_inputs
    monkeypatch.setattr(global_only, "global_inputs", lambda batch, settings: every(batch, settings) * math.nan)
    folders = reference.folders.beside(tmp_path)
    before = folders.weights(1)
    monkeypatch.setattr(training_run, "MOST_BAD_STEPS", 3)
    code, told = call(capsys, *folders.arguments(1))
    ids = [item.id for item in describe("deep_globe", folders.data).find("train")]
    assert code == 1
    assert told.startswith("error: 3 steps in a row without a finite loss and gradient, the last in epoch 1, step 3")
    assert "focal_global nan" in told
    warnings = [record.message for record in caplog.records if record.message.startswith("skipped a step")]
    assert len(warnings) == 2
    assert sum(id_ in told + "".join(warnings) for id_ in ids) == len(ids)
    runs.assert_equal_weights(folders.weights(1), before)


def die_in_worker(id_: str) -> None:
    """Let the process that reads the image called `id_` be killed."""
    read = SegmentationDataset.__getitem__

    def deadly(self: SegmentationDataset, key):
        if self.augment and self.items[key[1]].id == id_:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, key)

    SegmentationDataset.__getitem__ = deadly


def test_a_killed_worker_is_told_with_the_images_that_were_next(reference, tmp_path) -> None:
    folders = reference.folders.beside(tmp_path)
    id_ = describe("deep_globe", folders.data).find("train")[0].id
    arguments = folders.arguments(1, "--num_workers=1")
    result = runs.run(arguments, tmp_path / "run", prepare=die_in_worker, extra=(id_,))
    assert result.code == 1, result.output
    told = result.output.splitlines()[-1]
    assert told.startswith("error: a process that reads images died in epoch 1/2 after step ")
    assert "lower --num_workers" in told


@pytest.mark.parametrize("how", ["vanished", "truncated"])
def test_a_file_that_goes_bad_while_training_is_named(reference, tmp_path, monkeypatch, capsys, how) -> None:
    data = runs.generate(tmp_path / "data")
    folders = runs.Folders(tmp_path, data)
    victim = sorted((data / "train" / "Sat").iterdir())[0]
    plain = helper.TRAINING_STEPS[1]

    def spoil(*arguments):
        found = plain(*arguments)
        for path in (data / "train" / "Sat").iterdir():
            path.unlink() if how == "vanished" else os.truncate(path, path.stat().st_size // 2)
        return found

    monkeypatch.setitem(helper.TRAINING_STEPS, 1, spoil)
    code, told = call(capsys, *folders.arguments(1))
    assert code == 2
    assert told.startswith(f"error: {victim.parent}/")
    assert "cannot be read" in told


def limit_file_size(kilobytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))


def test_a_full_disk_gives_one_line_and_leaves_the_last_good_file(reference, tmp_path) -> None:
    """A limit on file sizes, that a checkpoint exceeds."""
    folders = reference.folders.beside(tmp_path)
    before = folders.weights(1)
    result = runs.run(folders.arguments(1), tmp_path / "run", prepare=limit_file_size, extra=(20 << 10,))
    assert result.code == 2, result.output
    assert result.output.splitlines()[-1].startswith(f"error: {folders.models}/one.pth cannot be written: ")
    runs.assert_equal_weights(folders.weights(1), before)
    assert not [path for path in folders.models.iterdir() if "part" in path.name]
    result = runs.run(folders.arguments(1), tmp_path / "run", prepare=limit_file_size, extra=(4,))  # of a log
    assert result.code == 2, result.output
    assert f"error: {folders.logs}/one" in result.output


def test_images_over_the_limit_and_folders_that_cannot_be_written_are_refused_before_training(
    reference, tmp_path, capsys
) -> None:
    """The folder is a place where not even root may write."""
    folders = reference.folders.beside(tmp_path)
    for option in ("--model_path", "--log_path"):
        code, told = call(capsys, *folders.arguments(1, f"{option}=/proc/glnet"))
        assert code == 2 and told.startswith("error: /proc/glnet")
    code, told = call(capsys, *folders.arguments(1, "--max_pixels=6399", "--task_name=bomb"))
    assert code == 2 and "has 6400 pixels, more than the 6399 allowed" in told


def test_a_read_only_file_system_is_told_by_its_reason(tmp_path, monkeypatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"a\.pth cannot be written: Read-only file system"):
        files.save_torch(tmp_path / "a.pth", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "--sub_batch_size 6, --size_p 508",
        ),
        (MemoryError(), "--sub_batch_size 6, --size_p 508"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--sub_batch_size 6, --size_p 508"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower --num_workers"),
        (RuntimeError("[gloo] Connection closed by peer"), "lost another process of this run"),
        (RuntimeError("expected scalar type Float"), None),
    ],
)
def test_known_failures_say_what_helps(error, told) -> None:
    options = {"mode": 2, "evaluation": False, "sub_batch_size": 6, "size_p": 508}
    line = diagnose(error, options, processes=2)
    assert (line is None) if told is None else (told in line and "\n" not in line)
    before = diagnose(error, {}, processes=1)  # before options are parsed
    assert before == "out of memory (MemoryError)" if isinstance(error, MemoryError) else told or before is None


def test_check_data_tells_all_that_is_wrong_and_how_frequent_classes_are(tmp_path, capsys) -> None:
    data = runs.generate(tmp_path / "data")
    assert train_deep_globe.main([f"--data_path={data}", "--check_data", "--num_workers=0"]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    assert any("frequencies" in line for line in lines)
    shares = {line.split()[0]: float(line.split()[1]) for line in islice(lines, 7)}
    assert "urban" in shares and sum(shares.values()) == pytest.approx(100, abs=0.05)

    images, labels = (sorted((data / "train" / kind).iterdir()) for kind in ("Sat", "Label"))
    os.truncate(images[0], images[0].stat().st_size // 2)
    Image.new("RGB", (80, 80), (1, 2, 3)).save(labels[1])
    Image.new("L", (79, 80)).save(labels[2])
    assert train_deep_globe.main([f"--data_path={data}", "--check_data", "--num_workers=2"]) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    for path in (images[0], labels[1], labels[2]):
        assert sum(str(path) in line for line in lines) == 1
    for line in ("Wrong: 1 of train: unreadable", "Wrong: 1 of train: no class", "Wrong: 1 of train: sizes differ"):
        assert line in lines
    assert f"Read: {len(images)} of train, " in told.out and "urban" in told.out
    assert told.err.splitlines()[-1] == "error: 3 of the files above cannot be used"
