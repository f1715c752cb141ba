"""A training run: its epochs, when it saves and stops, what it records."""

import argparse
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

import helper
from dataset.base import BatchPart, EpochSampler, SampleLoader, SegmentationDataset
from models import checkpoint
from models.checkpoint import Header
from models.glnet import GLNet
from records import Pictures, collect, record_epoch
from resuming import Files, Learner, source
from utils import run_record, training_state
from utils.distributed import Ranks
from utils.errors import InputError, Interrupted, RunError
from utils.files import check_writable, remove_leftovers
from utils.logger import RunLog
from utils.patches import Settings
from utils.report import peak_memory_mb
from utils.schedule import poly
from utils.signals import StopSignals
from utils.stages import Stage
from utils.tally import Progress, Tally
from utils.training_state import Standing, TrainingState

WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and by whom."""

    options: argparse.Namespace
    stage: Stage
    model: GLNet
    header: Header
    settings: Settings
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    ranks: Ranks

    def record(self) -> dict[str, Any]:
        """The options, and what else makes it this experiment, in plain values."""
        return training_state.options_record(
            self.options, processes=self.ranks.world, training_images=self.train_data.fingerprint()
        )


class Training:
    """A run of `job`, new or going on from the state that its options name."""

    def __init__(self, job: Job) -> None:
        options, ranks = job.options, job.ranks
        self.job = job
        self.files = Files.of(options)
        self.signals = StopSignals()
        self.log: RunLog | None = None  # of the main process, while the run goes on
        self.parts = BatchPart(
            EpochSampler(len(job.train_data), options.seed), options.batch_size, ranks.rank, ranks.world
        )
        loading = {"num_workers": options.num_workers, "persistent": True, "pin": job.settings.device.type == "cuda"}
        self.loader = SampleLoader(job.train_data, sampler=self.parts, **loading)
        own = range(ranks.rank, len(job.val_data), ranks.world)
        self.val_loader = SampleLoader(job.val_data, sampler=own, **loading)
        learned = [p for p in job.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=options.lr, weight_decay=WEIGHT_DECAY)
        steps = self.parts.batches * options.num_epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: poly(t, steps))
        self.learner = Learner(
            job.model, optimizer, scheduler, job.settings.scaler, Standing(run_record.now()), self.new_progress()
        )
        self.saved_at = time.monotonic()

    def new_progress(self) -> Progress:
        return Progress(self.new_tally())

    def new_tally(self) -> Tally:
        return Tally(self.job.stage, self.job.header.classes)

    @property
    def standing(self) -> Standing:
        return self.learner.standing

    @property
    def progress(self) -> Progress:
        return self.learner.progress

    def run(self) -> None:
        """Train the epochs that are left, validate after each, keep the last and the best."""
        options, ranks = self.job.options, self.job.ranks
        state = self.resume()
        self.check_processes()
        with self.signals:
            try:
                if ranks.main:
                    self.open(state)
                while self.standing.epoch < options.num_epochs and not self.stalled():
                    self.one_epoch()
            finally:
                self.loader.close()
                self.val_loader.close()
                if self.log is not None:
                    self.log.close()
        if ranks.main:
            self.files.resume.unlink(missing_ok=True)
            self.tell_end()

    # starting

    def resume(self) -> TrainingState | None:
        """Go on from the state that the options name, if any, and return it."""
        options = self.job.options
        path = source(options)
        if path is None:
            return None
        state = training_state.read(path)
        changed = training_state.compare_options(state.options, self.job.record(), options.resume_anyway)
        self.learner.restore(state, path, self.job.ranks)
        if self.job.ranks.main:
            for line in changed:
                logging.warning(f"changed since: {line}")
            logging.info(f"Going on in epoch {self.standing.epoch + 1} after step {self.progress.batches}: {path}")
        return state

    def check_processes(self) -> None:
        """All processes are about to do the same, with an image for each; InputError where they are not."""
        options, ranks = self.job.options, self.job.ranks
        left = len(self.job.train_data) % options.batch_size
        if options.batch_size < ranks.world:
            raise InputError(f"--batch_size {options.batch_size} is for all {ranks.world} processes together: raise it")
        if options.sync_bn and 0 < left < ranks.world:
            raise InputError(
                f"--sync_bn needs an image for each of the {ranks.world} processes in every batch, but --batch_size "
                f"{options.batch_size} leaves {left} for an epoch's last one; choose another"
            )
        # each may name its own device; the rest must agree
        mine = (self.standing.epoch, self.progress.batches, {**self.job.record(), "device": None})
        if any(theirs != mine for theirs in ranks.gather(mine)):
            raise InputError(
                "the processes do not agree on what they are to do; give all the same options, and folders "
                "that hold the same files on every machine"
            )

    def open(self, state: TrainingState | None) -> None:
        """Open the logs and say what the run is; what an earlier run of the name left is kept or cleared away."""
        job, options = self.job, self.job.options
        own = state is not None and source(options) == self.files.resume
        check_writable(options.model_path)
        self.log = RunLog(options.log_path, options.task_name, job.header.classes, state.logs if own else None)
        record = run_record.run_record(
            job.record(), job.settings.device, job.ranks.world, self.standing.started, self.standing.resumed
        )
        self.log.start(record, run_record.as_markdown(record))
        for path in vars(self.files).values():
            remove_leftovers(path)
        if not own:
            for path in (self.files.last, self.files.best):
                checkpoint.keep_previous(path)
            self.files.resume.unlink(missing_ok=True)
        more = f" and {job.ranks.world - 1} more" if job.ranks.world > 1 else ""
        logging.info(
            f"Stage {job.stage.number} ({job.stage.name}): {len(job.train_data)} training and {len(job.val_data)} "
            f"validation images, {options.num_epochs} epochs on {job.settings.device}{more}, "
            f"training {' and '.join(job.stage.trains)}"
        )

    def stalled(self) -> bool:
        """Whether early stopping ends the run."""
        return 0 < self.job.options.early_stopping <= self.standing.epoch - self.standing.best_epoch

    # an epoch

    def one_epoch(self) -> None:
        """Train the rest of the epoch, validate, save, record.

        The resume file comes last: a run that dies before it does the end of the epoch again, and writes the same.
        """
        job, standing = self.job, self.standing
        title = f"epoch {standing.epoch + 1}/{job.options.num_epochs}"
        trained = self.train(title)
        seen: Pictures = {}
        show = collect(seen, job.header.classes, standing.epoch, len(job.val_data), job.ranks)
        validation = (job.model, job.stage, self.val_loader, job.settings, show, "validate", job.ranks, self.stops)
        found = helper.evaluate(*validation, self.new_tally())
        if not found.complete:
            self.save()
            self.leave()
        for counts in trained.sums():
            job.ranks.sum_([counts])
        score = found.tally.mean_iou()
        best = score > standing.best_score
        standing.epoch += 1
        if best:
            standing.best_score, standing.best_epoch = score, standing.epoch
        parts = job.ranks.gather(seen)
        if self.log is not None:
            checkpoint.save(self.files.last, job.model, job.header)
            if best:
                checkpoint.save(self.files.best, job.model, job.header)
            record_epoch(
                self.log,
                job.header.classes,
                self.learner,
                job.options.num_epochs,
                trained.matrices,
                found,
                peak_memory_mb(job.settings.device),
                {index: kinds for part in parts for index, kinds in part.items()},
            )
            logging.info(f"{title}: mIoU {100 * trained.mean_iou():.2f} training, {100 * score:.2f} validation")
        self.learner.progress = self.new_progress()
        self.save()

    def train(self, title: str) -> Tally:
        """Train what is left of the epoch. Raises RunError where a process that reads images dies."""
        job, learner = self.job, self.learner
        self.parts.set_epoch(self.standing.epoch, self.progress.batches)
        training = (job.model, job.stage, self.loader, learner.optimizer, learner.scheduler, job.settings)
        try:
            return helper.train_one_epoch(*training, self.on_step, title, self.progress, job.ranks, self.asks)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a process that reads images died in {title} after step {self.progress.batches}, when images "
                f"{self.images_of(self.progress.batches)} were next: {' '.join(str(error).split())} "
                "If the machine ran out of memory, lower --num_workers"
            ) from error

    # after a step

    def stops(self) -> bool:
        return self.signals.received is not None

    def asks(self) -> bool:
        """Whether this process wants to save: it was told to stop, or, for the main one to say, it is time again."""
        minutes = self.job.options.save_every
        due = self.job.ranks.main and minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        return due or self.stops()

    def on_step(self, values: dict[str, float]) -> None:
        """Record a step, watch for numbers that are none, save where a process asked for it."""
        if self.log is not None:
            self.log.scalars(self.standing.epoch * self.parts.batches + self.progress.batches - 1, values)
        if all(map(math.isfinite, values.values())):
            self.standing.bad_in_row = 0
        else:
            self.tell_bad_step(values)
        if self.progress.asked:
            self.save()
            if self.job.ranks.max(self.signals.received or 0):
                self.leave()

    def images_of(self, batch: int) -> str:
        """The ids of a batch of this epoch."""
        return ", ".join(self.job.train_data.items[i].id for i in self.parts.batch(batch))

    def tell_bad_step(self, values: dict[str, float]) -> None:
        """Warn of a step that was skipped; RunError where it is one too many."""
        self.standing.bad_in_row += 1
        step = self.progress.batches
        told = ", ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items())
        where = f"epoch {self.standing.epoch + 1}, step {step}, images {self.images_of(step - 1)}: {told}"
        if self.standing.bad_in_row >= self.job.options.max_bad_steps:
            raise RunError(
                f"{self.standing.bad_in_row} steps in a row without a finite loss and gradient, the last in {where}; "
                "lower --lr, or look at these images"
            )
        if self.job.ranks.main:
            logging.warning(f"skipped a step whose loss or gradient is not finite: {where}")

    def save(self) -> None:
        """Write the resume file; all processes take part."""
        ranks = self.job.ranks
        state = self.learner.capture(ranks, self.job.record(), self.log.sizes() if self.log is not None else {})
        if ranks.main:
            training_state.write(self.files.resume, state)
        self.saved_at = time.monotonic()
        ranks.barrier()  # nobody leaves while the file is being written

    def leave(self) -> None:
        """Raise Interrupted; the state is saved."""
        number = self.job.ranks.max(self.signals.received or 0)
        raise Interrupted(
            f"interrupted in epoch {self.standing.epoch + 1} after step {self.progress.batches}; saved "
            f"{self.files.resume}, go on with --resume auto",
            number,
        )

    def tell_end(self) -> None:
        """Say how it went and where everything is."""
        if self.standing.epoch < self.job.options.num_epochs:
            logging.info(f"Stopped after epoch {self.standing.epoch}: no better score since {self.standing.best_epoch}")
        logging.info(
            f"Best validation mIoU {100 * self.standing.best_score:.2f} in epoch {self.standing.best_epoch}: "
            f"{self.files.best}\nLast: {self.files.last}\nLog: {self.log.text}\nLines of JSON: {self.log.lines}\n"
            f"Options and versions: {self.log.folder / 'run.json'}\nTensorBoard: tensorboard --logdir {self.log.folder}"
        )
