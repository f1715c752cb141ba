"""The resume file: the state of an unfinished training, which then ends as if it had not been interrupted."""

import argparse
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helper import EpochState
from models.glnet import GLNet
from models.tensors import load, only_tensors
from training.average import WeightAverage
from training.options import RELEASED, build_parser
from utils.arguments import REFUSED, SILENT
from utils.distributed import Ranks
from utils.errors import InputError
from utils.files import check_version, load_torch, save_torch, unreadable_record
from utils.run_record import options_record
from utils.settings import RECORDED

FORMAT, VERSION = "glnet training", 2

EPOCH_OPTIONS = ("batch_size", "seed", "training_images", "window", "windows")
"""The options, and the training images, that determine which images are in which step of an epoch."""

RATE_OPTIONS = {*EPOCH_OPTIONS, "num_epochs", "lr", "backbone_lr", "warmup", "optimizer", "weight_decay"}
"""The options that determine the rates of the steps, and how the optimizer takes them."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a run in `--model_path`.

    Attributes:
        last: checkpoint of the last epoch.
        best: checkpoint of the epoch with the best validation score.
        resume: the resume file, which exists as long as the run is unfinished.
        card: the model card, written when the run is finished.
        average: checkpoint of the last epoch with averaged weights, of a run with `--ema`.
    """

    last: Path
    best: Path
    resume: Path
    card: Path
    average: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> "RunFiles":
        """Return the paths that follow from `--model_path` and `--task_name`."""
        folder, name = options.model_path, options.task_name
        return cls(*(folder / f"{name}{ending}" for ending in (".pth", ".best.pth", ".resume.pth", ".md", ".ema.pth")))


def resume_source(options: argparse.Namespace) -> Path | None:
    """Return the resume file that a run continues from; None if it starts from the beginning.

    Raises InputError if an unfinished run would be lost and `--overwrite` is not given.
    """
    own = RunFiles.of(options).resume
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
class RunState:
    """The state of a run between its epochs.

    Attributes:
        started, resumed: times in UTC.
        epoch: epochs done.
        best_score: the headline's best mIoU on the validation images, 0..1; -1 before the first.
        best_epoch: the epoch that reached it, counted from 1.
        bad_in_row: the last steps in a row whose loss or gradient was not finite.
        unvalidated: epochs since the last validation.
    """

    started: str
    resumed: list[str] = field(default_factory=list)
    epoch: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    bad_in_row: int = 0
    unvalidated: int = 0


