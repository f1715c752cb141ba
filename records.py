"""What is recorded of every epoch, in all the logs."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

import helper
from dataset.base import Sample
from resuming import Learner
from utils import run_record
from utils.classes import Classes
from utils.distributed import Ranks
from utils.logger import LONGEST_SIDE, Matrices, RunLog
from utils.report import scores
from utils.visualize import pictures

FIXED = 2
"""Validation images, from the first on, that TensorBoard shows after every epoch."""

Pictures = dict[int, dict[str, np.ndarray]]
"""Of validation images by their index: RGB pictures by name."""


def collect(
    seen: Pictures, classes: Classes, epoch: int, images: int, ranks: Ranks
) -> Callable[[Sample, dict[str, Tensor]], None]:
    """A callback for the validation of `epoch` that puts pictures of some of this process's images into `seen`.

    These are the fixed ones, and another one each epoch, as released. There are `images` over all processes.
    """
    wanted = {*range(FIXED), epoch % images}
    indices = iter(range(ranks.rank, images, ranks.world))

    def show(sample: Sample, found: dict[str, Tensor]) -> None:
        if (index := next(indices)) in wanted:
            seen[index] = pictures(sample.image, sample.label, found, classes.palette, LONGEST_SIDE)

    return show


def record_epoch(
    log: RunLog,
    classes: Classes,
    learner: Learner,
    num_epochs: int,
    trained: Matrices,
    found: helper.Evaluation,
    peak_memory_mb: float,
    seen: Mapping[int, dict[str, np.ndarray]],
) -> None:
    """Record the epoch that `learner` has just done: text, a line of JSON, scalars and the pictures `seen`."""
    progress, standing = learner.progress, learner.standing
    epoch = standing.epoch - 1  # in TensorBoard counted from 0
    numbers = {
        "seconds": progress.seconds,
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "validation_seconds_per_image": found.seconds_per_image,
        "peak_memory_mb": peak_memory_mb,
        "skipped_steps": progress.skipped,
    }
    log.epoch(epoch, num_epochs, trained, found.tally.matrices)
    log.scalars(epoch, {f"epoch/{name}": value for name, value in numbers.items()})
    for index, kinds in sorted(seen.items()):
        if index < FIXED:
            log.images(epoch, {f"fixed_{index + 1}/{name}": picture for name, picture in kinds.items()})
        if index == epoch % found.images:
            log.images(epoch, kinds)
    log.line(
        {
            "started": standing.started,
            "epoch": standing.epoch,
            "time": run_record.now(),
            "learning_rate": learner.scheduler.get_last_lr()[0],
            "loss": progress.loss,
            **numbers,
            "best": standing.best_epoch == standing.epoch,
            "classes": list(classes.names),
            "train": scores(classes, trained),
            "validation": scores(classes, found.tally.matrices),
        }
    )
