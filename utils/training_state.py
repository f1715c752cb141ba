"""The resume file: everything that an interrupted training needs to end as if it had not been."""

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.files import load_torch, save_torch
from utils.tally import Progress

FORMAT, VERSION = "glnet training", 2

HARMLESS = {
    "check_data",
    "data_path",
    "device",
    "deterministic",
    "early_stopping",
    "evaluation",
    "init_from",
    "log_path",
    "max_bad_steps",
    "max_pixels",
    "model_path",
    "num_workers",
    "backbone_weights",
    "overwrite",
    "path_g",
    "path_g2l",
    "path_l2g",
    "resume",
    "resume_anyway",
    "save_every",
    "save_predictions",
    "split",
    "split_lists",
    "task_name",
}
"""Options that may differ when a run goes on: they say where, how fast and how long, or what it once started from.
All others make it another experiment."""

SILENT = {"check_data", "evaluation", "overwrite", "resume", "resume_anyway", "save_predictions", "split"}
"""Those of them whose change is not even worth telling."""


@dataclass
class Standing:
    """Where a run stands between its epochs; `started` and `resumed` are times in UTC."""

    started: str
    resumed: list[str] = field(default_factory=list)
    epoch: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    bad_in_row: int = 0


@dataclass
class TrainingState:
    """What the file holds: plain values, and tensors on the CPU.

    `standing` and `progress` are the entries of `Standing` and of `Progress`, `sums` the metric of the epoch so far, of
    all processes together. `scaler` is that of float16 gradients, None in any other precision.
    `options` is what the run was started with, `logs` how long each log file was.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    standing: dict[str, Any]
    progress: dict[str, Any]
    sums: list[Tensor]
    options: dict[str, Any]
    logs: dict[str, int]
    random: dict[str, Any]


def progress_record(progress: Progress) -> dict[str, Any]:
    """The numbers of `progress`, without its metric."""
    return {name: value for name, value in vars(progress).items() if name not in ("tally", "asked")}


def restore_progress(state: TrainingState, progress: Progress, main: bool) -> None:
    """Set `progress` to what `state` says; the metric goes to the `main` process alone, as it counts once."""
    for name, value in progress_record(progress).items():
        setattr(progress, name, type(value)(state.progress[name]))
    for counts, saved in zip(progress.tally.sums(), state.sums, strict=True):
        if main:
            counts.copy_(saved)


def write(path: Path, state: TrainingState) -> None:
    """Write `state` beside and renamed. Raises InputError, naming `path`, when that cannot be done."""
    # not asdict(), which would copy every tensor
    content = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    save_torch(path, {"format": FORMAT, "version": VERSION, **content})


def read(path: Path) -> TrainingState:
    """Read what `write` wrote. Raises InputError, naming `path`, when it is missing, damaged or something else."""
    content = load_torch(path, "resume file")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no resume file; --resume takes auto, off, or a file that ends in .resume.pth")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has format version {content.get('version')}; this code reads {VERSION}")
    kinds = dict.fromkeys(
        ("model", "optimizer", "scheduler", "standing", "progress", "options", "logs", "random"), dict
    )
    for name, kind in {**kinds, "sums": list}.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is damaged: its {name} is no {kind.__name__}")
    return TrainingState(**{entry.name: content.get(entry.name) for entry in fields(TrainingState)})


def random_states() -> dict[str, Any]:
    """The states of all generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what other code may draw from
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; GPUs that are not there are passed over."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def options_record(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """`options` in plain values, with `more` that identifies the experiment."""
    record = {**vars(options), **more}
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in sorted(record.items())}


def compare_options(saved: Mapping[str, Any], given: Mapping[str, Any], anyway: bool) -> list[str]:
    """A line for each option that changed since; InputError where they make it another experiment, unless `anyway`."""
    changed = [k for k in sorted({*saved, *given} - SILENT) if saved.get(k) != given.get(k)]
    lines = {k: f"--{k} was {saved.get(k)}, now {given.get(k)}" for k in changed}
    serious = [k for k in changed if k not in HARMLESS]
    if serious and not anyway:
        raise InputError(
            f"the unfinished run is another experiment: {'; '.join(lines[k] for k in serious)}; "
            "give the same options, or --resume_anyway to go on with the new ones, or --overwrite to start over"
        )
    return list(lines.values())
