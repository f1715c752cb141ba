"""The resume file: the state of an unfinished training, which then ends as if it had not been interrupted."""

import random
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helper import EpochState
from models.glnet import GLNet
from models.tensors import children_of, load, only_tensors, state_of
from training.average import WeightAverage
from training.options import LOGGED, RELEASED, SILENT, build_parser
from utils.arguments import ANY, REMOVED
from utils.distributed import Ranks
from utils.errors import InputError
from utils.files import check_version, load_torch, save_torch, unreadable_record
from utils.run_record import options_record
from utils.settings import RECORDED
from utils.stages import STAGES

FORMAT, VERSION = "glnet training", 2

EPOCH_OPTIONS = ("batch_size", "seed", "training_images", "window", "windows")
"""The options, and the training images, that determine which images are in which step of an epoch."""

RATE_OPTIONS = {*EPOCH_OPTIONS, "num_epochs", "lr", "backbone_lr", "warmup", "optimizer", "weight_decay"}
"""The options that determine the rates of the steps and how the optimizer takes them, some of earlier versions."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a run in `--model_path`.

    `resume` exists while the run is unfinished; `average` has the averaged weights of the last epoch, with `--ema`.
    """

    last: Path
    best: Path
    resume: Path
    average: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> "RunFiles":
        """Return the files of the run called `name` in `folder`."""
        return cls(*(folder / f"{name}{ending}" for ending in (".pth", ".best.pth", ".resume.pth", ".ema.pth")))


def resume_source(files: RunFiles, resume: str, overwrite: bool) -> Path | None:
    """Return the resume file that a run continues from, by the options; None if it starts from the beginning.

    Raises InputError if an unfinished run would be lost, and `overwrite` is not given.
    """
    own = files.resume
    if resume == "auto":
        return own if own.exists() else None
    if resume != "off":
        path = Path(resume)
        if own.exists() and not (path.exists() and path.samefile(own)):
            raise InputError(f"{own} is of another unfinished run, which would be lost: give another --task_name")
        return path
    if own.exists() and not overwrite:
        raise InputError(
            f"{own} is of an unfinished run of this name: --resume auto goes on with it, --overwrite starts over"
        )
    return None


@dataclass
class RunState:
    """The state of a run between its epochs."""

    started: str  # a time in UTC, as in `resumed`
    resumed: list[str] = field(default_factory=list)
    epoch: int = 0  # epochs done
    best_score: float = -1.0  # the headline's best mIoU on the validation images, 0..1; -1 before the first
    best_epoch: int = 0  # that reached it, counted from 1
    bad_in_row: int = 0  # the last steps in a row whose loss or gradient was not finite
    unvalidated: int = 0  # epochs since the last validation


Snapshot = dict[str, Any]
"""The content of a resume file, plain values and tensors on the CPU; see `TrainerState.capture`."""

ENTRIES = ("model", "optimizer", "scheduler", "standing", "progress", "options", "logs", "random", "sums")
"""The entries of every snapshot; earlier versions did not write the others."""


def write(path: Path, snapshot: Snapshot) -> None:
    """Write a resume file through `utils.files.replacing`. Raises InputError, naming `path`, if that fails."""
    save_torch(path, {"format": FORMAT, "version": VERSION, **snapshot})


def read(path: Path) -> Snapshot:
    """Read a resume file. Raises InputError, naming `path`, if it is missing, damaged or no such file."""
    content = load_torch(path, "resume file")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no resume file; --resume takes auto, off, or a file that ends in .resume.pth")
    check_version(path, content, VERSION)
    for name in ENTRIES:
        kind = list if name == "sums" else dict
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is damaged: its {name} is no {kind.__name__}")
    return content


