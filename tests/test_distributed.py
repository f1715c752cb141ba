"""Several processes on the CPU do the same as one: gradients, statistics, metrics, and how they fail."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from builders import N_CLASS, build_model, build_predictor, build_sample, build_settings, learning_model, train_epoch
from torch import Tensor, nn

import helper
import train_deep_globe
from dataset.loader import BatchPart, EpochSampler
from engine import global_only
from evaluation.run import Evaluation, evaluate_images
from utils import distributed
from utils.classes import Classes
from utils.distributed import ALONE, Ranks
from utils.errors import InputError
from utils.loss import build_loss
from utils.metrics import MEASURES, StageMetrics
from utils.stages import STAGES

pytestmark = pytest.mark.slow

SAMPLES = [((64, 90), 0.0), ((80, 64), 0.5), ((50, 40), 0.9), ((64, 64), 0.2), ((90, 90), 0.1)]
"""Sizes and the share of pixels left out, so that means over pixels are not means over images."""

BATCHES = [[0, 1, 2, 3, 4], [3]]
"""Of images: the last leaves processes without one."""


def build_batch(indices: list[int]) -> list:
    return [build_sample(SAMPLES[k][0], k, str(k), SAMPLES[k][1]) for k in indices]


def evaluate_and_report(mode: int, ranks: Ranks) -> Evaluation:
    batches = [[sample] for sample in build_batch(list(range(5))[ranks.rank :: ranks.world])]
    predictor = build_predictor(build_model(), mode, build_settings())
    measured = replace(Classes.generic(N_CLASS), foreground=(1, 3), measures=tuple(MEASURES))
    return evaluate_images(predictor, batches, StageMetrics(STAGES[mode], measured), ranks=ranks)


def _work(what: Callable, arguments: tuple, rank: int, world: int, port: str, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= runs.environment_of(rank, world, port)
    torch.save(what(*arguments, distributed.start("cpu")), path / f"{rank}.pt")
    distributed.stop()


def together(what: Callable, world: int, path: Path, *arguments: Any) -> list[Any]:
    """What `what(*arguments, ranks)` gives in each of `world` processes; none may hang."""
    context, port = multiprocessing.get_context("forkserver"), runs.free_port()
    processes = [
        context.Process(target=_work, args=(what, arguments, rank, world, port, path)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(runs.LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


def gradients_by(kind: str, mode: int, ranks: Ranks) -> list[dict[str, Tensor]]:
    """For each batch: gradients, norm statistics and loss terms after its step; weights stay as they are.

    Norm layers learn where the kind is "training", or "drawn" (patches) in mode 2.
    """
    model, seen = learning_model(mode), []
    changes: dict[str, Any] = {"drawn": {"patches": 1, "full_labels": True}}.get(kind, {})
    if kind == "weighted":
        changes = {"loss": build_loss("ce", class_weights=torch.tensor([0.0, 1.0, 5.0, 0.1, 2.0]))}
    if kind != "training" and (kind, mode) != ("drawn", 2):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model.train = lambda mode=True: model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def report(values: dict[str, float]) -> None:
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        buffers = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
        seen.append({**grads, **buffers, **{name: torch.tensor(value) for name, value in values.items()}})

    parts = [build_batch(indices[ranks.rank :: ranks.world]) for indices in BATCHES]
    train_epoch(model, mode, parts, optimizer, on_step=report, ranks=ranks, **changes)
    return seen


@pytest.mark.parametrize(
    ("kind", "mode", "world"),
    [
        ("evaluation", 1, 3),
        ("training", 2, 2),
        ("evaluation", 3, 3),
        ("weighted", 1, 2),  # parts count by their weight, not by their pixels
        ("drawn", 2, 2),
        ("drawn", 3, 2),
    ],
)
def test_gradients_and_losses_equal_those_of_one_process(tmp_path, kind, mode, world) -> None:
    """Stage 2's as it trains; those of stages 1 and 3 with norm layers in evaluation. Uneven parts, and none."""
    expected = gradients_by(kind, mode, ALONE)
    found = together(gradients_by, world, tmp_path, kind, mode)
    for step, wanted in enumerate(expected):
        for name, tensor in wanted.items():
            for rank in range(0 if "running" in name else world):
                difference = (found[rank][step][name] - tensor).norm()
                assert difference <= 1e-5 * tensor.norm(), (step, name, rank)


def test_statistics_are_the_mean_over_the_processes_that_had_images(tmp_path) -> None:
    found = together(gradients_by, 2, tmp_path, "training", 1)
    for step in (0, 1):
        runs.assert_equal_weights(found[1][step], found[0][step])  # the same everywhere
    means = []
    for indices in (BATCHES[0][0::2], BATCHES[0][1::2]):
        model = learning_model(1)
        model.global_(global_only.global_inputs(build_batch(indices), build_settings()))
        means.append({name: b for name, b in model.named_buffers() if "running" in name})
    for name in means[0]:
        torch.testing.assert_close(found[0][0][name], (means[0][name] + means[1][name]) / 2)