@dataclass
class Snapshot:
    """The content of a resume file: plain values, and tensors on the CPU.

    Attributes:
        model: the network's state dict.
        optimizer, scheduler: their state dicts.
        scaler: the state dict of the float16 gradients' scaler; None in other precisions.
        standing: the entries of `RunState`.
        progress: the entries of `EpochState` but its metrics.
        sums: the training metric of the epoch so far, of all processes together.
        options: the options that the run was started with.
        logs: the length of each log file, in bytes.
        random: the states of all random generators.
        average: the state dict of the weights' average; None without one.
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
    average: dict[str, Any] | None = None


def write(path: Path, snapshot: Snapshot) -> None:
    """Write a resume file through `utils.files.replacing`. Raises InputError, naming `path`, if that fails."""
    # not asdict(), which would copy every tensor
    content = {entry.name: getattr(snapshot, entry.name) for entry in fields(snapshot)}
    save_torch(path, {"format": FORMAT, "version": VERSION, **content})


def read(path: Path) -> Snapshot:
    """Read a resume file. Raises InputError, naming `path`, if it is missing, damaged or no such file."""
    content = load_torch(path, "resume file")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no resume file; --resume takes auto, off, or a file that ends in .resume.pth")
    check_version(path, content, VERSION)
    kinds: dict[str, type] = dict.fromkeys(
        ("model", "optimizer", "scheduler", "standing", "progress", "options", "logs", "random"), dict
    )
    for name, kind in {**kinds, "sums": list}.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is damaged: its {name} is no {kind.__name__}")
    entries: dict[str, Any] = {entry.name: content.get(entry.name) for entry in fields(Snapshot)}
    return Snapshot(**entries)


@dataclass
class TrainerState:
    """Everything that changes while a run trains, and so is in a snapshot.

    `average` is that of the weights, if the run averages them.
    """

    model: GLNet
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    run: RunState
    epoch: EpochState
    average: WeightAverage | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the averaged weights; without an average, its own."""
        return nullcontext() if self.average is None else self.average.applied()

    def capture(self, ranks: Ranks, options: Mapping[str, Any], logs: Mapping[str, int]) -> Snapshot:
        """Take a snapshot; all processes take part.

        Args:
            ranks: all processes; their metrics are added.
            options: of the run, by `options_record`.
            logs: the length of each log file, in bytes.
        """
        sums = [counts.clone() for counts in self.epoch.metrics.sums()]
        for counts in sums:
            ranks.sum_([counts])
        return Snapshot(
            model={name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()},
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict() or None,
            standing=asdict(self.run),
            progress=_epoch_record(self.epoch),
            sums=[counts.cpu() for counts in sums],
            options=dict(options),
            logs=dict(logs),
            random=_random_states(),
            average=None if self.average is None else self.average.state_dict(),
        )

    def restore(self, snapshot: Snapshot, path: Path, ranks: Ranks, *, anew: bool = False) -> None:
        """Restore a snapshot.

        Args:
            snapshot: by `capture`.
            path: its file, for messages.
            ranks: all processes; the metric is restored in the main one.
            anew: whether the optimizer's groups keep their rates and settings, and take over only the moments;
                `reschedule` is to follow.

        Raises:
            InputError: the snapshot is damaged or of another network.
        """
        load(self.model, only_tensors(path, snapshot.model), path, ("",))
        try:
            own = {"param_groups": self.optimizer.state_dict()["param_groups"]} if anew else {}
            # in every grouping the parameters have the network's order
            self.optimizer.load_state_dict({**snapshot.optimizer, **own})
            for parameter, moments in self.optimizer.state.items():
                if any(moment.shape not in (parameter.shape, torch.Size()) for moment in moments.values()):
                    raise ValueError("moments of another shape than their weights")
            self.scheduler.load_state_dict(snapshot.scheduler)
            if snapshot.scaler and self.scaler.is_enabled():
                self.scaler.load_state_dict(snapshot.scaler)
            self._restore_average(snapshot)
            self._restore_epoch(snapshot, ranks.main)
            _set_random_states(snapshot.random)
            self.run = RunState(**snapshot.standing)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise unreadable_record(path, error, f", or of another network: {error}") from error

    def _restore_average(self, snapshot: Snapshot) -> None:
        """Restore the average, or start it with the restored weights if the run did not average before."""
        if self.average is not None and snapshot.average is not None:
            self.average.load_state_dict(snapshot.average)
        elif self.average is not None:
            self.average.restart()

    def _restore_epoch(self, snapshot: Snapshot, main: bool) -> None:
        """Restore the epoch. The metric, a sum over processes, is restored in the `main` process alone."""
        for name, value in _epoch_record(self.epoch).items():
            setattr(self.epoch, name, type(value)(snapshot.progress[name]))
        for counts, saved in zip(self.epoch.metrics.sums(), snapshot.sums, strict=True):
            if main:
                counts.copy_(saved)

    def reschedule(self, step: int) -> None:
        """Set the number of schedule steps taken, `step`, and the rates that follow from the groups' initial ones."""
        self.scheduler.last_epoch = step
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(step)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _epoch_record(epoch: EpochState) -> dict[str, Any]:
    """Return the entries of `epoch` that are saved as numbers."""
    return {name: value for name, value in vars(epoch).items() if name not in ("metrics", "save_requested")}


def _random_states() -> dict[str, Any]:
    """Return the states of all generators, as plain values and tensors."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - other code may draw from the global generator
    name, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states of all generators; those of GPUs are left out if there is another number of GPUs now."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _in_present_terms(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded options, also of an earlier version: renamed, and with the values that new ones had before."""
    found = dict(options)
    if "share_maps" in found:
        found["share"] = "own" if found.pop("share_maps") else "none"
    before = {**RELEASED, **{name: RECORDED[name] for name in ("share", "pyramid_width", "pyramid_norm")}}
    return {**found, **{name: value for name, value in before.items() if found.get(name) is None}}


def changed_options(saved: Mapping[str, Any], given: Mapping[str, Any], anyway: bool) -> dict[str, str]:
    """Compare the options of an unfinished run with those of the run that continues it.

    An option that the file does not have is newer than the file; it counts as saved with its default.

    Args:
        saved: `options_record` of the run that wrote the file.
        given: `options_record` of the run that continues it.
        anyway: whether changes that make another experiment are allowed (`--resume_anyway`).

    Returns:
        A line for each changed option, by name, without the options that are SILENT.

    Raises:
        InputError: the changes make another experiment, and that is not allowed.
    """
    saved, given = _in_present_terms(saved), _in_present_terms(given)
    parser = build_parser()
    rules = parser.on_resume
    defaults = options_record(argparse.Namespace(**{name: parser.get_default(name) for name in rules}))
    known = {name for name in {*saved, *given} if rules.get(name) != SILENT and (name in given or name in saved)}
    lines = {}
    for name in sorted(known):
        before, now = saved.get(name, defaults.get(name)), given.get(name)
        if before != now:
            lines[name] = f"--{name} was {before}, now {now}"
    serious = [name for name in lines if rules.get(name, REFUSED) == REFUSED]
    if serious and not anyway:
        raise InputError(
            f"the unfinished run is another experiment: {'; '.join(lines[k] for k in serious)}; "
            "give the same options, or --resume_anyway to go on with the new ones, or --overwrite to start over"
        )
    return lines