@dataclass
class TrainerState:
    """Everything that changes while a run trains, and so is in a snapshot; `children` of the network are saved."""

    model: GLNet
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    run: RunState
    epoch: EpochState
    children: Iterable[str] = STAGES[3].uses
    average: WeightAverage | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the averaged weights; without an average, its own."""
        return nullcontext() if self.average is None else self.average.applied()

    def capture(self, ranks: Ranks, options: Mapping[str, Any], logs: Mapping[str, int]) -> Snapshot:
        """Take a snapshot; all processes take part, and their metrics are added. `options` are by `options_record`."""
        sums = [counts.clone() for counts in self.epoch.metrics.sums()]
        for counts in sums:
            ranks.sum_([counts])
        return {
            "model": state_of(self.model, self.children),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() or None,
            "standing": asdict(self.run),
            "progress": _epoch_record(self.epoch),
            "sums": [counts.cpu() for counts in sums],  # the training metric of the epoch so far
            "options": dict(options),
            "logs": dict(logs),
            "random": _random_states(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, snapshot: Snapshot, path: Path, ranks: Ranks, *, anew: bool = False) -> None:
        """Restore a snapshot of the file at `path`; the metric is restored in the main process alone.

        If `anew`, the optimizer's groups keep their rates and settings, and take over only the moments; `reschedule` is
        to follow. Raises InputError if the snapshot is damaged or of another network.
        """
        tensors = only_tensors(path, snapshot["model"])
        self.children = {*self.children} | children_of(tensors)
        load(self.model, tensors, path, [f"{child}." for child in self.children])
        try:
            own = {"param_groups": self.optimizer.state_dict()["param_groups"]} if anew else {}
            # in every grouping the parameters have the network's order
            self.optimizer.load_state_dict({**snapshot["optimizer"], **own})
            for parameter, moments in self.optimizer.state.items():
                if any(moment.shape not in (parameter.shape, torch.Size()) for moment in moments.values()):
                    raise ValueError("moments of another shape than their weights")
            self.scheduler.load_state_dict(snapshot["scheduler"])
            scaler, average = snapshot.get("scaler"), snapshot.get("average")
            if scaler and self.scaler.is_enabled():
                self.scaler.load_state_dict(scaler)
            if self.average is not None and average is not None:
                self.average.load_state_dict(average)
            elif self.average is not None:  # the run did not average before
                self.average.restart()
            for name, value in _epoch_record(self.epoch).items():
                setattr(self.epoch, name, type(value)(snapshot["progress"][name]))
            for counts, saved in zip(self.epoch.metrics.sums(), snapshot["sums"], strict=True):
                if ranks.main:
                    counts.copy_(saved)
            _set_random_states(snapshot["random"])
            self.run = RunState(**snapshot["standing"])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise unreadable_record(path, error, f", or of another network: {error}") from error

    def reschedule(self, step: int) -> None:
        """Set the number of schedule steps taken, `step`, and the rates that follow from the groups' initial ones."""
        self.scheduler.last_epoch = step
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(step)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _epoch_record(epoch: EpochState) -> dict[str, Any]:
    return {name: value for name, value in vars(epoch).items() if name not in ("metrics", "save_requested")}


def _random_states() -> dict[str, Any]:
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
    for name in REMOVED.keys() & found.keys():
        same = REMOVED[name][1]
        if same is ANY or found[name] in (None, same):
            del found[name]
    before = {**RELEASED, **RECORDED}
    return {**found, **{name: value for name, value in before.items() if found.get(name) is None}}


def changed_options(saved: Mapping[str, Any], given: Mapping[str, Any], anyway: bool) -> dict[str, str]:
    """Compare the options of an unfinished run, by `options_record`, with those of the run that continues it.

    An option that the file does not have is newer than the file; it counts as saved with its default. Return a line for
    each changed option, by name, without the options that are SILENT. Raises InputError if the changes make another
    experiment, unless `anyway`.
    """
    saved, given = _in_present_terms(saved), _in_present_terms(given)
    defaults = options_record(build_parser().parse_args([]))
    lines = {}
    for name in sorted({*saved, *given} - SILENT):
        before, now = saved.get(name, defaults.get(name)), "removed" if name in REMOVED else given.get(name)
        if before != now:
            lines[name] = f"--{name} was {before}, now {now}"
    serious = [name for name in lines if name not in LOGGED]
    if serious and not anyway:
        raise InputError(
            f"the unfinished run is another experiment: {'; '.join(lines[k] for k in serious)}; "
            "give the same options, or --resume_anyway to go on with the new ones, or --overwrite to start over"
        )
    return lines
