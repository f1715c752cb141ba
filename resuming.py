"""The files of a training run, and how a run is taken down into one of them and put back from it."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models import checkpoint
from models.glnet import GLNet
from utils import run_record, training_state
from utils.distributed import Ranks
from utils.errors import InputError
from utils.tally import Progress
from utils.training_state import Standing, TrainingState


@dataclass(frozen=True)
class Files:
    """What a run writes into `model_path`; `resume` is there as long as the run is unfinished."""

    last: Path
    best: Path
    resume: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Files":
        names = (options.task_name + ending for ending in (".pth", ".best.pth", ".resume.pth"))
        return cls(*(options.model_path / name for name in names))


def source(options: argparse.Namespace) -> Path | None:
    """The resume file that `options` say to go on from; None to start from the beginning.

    Raises InputError where an unfinished run would be lost without `--overwrite`.
    """
    own = Files.of(options).resume
    if options.resume == "auto":
        return own if own.exists() else None
    if options.resume != "off":
        path = Path(options.resume)
        if own.exists() and not (path.exists() and path.samefile(own)):
            raise InputError(f"{own} is of another unfinished run, which would be lost: give another --task_name")
        return path
    if own.exists() and not options.overwrite:
        raise InputError(
            f"{own} is of an unfinished run of this name: --resume auto goes on with it, --overwrite starts over"
        )
    return None


@dataclass
class Learner:
    """What changes while a run trains."""

    model: GLNet
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    standing: Standing
    progress: Progress

    def capture(self, ranks: Ranks, options: Mapping[str, Any], logs: Mapping[str, int]) -> TrainingState:
        """The state as it stands, for `training_state.write`; all processes take part."""
        sums = [counts.clone() for counts in self.progress.tally.sums()]
        for counts in sums:
            ranks.sum_([counts])
        return TrainingState(
            model={name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()},
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict() or None,
            standing=asdict(self.standing),
            progress=training_state.progress_record(self.progress),
            sums=[counts.cpu() for counts in sums],
            options=dict(options),
            logs=dict(logs),
            random=training_state.random_states(),
        )

    def restore(self, state: TrainingState, path: Path, ranks: Ranks) -> None:
        """The inverse. Raises InputError, naming `path`, where `state` is damaged or of another network."""
        checkpoint.load(self.model, checkpoint.only_tensors(path, state.model), path, ("",))
        try:
            self.optimizer.load_state_dict(state.optimizer)
            for parameter, moments in self.optimizer.state.items():
                if any(moment.shape not in (parameter.shape, torch.Size()) for moment in moments.values()):
                    raise ValueError("moments of another shape than their weights")
            self.scheduler.load_state_dict(state.scheduler)
            if state.scaler and self.scaler.is_enabled():
                self.scaler.load_state_dict(state.scaler)
            training_state.restore_progress(state, self.progress, ranks.main)
            training_state.set_random_states(state.random)
            self.standing = Standing(**state.standing)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path} is damaged, or of another network: {error}") from error
        self.standing.resumed.append(run_record.now())
