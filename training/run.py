"""A training run: its epochs, and when it saves, stops and records."""

import argparse
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import helper
from dataset.base import SegmentationDataset
from dataset.layout import TRAIN
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from engine.predictor import Predictor
from evaluation.run import Evaluation, evaluate_images
from helper import EpochState
from models import checkpoint
from models.glnet import GLNet
from models.header import Header
from training import records, state
from training.average import WeightAverage
from training.log import RunLog
from training.model_card import keep_previous_card, model_card, read_epochs, write_card
from training.optimizer import build_optimizer, build_schedule
from training.recipe import reach_line
from training.records import Pictures, picture_collector, record_epoch
from training.signals import StopSignals
from training.state import RunFiles, RunState, Snapshot, TrainerState, resume_source
from utils.distributed import Ranks
from utils.errors import InputError, Interrupted, RunError, shortened
from utils.files import check_writable, remove_leftovers
from utils.memory import peak_memory_mb
from utils.metrics import StageMetrics
from utils.precision import not_finite
from utils.run_record import now, options_record, run_record
from utils.settings import Settings
from utils.stages import Stage

LEAST_SCALE = 1.0
"""While the scale of float16 gradients is larger, an overflow lowers it and is no bad step."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The network, the images and the processes of a run.

    Attributes:
        options: resolved.
        stage: that is trained.
        model: the network as it starts, on the settings' device.
        header: of the network.
        settings: of the training.
        train_data: training images, augmented.
        val_data: validation images.
        validation: their split.
        ranks: the processes that train together.
    """

    options: argparse.Namespace
    stage: Stage
    model: GLNet
    header: Header
    settings: Settings
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    validation: str
    ranks: Ranks

    def record(self) -> dict[str, Any]:
        """Return the options and all else that identifies the experiment, as plain values."""
        statistics = self.header.statistics
        return options_record(
            self.options,
            processes=self.ranks.world,
            training_images=self.train_data.fingerprint(),
            **({} if statistics is None else {"statistics": json.dumps(asdict(statistics))}),
        )


