"""The records of a run and of each of its epochs, for all logs."""

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import helper
from dataset.base import Sample
from training.log import LONGEST_PICTURE, Matrices, RunLog
from training.report import scores
from training.state import TrainerState
from utils.classes import Classes
from utils.distributed import Ranks
from utils.errors import required
from utils.visualize import pictures

FIXED = 2
"""The number of validation images, from the first on, that TensorBoard shows after every epoch."""

Pictures = dict[int, dict[str, np.ndarray]]
"""RGB pictures (H, W, 3) uint8 by name, of validation images by index."""

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "tensorboardX", "tqdm", "timm")
ROOT = Path(__file__).resolve().parent.parent


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages; None for one not installed under its usual name."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """Return a description of `device`: a GPU's product name, or the processor and its threads."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def run_record(
    options: Mapping[str, Any], device: torch.device, processes: int, started: str, resumed: list[str]
) -> dict[str, Any]:
    """Return the record of a run, with all that is needed to repeat it.

    Args:
        options: of the run, as plain values.
        device: of the network.
        processes: that train together.
        started: time in UTC.
        resumed: times in UTC.

    Returns:
        Values that JSON can hold.
    """
    return {
        "started": started,
        "resumed": resumed,
        "command": sys.argv,
        "options": dict(options),
        "seed": options["seed"],
        "device": device_name(device),
        "processes": processes,
        "machine": platform.node(),
        "system": platform.platform(),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return `record` as a Markdown table for TensorBoard; nested entries get a row each."""
    rows = []
    for name, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [f"| {name} {key} | {entry} |".replace("  ", " ") for key, entry in inner]
    return "\n".join(["| what | value |", "|---|---|", *rows])


def picture_collector(
    collected: Pictures, classes: Classes, epoch: int, images: int, ranks: Ranks
) -> Callable[[Sample, dict[str, Tensor]], None]:
    """Return a callback for a validation that keeps pictures of some of this process's images.

    The images are the fixed ones and, as released, another one in each epoch.

    Args:
        collected: gets the pictures.
        classes: their colours.
        epoch: counted from 0.
        images: of the validation, over all processes.
        ranks: the processes; image i is that of process i modulo their number.
    """
    wanted = {*range(FIXED), epoch % images}
    indices = iter(range(ranks.rank, images, ranks.world))

    def collect(sample: Sample, found: dict[str, Tensor]) -> None:
        if (index := next(indices)) in wanted:
            image = required(sample.image, "image")
            collected[index] = pictures(image, sample.label, found, classes.palette, LONGEST_PICTURE)

    return collect


def record_epoch(
    log: RunLog,
    classes: Classes,
    state: TrainerState,
    trained: Matrices,
    validated: helper.Evaluation | None,
    collected: Mapping[int, dict[str, np.ndarray]],
    *,
    num_epochs: int,
    peak_memory_mb: float,
) -> None:
    """Record the last epoch: text, a line of JSON, scalars and pictures.

    Args:
        log: the logs.
        classes: names and measures.
        state: of the run, in which the epoch is counted already.
        trained: the training metric of all processes.
        validated: the validation's result; None if the epoch was not validated.
        collected: the pictures of the validation, by image.
        num_epochs: of the whole run.
        peak_memory_mb: so far.
    """
    epoch = state.run.epoch - 1  # in TensorBoard counted from 0
    seconds = state.epoch.seconds
    numbers = {
        "seconds": seconds,
        "images_per_second": state.epoch.images / max(seconds, 1e-9),
        **({} if validated is None else {"validation_seconds_per_image": validated.seconds_per_image}),
        "peak_memory_mb": peak_memory_mb,
        "skipped_steps": state.epoch.skipped,
    }
    log.epoch(epoch, num_epochs, trained, {} if validated is None else validated.metrics.matrices)
    log.scalars(epoch, {f"epoch/{name}": value for name, value in numbers.items()})
    for index, kinds in sorted(collected.items()):
        if index < FIXED:
            log.images(epoch, {f"fixed_{index + 1}/{name}": picture for name, picture in kinds.items()})
        if validated is not None and index == epoch % validated.images:
            log.images(epoch, kinds)
    log.line(
        {
            "started": state.run.started,
            "epoch": state.run.epoch,
            "time": now(),
            "learning_rate": state.scheduler.get_last_lr()[-1],
            "loss": state.epoch.loss,
            **numbers,
            "best": state.run.best_epoch == state.run.epoch,
            "classes": list(classes.names),
            "train": scores(classes, trained),
            "validation": None if validated is None else scores(classes, validated.metrics.matrices),
        }
    )