@pytest.mark.parametrize(("mode", "world"), [(1, 2), (3, 3)])
def test_evaluation_counts_the_same_in_any_number_of_processes(tmp_path, mode, world) -> None:
    expected = evaluate_and_report(mode, ALONE)
    for found in together(evaluate_and_report, world, tmp_path, mode):
        assert (found.images, found.complete) == (5, True)
        for name, matrix in expected.metrics.matrices.items():
            assert torch.equal(found.metrics.matrices[name].counts, matrix.counts), name
            assert found.metrics.matrices[name].measures() == pytest.approx(matrix.measures()), name


@pytest.mark.parametrize(("length", "batch_size", "world"), [(7, 3, 1), (7, 3, 2), (10, 4, 3), (5, 4, 4), (1, 6, 2)])
def test_parts_of_batches_make_every_index_once(length, batch_size, world) -> None:
    sampler = EpochSampler(length, seed=1)
    parts = [BatchPart(sampler, batch_size, rank, world) for rank in range(world)]
    parts[0].set_epoch(2)
    every = list(zip(*map(list, parts), strict=True))
    assert len(every) == parts[0].batches == len(parts[0])
    for number, batch in enumerate(every):
        assert sorted(index for part in batch for _, index in part) == sorted(parts[0].batch(number))
    assert sorted(index for batch in every for part in batch for _, index in part) == list(range(length))
    parts[0].set_epoch(2, start=len(every) - 1)
    assert list(parts[0]) == [every[-1][0]]
    assert len(parts[0]) == 1


def test_two_processes_killed_and_resumed_end_as_uninterrupted_ones(reference, tmp_path) -> None:
    """An uneven end, a kill and a signal."""
    whole = reference.folders.beside(tmp_path / "whole")
    results = runs.Run(whole.arguments(1), tmp_path / "whole.txt", world=2).start().wait()
    assert [result.code for result in results] == [0, 0], results
    assert ["Stage 1" in result.output for result in results] == [True, False]  # the other one is silent

    folders = reference.folders.beside(tmp_path / "stopped")
    arguments = folders.arguments(1, "--save_every=1e-9", "--resume=auto")
    path = folders.models / "one.resume.pth"
    for number, codes in ((signal.SIGKILL, {-signal.SIGKILL}), (signal.SIGTERM, {128 + signal.SIGTERM})):
        before = path.stat().st_mtime_ns if path.exists() else None
        run = runs.Run(arguments, tmp_path / "stopped.txt", world=2).start()
        while (not path.exists() or path.stat().st_mtime_ns == before) and run.processes[0].is_alive():
            time.sleep(0.01)
        run.signal(number)
        assert {result.code for result in run.wait()} == codes
    results = runs.Run(arguments, tmp_path / "rest.txt", world=2).start().wait()
    assert [result.code for result in results] == [0, 0], results
    runs.assert_equal_weights(folders.weights(1), whole.weights(1))
    assert (folders.logs / "one.log").read_text() == (whole.logs / "one.log").read_text()


def fail_in_one(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        step, calls = helper.TRAINING_STEPS[1], []

        def failing_step(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise InputError("17_sat.jpg cannot be read: it is gone")
            return step(*arguments)

        helper.TRAINING_STEPS[1] = failing_step


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_process_brings_the_others_down_with_its_message(reference, tmp_path, rank) -> None:
    folders = reference.folders.beside(tmp_path)
    run = runs.Run(folders.arguments(1), tmp_path / "failed.txt", world=2, prepare=fail_in_one, extra=(rank,))
    results = run.start().wait(limit=60)
    assert [result.code for result in results] == [2 if k == rank else 1 for k in (0, 1)], results
    assert f"error: process {rank}: 17_sat.jpg cannot be read: it is gone" in results[rank].output
    assert re.search(r"error: process \d: lost another process", results[1 - rank].output)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch_size=1"], "--batch_size 1 is for all 2 processes"),
        (["--sync_bn"], "--sync_bn cannot be used: torch has it for GPUs only"),
        (["--device=cuda:1"], "--device cuda:1 names one device, but there are 2 processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(reference, tmp_path, arguments, told) -> None:
    folders = reference.folders.beside(tmp_path)
    results = runs.Run(folders.arguments(1, *arguments), tmp_path / "refused.txt", world=2).start().wait()
    assert {result.code for result in results} == {2}
    assert told in results[0].output


def test_sync_bn_is_refused_in_mode_2(reference, capsys) -> None:
    assert train_deep_globe.main(reference.folders.arguments(2, "--sync_bn", "--task_name=x")) == 2
    assert "mode 2 normalises every sub-batch alone" in capsys.readouterr().err
