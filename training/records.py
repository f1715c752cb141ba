"""The records of a run and of each of its epochs, for all logs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dataset.base import Sample
from evaluation.report import scores
from evaluation.run import Evaluation
from training.log import LONGEST_PICTURE, Matrices, RunLog
from training.state import TrainerState
from utils.classes import Classes
from utils.distributed import Ranks
from utils.errors import required
from utils.run_record import now
from utils.tables import as_markdown
from utils.visualize import pictures

FIXED = 2
"""The number of validation images, from the first on, that TensorBoard shows after every epoch."""

Pictures = dict[int, dict[str, np.ndarray]]
"""RGB pictures (H, W, 3) uint8 by name, of validation images by index."""


def run_table(record: Mapping[str, Any]) -> str:
    """Return `record` as a Markdown table for TensorBoard; nested entries get a row each."""
    rows = []
    for name, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{name} {key}".strip(), str(entry)) for key, entry in inner]
    return as_markdown(["what", "value"], rows)


def picture_collector(
    collected: Pictures, classes: Classes, epoch: int, images: int, ranks: Ranks
) -> Callable[[Sample, dict[str, Tensor]], None]:
    """Return a callback for a validation that adds pictures of some of this process's images to `collected`.

    The images are the fixed ones and, as released, another one in each epoch, counted from 0. Of the `images` of the
    validation number i is that of process i modulo the number of processes.
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
    validated: Evaluation | None,
    collected: Pictures,
    *,
    num_epochs: int,
    peak_memory_mb: float,
) -> None:
    """Record the last epoch, which `state` counts already: text, a line of JSON, scalars and pictures.

    `trained` is the training metric of all processes, `validated` None if the epoch was not validated.
    """
    epoch = state.run.epoch - 1  # in TensorBoard counted from 0
    seconds = state.epoch.seconds
    scored = {} if validated is None else validated.metrics.matrices
    numbers = {
        "seconds": seconds,
        "images_per_second": state.epoch.images / max(seconds, 1e-9),
        **({} if validated is None else {"validation_seconds_per_image": validated.seconds_per_image}),
        "peak_memory_mb": peak_memory_mb,
        "skipped_steps": state.epoch.skipped,
    }
    log.epoch(epoch, num_epochs, trained, scored)
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
            "validation": scores(classes, scored) if scored else None,
        }
    )