class TrainingRun:
    """A run of `plan`, new or continued from the resume file that its options name.

    Attributes:
        plan: see `TrainingPlan`.
        files: of the run.
        signals: received so far.
        log: of the main process, while the run goes on; else None.
        state: everything that changes.
        shared: how many validation images are training images, too, of this stage or an earlier one.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        """Open the data and start the optimizer; nothing is written."""
        options, ranks = plan.options, plan.ranks
        self.plan = plan
        self.files = RunFiles.of(options)
        self.signals = StopSignals()
        self.log: RunLog | None = None  # of the main process, while the run goes on
        self.parts = BatchPart(
            EpochSampler(len(plan.train_data), options.seed), options.batch_size, ranks.rank, ranks.world
        )
        pin = plan.settings.device.type == "cuda"
        self.loader = SampleLoader(
            plan.train_data, sampler=self.parts, num_workers=options.num_workers, persistent=True, pin=pin
        )
        own = range(ranks.rank, len(plan.val_data), ranks.world)
        self.val_loader = SampleLoader(
            plan.val_data, sampler=own, num_workers=options.num_workers, persistent=True, pin=pin
        )
        optimizer = build_optimizer(options, plan.model)
        self.state = TrainerState(
            model=plan.model,
            optimizer=optimizer,
            scheduler=build_schedule(options, optimizer, self.parts.batches * options.num_epochs),
            scaler=plan.settings.scaler,
            run=RunState(now()),
            epoch=self._new_epoch(),
            average=WeightAverage(plan.model, options.ema, optimizer) if options.ema else None,
        )
        self.saved_at = time.monotonic()
        self.shared = 0 if plan.header.trained_on is None else plan.header.trained_on.count(plan.val_data.hashes())

    def _new_metrics(self) -> StageMetrics:
        return StageMetrics(self.plan.stage, self.plan.header.classes)

    def _new_epoch(self) -> EpochState:
        return EpochState(self._new_metrics())

    def run(self) -> None:
        """Train the epochs that are left, validate after those that are due, keep the last and the best checkpoint."""
        options, ranks = self.plan.options, self.plan.ranks
        snapshot = self._resume()
        self._check_processes()
        with self.signals:
            try:
                if ranks.main:
                    self._open_logs(snapshot)
                while self.state.run.epoch < options.num_epochs and not self._stalled():
                    self._run_epoch()
            finally:
                self.loader.close()
                self.val_loader.close()
                if self.log is not None:
                    self.log.close()
        if ranks.main:
            self._write_card()
            self.files.resume.unlink(missing_ok=True)
            self._log_end()

    # starting

    def _resume(self) -> Snapshot | None:
        """Continue from the resume file that the options name, if any, and return its content."""
        options = self.plan.options
        path = resume_source(options)
        if path is None:
            return None
        snapshot = state.read(path)
        changed = state.changed_options(snapshot.options, self.plan.record(), options.resume_anyway)
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
        options, run = self.plan.options, self.state.run
        lines = []
        if changed.intersection(state.EPOCH_OPTIONS) and self.state.epoch.batches:
            self.state.epoch = self._new_epoch()
            lines.append(f"epoch {run.epoch + 1} starts over: its steps hold other images now")
        done = run.epoch + (self.state.epoch.batches > 0)
        if done > options.num_epochs:
            raise InputError(
                f"--num_epochs {options.num_epochs} is less than the {done} epochs that the unfinished run has begun: "
                "raise it, or give --overwrite to start over"
            )
        if not state.RATE_OPTIONS.isdisjoint(changed):
            self.state.reschedule(run.epoch * self.parts.batches + self.state.epoch.batches)
        return lines

    def _check_processes(self) -> None:
        """Raise InputError unless all processes have the same options and state, and an image each in every batch."""
        options, ranks = self.plan.options, self.plan.ranks
        left = len(self.plan.train_data) % options.batch_size
        if options.batch_size < ranks.world:
            raise InputError(f"--batch_size {options.batch_size} is for all {ranks.world} processes together: raise it")
        if options.sync_bn and 0 < left < ranks.world:
            raise InputError(
                f"--sync_bn needs an image for each of the {ranks.world} processes in every batch, but --batch_size "
                f"{options.batch_size} leaves {left} for an epoch's last one; choose another"
            )
        # the device may differ between processes
        own = (self.state.run.epoch, self.state.epoch.batches, {**self.plan.record(), "device": None})
        if any(other != own for other in ranks.gather(own)):
            raise InputError(
                "the processes do not agree on what they are to do; give all the same options, and folders "
                "that hold the same files on every machine"
            )

    def _open_logs(self, snapshot: Snapshot | None) -> None:
        """Open the logs and record options and versions; keep or remove the files of an earlier run of the name."""
        plan, options = self.plan, self.plan.options
        own = snapshot is not None and resume_source(options) == self.files.resume
        check_writable(options.model_path)
        self.log = RunLog(
            options.log_path, options.task_name, plan.header.classes, snapshot.logs if snapshot and own else None
        )
        record = self._run_record()
        self.log.start(record, records.as_markdown(record))
        for path in vars(self.files).values():
            remove_leftovers(path)
        if not own:
            for path in (self.files.last, self.files.best, self.files.average):
                checkpoint.keep_previous(path)
            self.files.average.unlink(missing_ok=True)  # the new run may have none
            keep_previous_card(self.files.card)
            self.files.resume.unlink(missing_ok=True)
        more = f" and {plan.ranks.world - 1} more" if plan.ranks.world > 1 else ""
        logging.info(
            f"Stage {plan.stage.number} ({plan.stage.name}): {plan.train_data.describe('training images')} and "
            f"{len(plan.val_data)} validation images, {options.num_epochs} epochs on {plan.settings.device}{more}, "
            f"training {' and '.join(plan.stage.trains)}"
        )
        line, warns = reach_line(options, plan.model, plan.stage, self.parts.batches * options.num_epochs)
        logging.log(logging.WARNING if warns else logging.INFO, line)
        if self.shared:
            logging.warning(
                f"{self.shared} of {len(plan.val_data)} validation images were trained on: the scores, and the "
                "choice of the best epoch, say nothing of other images"
            )

    def _run_record(self) -> dict[str, Any]:
        """Return everything that it takes to repeat the run."""
        plan, run = self.plan, self.state.run
        return run_record(plan.record(), plan.settings.device, plan.ranks.world, run.started, run.resumed)

    def _stalled(self) -> bool:
        """Return whether early stopping ends the run, which it does after a validation only."""
        run = self.state.run
        return run.unvalidated == 0 and 0 < self.plan.options.early_stopping <= run.epoch - run.best_epoch

    def _validation_due(self) -> bool:
        """Return whether the epoch that has been trained is to be validated."""
        options, done = self.plan.options, self.state.run.epoch + 1
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
        score = None if validated is None else validated.metrics.mean_iou()
        best = score is not None and score > run.best_score
        if score is not None and best:
            run.best_score, run.best_epoch = score, run.epoch
        parts = plan.ranks.gather(collected)
        if self.log is not None:
            checkpoint.save(self.files.last, plan.model, plan.header)
            with self.state.averaged():
                if self.state.average is not None:
                    checkpoint.save(self.files.average, plan.model, plan.header)
                if best:
                    checkpoint.save(self.files.best, plan.model, plan.header)
            record_epoch(
                self.log,
                plan.header.classes,
                self.state,
                trained.matrices,
                validated,
                {index: kinds for part in parts for index, kinds in part.items()},
                num_epochs=plan.options.num_epochs,
                peak_memory_mb=peak_memory_mb(plan.settings.device),
            )
            validation = "no" if score is None else f"{100 * score:.2f}"
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
        plan = self.plan
        predictor = Predictor.prepare
        with self.state.averaged():
            found = evaluate_images(
                predictor(plan.model, plan.stage, plan.settings, plan.header.size_g, context=plan.header.context()),
                self.val_loader,
                self._new_metrics(),
                on_image=picture_collector(
                    collected, plan.header.classes, self.state.run.epoch, len(plan.val_data), plan.ranks
                ),
                title="validate",
                ranks=plan.ranks,
                should_stop=self._should_stop,
            )
        if found.not_finite and plan.ranks.main:
            reason = not_finite(plan.settings.precision)
            logging.warning(f"the network's scores of {shortened(found.not_finite)} are {reason}")
        return found

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
            if self.plan.ranks.max(self.signals.received or 0):
                self._leave()

    def _searches_scale(self, values: dict[str, float]) -> bool:
        """Return whether a step was skipped only because the gradients' scale was too large, and can still fall."""
        scaler = self.state.scaler
        gradient_alone = all(math.isfinite(value) for name, value in values.items() if name != "gradient_norm")
        return scaler.is_enabled() and gradient_alone and scaler.get_scale() >= LEAST_SCALE

    def _image_ids(self, batch: int) -> str:
        """Return the ids of the images in a batch of this epoch."""
        return ", ".join(self.plan.train_data.id(i) for i in self.parts.batch(batch))

    def _report_bad_step(self, values: dict[str, float]) -> None:
        """Warn of a skipped step. Raises RunError after too many in a row."""
        run, step = self.state.run, self.state.epoch.batches
        run.bad_in_row += 1
        terms = ", ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items())
        where = f"epoch {run.epoch + 1}, step {step}, images {self._image_ids(step - 1)}: {terms}"
        if run.bad_in_row >= self.plan.options.max_bad_steps:
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
        snapshot = self.state.capture(ranks, self.plan.record(), logs)
        if ranks.main:
            state.write(self.files.resume, snapshot)
        self.saved_at = time.monotonic()
        ranks.barrier()  # no process ends while the file is being written

    def _leave(self) -> None:
        """Raise Interrupted, after the state is saved."""
        number = self.plan.ranks.max(self.signals.received or 0)
        raise Interrupted(
            f"interrupted in epoch {self.state.run.epoch + 1} after step {self.state.epoch.batches}; saved "
            f"{self.files.resume}, go on with --resume auto",
            number,
        )

    def _write_card(self) -> None:
        """Write the model card beside the checkpoints; its scores come from the log."""
        plan, run = self.plan, self.state.run
        assert self.log is not None
        text = model_card(
            files=self.files,
            stage=plan.stage,
            header=plan.header,
            run=run,
            record=self._run_record(),
            data={
                "training": (TRAIN, len(plan.train_data)),
                "validation": (plan.validation, len(plan.val_data)),
            },
            epochs=read_epochs(self.log.lines, run.started),
        )
        write_card(self.files.card, text)

    def _log_end(self) -> None:
        """Log how the run went and where its files are."""
        run, log = self.state.run, self.log
        if run.epoch < self.plan.options.num_epochs:
            logging.info(f"Stopped after epoch {run.epoch}: no better score since {run.best_epoch}")
        if log is not None:
            logging.info(
                f"Best validation mIoU {100 * run.best_score:.2f} in epoch {run.best_epoch}"
                f"{' (on training images)' if self.shared else ''}: {self.files.best}\nLast: {self.files.last}\n"
                f"Model card: {self.files.card}\nLog: {log.text}\n"
                f"Lines of JSON: {log.lines}\n"
                f"Options and versions: {log.folder / 'run.json'}\nTensorBoard: tensorboard --logdir {log.folder}"
            )
