"""A training run: its epochs, and when it saves, stops and records."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import helper
from dataset.base import Sample, SegmentationDataset
from dataset.layout import TRAIN
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from engine.predictor import Predictor
from evaluation.report import scores
from evaluation.run import Evaluation, evaluate_images
from helper import EpochState
from models import checkpoint
from models.glnet import GLNet
from models.header import Header
from training import state
from training.average import WeightAverage
from training.log import LONGEST_PICTURE, RunLog, run_table
from training.optimizer import build_optimizer, build_schedule
from training.recipe import reach_line
from training.signals import StopSignals
from training.state import RunFiles, RunState, Snapshot, TrainerState
from utils.distributed import Ranks
from utils.errors import InputError, Interrupted, RunError, required, shortened
from utils.files import check_writable, remove_leftovers
from utils.memory import peak_memory_mb
from utils.metrics import StageMetrics
from utils.precision import not_finite
from utils.run_record import now, run_record
from utils.settings import TrainingSettings
from utils.stages import Stage
from utils.visualize import pictures

MOST_BAD_STEPS = 10
"""After so many steps in a row whose loss or gradient is not finite a run stops."""

FIXED = 2
"""The number of validation images, from the first on, that TensorBoard shows after every epoch."""

Pictures = dict[int, dict[str, np.ndarray]]
"""RGB pictures (H, W, 3) uint8 by name, of validation images by index."""

LEAST_SCALE = 1.0
"""While the scale of float16 gradients is larger, an overflow lowers it and is no bad step."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """All that a run needs: the network as it starts, on the settings' device, images, processes, files, and options.

    `validation` is the split of `val_data`; `children` are those of the network that the run's files hold, a resume
    file may name more; `resume` is the resume file that the run continues from, None if it starts from the beginning;
    `options` are filled in; `record` has them and all else that identifies the experiment, as plain values.
    """

    stage: Stage
    model: GLNet
    header: Header
    settings: TrainingSettings
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    validation: str
    children: tuple[str, ...]
    ranks: Ranks
    files: RunFiles
    resume: Path | None
    options: Namespace
    record: dict[str, Any]


class TrainingRun:
    """A run of `plan`, new or continued.

    `log` is None but in the main process while the run goes on; `state` is everything that changes; `shared` says how
    many validation images are training images, too, of this stage or an earlier one.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        """Open the data and start the optimizer; nothing is written."""
        ranks, options = plan.ranks, plan.options
        self.plan = plan
        self.signals = StopSignals()
        self.log: RunLog | None = None
        sampler = EpochSampler(len(plan.train_data), options.seed)
        self.parts = BatchPart(sampler, options.batch_size, ranks.rank, ranks.world)
        own = range(ranks.rank, len(plan.val_data), ranks.world)
        self.loader, self.val_loader = (
            SampleLoader(
                data,
                sampler=sampler,
                num_workers=options.num_workers,
                persistent=True,
                pin=plan.settings.device.type == "cuda",
            )
            for data, sampler in ((plan.train_data, self.parts), (plan.val_data, own))
        )
        optimizer = build_optimizer(plan.model, options.lr)
        self.state = TrainerState(
            model=plan.model,
            optimizer=optimizer,
            scheduler=build_schedule(optimizer, self.parts.batches * options.num_epochs),
            scaler=plan.settings.scaler,
            run=RunState(now()),
            epoch=self._new_epoch(),
            children=plan.children,
            average=WeightAverage(plan.model, options.ema, optimizer) if options.ema else None,
        )
        self.saved_at = time.monotonic()
        self.shared = 0 if plan.header.trained_on is None else plan.header.trained_on.count(plan.val_data.hashes())

    def _new_epoch(self) -> EpochState:
        return EpochState(StageMetrics(self.plan.stage, self.plan.header.classes))

    def run(self) -> None:
        """Train the epochs that are left, validate after those that are due, keep the last and the best checkpoint."""
        plan, ranks = self.plan, self.plan.ranks
        snapshot = None if plan.resume is None else self._resume(plan.resume)
        self._check_processes()
        with self.signals:
            try:
                if ranks.main:
                    self._open_logs(snapshot)
                while self.state.run.epoch < plan.options.num_epochs and not self._stalled():
                    self._run_epoch()
            finally:
                self.loader.close()
                self.val_loader.close()
                if self.log is not None:
                    self.log.close()
        if self.log is not None:
            self._end(self.log)

    # starting

    def _resume(self, path: Path) -> Snapshot:
        """Continue from the resume file at `path`, and return its content."""
        snapshot = state.read(path)
        changed = state.changed_options(snapshot["options"], self.plan.record, self.plan.options.resume_anyway)
        anew = not state.RATE_OPTIONS.isdisjoint(changed)
        self.state.restore(snapshot, path, self.plan.ranks, anew=anew)
        self.state.run.resumed.append(now())
        lines = [f"changed since: {line}" for line in changed.values()]
        lines += self._adapt_to_changes(set(changed))
        if self.plan.ranks.main:
            for line in lines:
                logging.warning(line)
            logging.info(f"Going on in epoch {self.state.run.epoch + 1} after step {self.state.epoch.batches}: {path}")
        return snapshot

    def _adapt_to_changes(self, changed: set[str]) -> list[str]:
        """Fit epoch, schedule and rate to options that `--resume_anyway` changed; return lines that report it.

        Raises InputError if the run is past the end that the options now give it.
        """
        run, num_epochs = self.state.run, self.plan.options.num_epochs
        lines = []
        if changed.intersection(state.EPOCH_OPTIONS) and self.state.epoch.batches:
            self.state.epoch = self._new_epoch()
            lines.append(f"epoch {run.epoch + 1} starts over: its steps hold other images now")
        done = run.epoch + (self.state.epoch.batches > 0)
        if done > num_epochs:
            raise InputError(
                f"--num_epochs {num_epochs} is less than the {done} epochs that the unfinished run has begun: "
                "raise it, or give --overwrite to start over"
            )
        if not state.RATE_OPTIONS.isdisjoint(changed):
            self.state.reschedule(run.epoch * self.parts.batches + self.state.epoch.batches)
        return lines

    def _check_processes(self) -> None:
        """Raise InputError unless all processes have the same options and state, and an image each in every batch."""
        plan, ranks, batch_size = self.plan, self.plan.ranks, self.plan.options.batch_size
        left = len(plan.train_data) % batch_size
        if batch_size < ranks.world:
            raise InputError(f"--batch_size {batch_size} is for all {ranks.world} processes together: raise it")
        if plan.options.sync_bn and 0 < left < ranks.world:
            raise InputError(
                f"--sync_bn needs an image for each of the {ranks.world} processes in every batch, but --batch_size "
                f"{batch_size} leaves {left} for an epoch's last one; choose another"
            )
        # the device may differ between processes
        own = (self.state.run.epoch, self.state.epoch.batches, {**plan.record, "device": None})
        if any(other != own for other in ranks.gather(own)):
            raise InputError(
                "the processes do not agree on what they are to do; give all the same options, and folders "
                "that hold the same files on every machine"
            )

    def _open_logs(self, snapshot: Snapshot | None) -> None:
        """Open the logs and record options and versions; keep or remove the files of an earlier run of the name."""
        plan, files, options = self.plan, self.plan.files, self.plan.options
        own = plan.resume == files.resume
        check_writable(files.last.parent)
        sizes = snapshot["logs"] if snapshot is not None and own else None
        self.log = RunLog(options.log_path, options.task_name, plan.header.classes, sizes)
        run = self.state.run
        record = run_record(plan.record, plan.settings.device, plan.ranks.world, run.started, run.resumed)
        record["images"] = {TRAIN: len(plan.train_data), plan.validation: len(plan.val_data)}
        self.log.start(record, run_table(record))
        for path in vars(files).values():
            remove_leftovers(path)
        if not own:
            for path in (files.last, files.best, files.average):
                checkpoint.keep_previous(path)
            files.average.unlink(missing_ok=True)  # the new run may have none
            files.resume.unlink(missing_ok=True)
        more = f" and {plan.ranks.world - 1} more" if plan.ranks.world > 1 else ""
        logging.info(
            f"Stage {plan.stage.number} ({plan.stage.name}): {plan.train_data.describe('training images')} and "
            f"{len(plan.val_data)} validation images, {options.num_epochs} epochs on {plan.settings.device}{more}, "
            f"training {' and '.join(plan.stage.trains)}"
        )
        line, warns = reach_line(options.lr, plan.model, plan.stage, self.parts.batches * options.num_epochs)
        logging.log(logging.WARNING if warns else logging.INFO, line)
        if self.shared:
            logging.warning(
                f"{self.shared} of {len(plan.val_data)} validation images were trained on: the scores, and the "
                "choice of the best epoch, say nothing of other images"
            )

    def _stalled(self) -> bool:
        """Return whether early stopping ends the run, which it does after a validation only."""
        run = self.state.run
        return run.unvalidated == 0 and 0 < self.plan.options.early_stopping <= run.epoch - run.best_epoch

    def _validation_due(self) -> bool:
        """Return whether the epoch that has been trained is to be validated."""
        done, options = self.state.run.epoch + 1, self.plan.options
        return done % options.val_every == 0 or done == options.num_epochs

    # an epoch

    def _run_epoch(self) -> None:
        """Train the rest of the epoch, validate if that is due, save, record.

        The resume file is written last: a run that dies before repeats the end of the epoch, with the same results.
        """
        plan, run = self.plan, self.state.run
        title = f"epoch {run.epoch + 1}/{plan.options.num_epochs}"
        trained = self._train(title)
        collected: Pictures = {}
        validated = self._validate(collected) if self._validation_due() else None
        if validated is not None and not validated.complete:
            self._save()
            self._leave()
        for counts in trained.sums():
            plan.ranks.sum_([counts])
        self._check_labels(trained, validated)
        run.epoch += 1
        run.unvalidated = run.unvalidated + 1 if validated is None else 0
        score = math.nan if validated is None else validated.metrics.mean_iou()
        if best := score > run.best_score:
            run.best_score, run.best_epoch = score, run.epoch
        parts = plan.ranks.gather(collected)
        if self.log is not None:
            checkpoint.save(plan.files.last, plan.model, plan.header, self.state.children)
            with self.state.averaged():
                for wanted, path in ((self.state.average, plan.files.average), (best, plan.files.best)):
                    if wanted:
                        checkpoint.save(path, plan.model, plan.header, self.state.children)
            self._record_epoch(self.log, trained, validated, [shown for part in parts for shown in part.items()])
            validation = "no" if validated is None else f"{100 * score:.2f}"
            logging.info(f"{title}: mIoU {100 * trained.mean_iou():.2f} training, {validation} validation")
        self.state.epoch = self._new_epoch()
        self._save()

    def _train(self, title: str) -> StageMetrics:
        """Train the rest of the epoch. Raises RunError if a process that reads images dies."""
        plan, epoch = self.plan, self.state.epoch
        self.parts.set_epoch(self.state.run.epoch, epoch.batches)
        try:
            return helper.train_one_epoch(
                plan.model,
                plan.stage,
                self.loader,
                self.state.optimizer,
                self.state.scheduler,
                plan.settings,
                on_step=self._on_step,
                title=title,
                epoch=epoch,
                ranks=plan.ranks,
                save_due=self._save_due,
            )
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a process that reads images died in {title} after step {epoch.batches}, when images "
                f"{self._image_ids(epoch.batches)} were next: {' '.join(str(error).split())} "
                "If the machine ran out of memory, lower --num_workers"
            ) from error

    def _check_labels(self, trained: StageMetrics, validated: Evaluation | None) -> None:
        """Raise InputError if the epoch read no pixel with a class; warn if the validation did."""
        epoch = self.state.epoch
        if epoch.batches > epoch.skipped and not trained.has_labels():
            raise InputError(
                f"no pixel of the {epoch.images} images of epoch {self.state.run.epoch + 1} has a class, so there is "
                "nothing to learn: all labels are left out (255) or without data; --check_data counts the classes"
            )
        if self.plan.ranks.main and validated is not None and not validated.metrics.has_labels():
            logging.warning("no pixel of the validation images has a class: all epochs score 0, the first is the best")

    def _validate(self, collected: Pictures) -> Evaluation:
        """Evaluate the validation images with the averaged weights, if any; collect pictures of some of them."""
        plan, header = self.plan, self.plan.header
        with self.state.averaged():
            found = evaluate_images(
                Predictor.prepare(plan.model, plan.stage, plan.settings, header.size_g, context=header.context_scale()),
                self.val_loader,
                StageMetrics(plan.stage, header.classes),
                on_image=self._picture_collector(collected),
                title="validate",
                ranks=plan.ranks,
                should_stop=self._should_stop,
            )
        if found.not_finite and plan.ranks.main:
            reason = not_finite(plan.settings.precision)
            logging.warning(f"the network's scores of {shortened(found.not_finite)} are {reason}")
        return found

    def _picture_collector(self, collected: Pictures) -> Callable[[Sample, dict[str, Tensor]], None]:
        """Return a callback for a validation that adds pictures of some of this process's images to `collected`.

        The images are the fixed ones and, as released, another one in each epoch. The validation's number i is that of
        process i modulo the number of processes.
        """
        plan, images = self.plan, len(self.plan.val_data)
        wanted = {*range(FIXED), self.state.run.epoch % images}
        indices = iter(range(plan.ranks.rank, images, plan.ranks.world))

        def collect(sample: Sample, found: dict[str, Tensor]) -> None:
            if (index := next(indices)) in wanted:
                image, palette = required(sample.image, "image"), plan.header.classes.palette
                collected[index] = pictures(image, sample.label, found, palette, LONGEST_PICTURE)

        return collect

    def _record_epoch(
        self,
        log: RunLog,
        trained: StageMetrics,
        validated: Evaluation | None,
        collected: list[tuple[int, dict[str, np.ndarray]]],
    ) -> None:
        """Record the last epoch, which `state` counts already: text, a line of JSON, scalars and pictures."""
        run, progress, classes = self.state.run, self.state.epoch, self.plan.header.classes
        epoch = run.epoch - 1  # in TensorBoard counted from 0
        scored = {} if validated is None else validated.metrics.matrices
        numbers = {
            "seconds": progress.seconds,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            **({} if validated is None else {"validation_seconds_per_image": validated.seconds_per_image}),
            "peak_memory_mb": peak_memory_mb(self.plan.settings.device),
            "skipped_steps": progress.skipped,
        }
        log.epoch(epoch, self.plan.options.num_epochs, trained.matrices, scored)
        log.scalars(epoch, {f"epoch/{name}": value for name, value in numbers.items()})
        for index, kinds in sorted(collected, key=lambda shown: shown[0]):
            if index < FIXED:
                log.images(epoch, {f"fixed_{index + 1}/{name}": picture for name, picture in kinds.items()})
            if validated is not None and index == epoch % validated.images:
                log.images(epoch, kinds)
        log.line(
            {
                "started": run.started,
                "epoch": run.epoch,
                "time": now(),
                "learning_rate": self.state.scheduler.get_last_lr()[-1],
                "loss": progress.loss,
                **numbers,
                "best": run.best_epoch == run.epoch,
                "classes": list(classes.names),
                "train": scores(classes, trained.matrices),
                "validation": scores(classes, scored) if scored else None,
            }
        )

    # after a step

    def _should_stop(self) -> bool:
        return self.signals.received is not None

    def _save_due(self) -> bool:
        """Return whether a signal arrived, or, in the main process, it is time to save again."""
        minutes = self.plan.options.save_every
        due = self.plan.ranks.main and minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        return due or self._should_stop()

    def _on_step(self, values: dict[str, float]) -> None:
        """Log the step, count it as bad if a value is NaN or infinite, and save if any process requested it."""
        if self.log is not None:
            self.log.scalars(self.state.run.epoch * self.parts.batches + self.state.epoch.batches - 1, values)
        if all(map(math.isfinite, values.values())):
            self.state.run.bad_in_row = 0
        elif self._searches_scale(values):
            if self.plan.ranks.main:
                logging.info(f"the scale of float16 gradients is lowered to {self.state.scaler.get_scale():g}")
        else:
            self._report_bad_step(values)
        if self.state.epoch.save_requested:
            self._save()
            self._leave()

    def _searches_scale(self, values: dict[str, float]) -> bool:
        """Return whether a step was skipped only because the gradients' scale was too large, and can still fall."""
        scaler = self.state.scaler
        gradient_alone = all(math.isfinite(value) for name, value in values.items() if name != "gradient_norm")
        return scaler.is_enabled() and gradient_alone and scaler.get_scale() >= LEAST_SCALE

    def _image_ids(self, batch: int) -> str:
        return ", ".join(self.plan.train_data.id(i) for i in self.parts.batch(batch))

    def _report_bad_step(self, values: dict[str, float]) -> None:
        """Warn of a skipped step. Raises RunError after too many in a row."""
        run, step = self.state.run, self.state.epoch.batches
        run.bad_in_row += 1
        terms = ", ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items())
        where = f"epoch {run.epoch + 1}, step {step}, images {self._image_ids(step - 1)}: {terms}"
        if run.bad_in_row >= MOST_BAD_STEPS:
            raise RunError(
                f"{run.bad_in_row} steps in a row without a finite loss and gradient, the last in {where}; "
                "lower --lr, or look at these images"
            )
        if self.plan.ranks.main:
            logging.warning(f"skipped a step whose loss or gradient is not finite: {where}")

    def _save(self) -> None:
        """Write the resume file; all processes take part."""
        ranks = self.plan.ranks
        logs = self.log.sizes() if self.log is not None else {}
        snapshot = self.state.capture(ranks, self.plan.record, logs)
        if ranks.main:
            state.write(self.plan.files.resume, snapshot)
        self.saved_at = time.monotonic()
        ranks.barrier()  # no process ends while the file is being written

    def _leave(self) -> None:
        """Raise Interrupted, after the state is saved, if any process received a signal."""
        if number := self.plan.ranks.max(self.signals.received or 0):
            raise Interrupted(
                f"interrupted in epoch {self.state.run.epoch + 1} after step {self.state.epoch.batches}; saved "
                f"{self.plan.files.resume}, go on with --resume auto",
                number,
            )

    def _end(self, log: RunLog) -> None:
        """Remove the resume file; tell how the run went and where its files are."""
        plan, run, files = self.plan, self.state.run, self.plan.files
        files.resume.unlink(missing_ok=True)
        if run.epoch < plan.options.num_epochs:
            logging.info(f"Stopped after epoch {run.epoch}: no better score since {run.best_epoch}")
        logging.info(
            f"Best validation mIoU {100 * run.best_score:.2f} in epoch {run.best_epoch}"
            f"{' (on training images)' if self.shared else ''}: {files.best}\nLast: {files.last}\n"
            f"Log: {log.text}\nLines of JSON: {log.lines}\n"
            f"Options and versions: {log.folder / 'run.json'}\nTensorBoard: tensorboard --logdir {log.folder}"
        )
