"""`--evaluation`: segmenting one split of a data set, and reporting the scores."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.base import Sample, SegmentationDataset
from dataset.loader import SampleLoader
from engine.predictor import Predictor
from evaluation.html_report import Report, write_report
from evaluation.report import evaluation_record, evaluation_table
from evaluation.report_images import ReportImages
from imaging.sources import MemorySource, Source
from models.header import Header
from utils.canvas import ArgmaxSink, FiniteScores, Sink
from utils.classes import Classes
from utils.distributed import ALONE, Ranks
from utils.errors import InputError, required, shortened
from utils.files import check_writable, write_json
from utils.memory import peak_memory_mb
from utils.metrics import StageMetrics
from utils.precision import not_finite
from utils.run_record import now, run_record
from utils.selection import Coverage
from utils.settings import Settings
from utils.stages import Stage
from utils.visualize import save_colors


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, of all images of all processes; each process has the same.

    `seconds_per_image` is without decoding. `complete` is False if the evaluation was stopped before its end;
    `not_finite` are ids of the images whose scores were not finite numbers.
    """

    metrics: StageMetrics
    images: int
    seconds_per_image: float
    coverage: Coverage = field(default_factory=Coverage)
    complete: bool = True
    not_finite: tuple[str, ...] = ()

    def record(self, predictor: "SegmentsImages", classes: Classes, *, covered: bool = False) -> dict[str, Any]:
        """Return the record of `evaluation_record`, if `covered` with the coverage; memory is this process's so far."""
        return evaluation_record(
            predictor.stage.number,
            classes,
            self.metrics.matrices,
            images=self.images,
            seconds_per_image=self.seconds_per_image,
            peak_memory_mb=peak_memory_mb(predictor.settings.device),
            coverage=self.coverage if covered else None,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """All that an evaluation of one split needs.

    Without labels (`labelled`) only predictions and the report's pictures are written. `record` has all options as
    plain values; the others are options of these names.
    """

    predictor: Predictor
    header: Header
    data: SegmentationDataset
    labelled: bool
    num_workers: int
    log_path: Path
    save_predictions: Path | None
    report: Path | None
    record: Mapping[str, Any]


class SegmentsImages(Protocol):
    """What an evaluation needs of a network; see `Predictor`, which has it."""

    @property
    def stage(self) -> Stage: ...

    @property
    def settings(self) -> Settings: ...

    def segment(
        self,
        image: Source,
        sinks: Mapping[str, Sink],
        *,
        global_image: Tensor | None = None,
        shared: Tensor | None = None,
        check: FiniteScores | None = None,
    ) -> Coverage: ...


def evaluate_images(
    predictor: SegmentsImages,
    loader: Iterable[list[Sample]],
    metrics: StageMetrics,
    *,
    on_image: Callable[[Sample, dict[str, Tensor]], None] | None = None,
    title: str = "evaluate",
    ranks: Ranks = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Segment every image of `loader` and count it against its label.

    Args:
        predictor: segments the images.
        loader: batches of samples with whole images; of several processes each gets its part of the images.
        metrics: counts the predictions.
        on_image: gets each sample of this process and its predictions by name, (H, W) uint8 ids on the device. It is
            not called for an image whose scores are not finite numbers.
        title: of the progress bar.
        ranks: the processes that evaluate together.
        should_stop: is called after each image; if it returns True, this process stops.
    """
    settings = predictor.settings
    images, seconds, coverage, stopped = 0, 0.0, Coverage(), False  # of this process
    not_finite: list[str] = []
    bar = tqdm(loader, desc=title, unit="image", dynamic_ncols=True, disable=not ranks.main)
    for sample in (sample for batch in bar for sample in batch):
        start = time.perf_counter()
        source = MemorySource(required(sample.image, "image"))
        found = {name: ArgmaxSink(source.size, settings.device) for name in predictor.stage.predictions}
        check = FiniteScores()
        coverage += predictor.segment(
            source, found, global_image=sample.global_image, shared=sample.shared, check=check
        )
        if sample.label is not None:
            metrics.update(settings.to_device(sample.label), found)
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        seconds += time.perf_counter() - start
        images += 1
        bar.set_postfix(mIoU=f"{100 * metrics.mean_iou():.1f}")
        if not check.ok():
            not_finite.append(sample.id)
        elif on_image is not None:
            on_image(sample, {name: sink.ids for name, sink in found.items()})
        stopped = should_stop()
        if stopped:
            break
    counts, times, coverages, stops, ids = zip(
        *ranks.gather((images, seconds, coverage, stopped, not_finite)), strict=True
    )
    for sums in metrics.sums():
        ranks.sum_([sums])
    return Evaluation(
        metrics,
        images=sum(counts),
        seconds_per_image=sum(times) / max(sum(counts), 1),
        coverage=sum(coverages, Coverage()),
        complete=not any(stops),
        not_finite=tuple(chain(*ids)),
    )


def refuse_data_folder(folder: Path, data: SegmentationDataset) -> None:
    """Raise InputError if predictions, which have the labels' names, would overwrite the data set's own files."""
    pairs = (pair for item in data.items for pair in item.pairs())
    own = {path.parent.resolve() for pair in pairs for path in pair if path is not None}
    if folder.resolve() in own:
        raise InputError(f"--save_predictions {folder} would overwrite the labels there; name another folder")


def run_evaluation(plan: EvaluationPlan, ranks: Ranks) -> None:
    """Evaluate one split: print the scores, write them as JSON; write predictions and a report if they are requested.

    Each process writes the predictions of its images, the main one everything else. Raises InputError if scores are not
    finite numbers, or a file cannot be written.
    """
    predictor, header, data, started = plan.predictor, plan.header, plan.data, now()
    stage, settings, split = predictor.stage, predictor.settings, plan.record["split"]
    images = ReportImages(header.classes, stage.headline, plan.labelled, len(data), ranks) if plan.report else None

    def save(sample: Sample, found: dict[str, Tensor]) -> None:
        if plan.save_predictions:
            ids: np.ndarray = found[stage.headline].cpu().numpy()
            save_colors(plan.save_predictions / f"{sample.id}_mask.png", ids, header.classes.palette)
        if images is not None:
            images.add(sample, found)

    seen = None if header.trained_on is None else header.trained_on.count(data.hashes())
    if seen:
        logging.warning(f"{seen} of {len(data)} images were trained on: their scores say nothing of other images")
    check_writable(plan.log_path)
    if plan.save_predictions:
        refuse_data_folder(plan.save_predictions, data)
    if plan.report and ranks.main:
        check_writable(plan.report)
    own = range(ranks.rank, len(data), ranks.world)
    loader = SampleLoader(data, sampler=own, num_workers=plan.num_workers, pin=settings.device.type == "cuda")
    metrics = StageMetrics(stage, header.classes)
    result = evaluate_images(predictor, loader, metrics, on_image=save, title=f"evaluate {split}", ranks=ranks)
    if result.not_finite:
        raise InputError(
            f"the network's scores of {len(result.not_finite)} of {result.images} images ("
            f"{shortened(result.not_finite)}) are {not_finite(settings.precision)}"
        )
    if images is not None:
        images.gather(ranks)
    if not ranks.main:
        return
    scored = plan.labelled and metrics.has_labels()
    if plan.labelled and not scored:
        logging.warning(f"no pixel of split {split} has a class: there are no scores, and none are written")
    if plan.save_predictions:
        logging.info(f"Predictions: {plan.save_predictions}")
    record = result_record(plan, result, seen)
    if scored:
        target = plan.log_path / f"{plan.record['task_name']}.json"
        print(evaluation_table(record))
        write_json(target, record)
        logging.info(f"The same as JSON: {target}")
    if images is not None and plan.report is not None:
        report = Report(
            title=plan.record["task_name"],
            data=f"{plan.record['dataset']}, split {split}",
            stage=stage,
            classes=header.classes,
            record=record,
            counts=metrics.matrices[stage.headline].counts.cpu().numpy() if scored else None,
            images=images,
            run=run_table(plan, ranks, started),
        )
        logging.info(f"Report: {write_report(plan.report, report)}")


def result_record(plan: EvaluationPlan, result: Evaluation, seen: int | None) -> dict[str, Any]:
    """Return the JSON of an evaluation; `seen` is the number of its images that were trained on, None if unknown."""
    predictor, header, record = plan.predictor, plan.header, plan.record
    geometry = ("size_g", "size_p", "min_overlap", "normalize", "context", "scale")
    return {
        "dataset": record["dataset"],
        "split": record["split"],
        "checkpoint": record[predictor.stage.reads],
        "device": predictor.settings.device.type,
        **{name: getattr(header, name) for name in geometry},
        "images_trained_on": seen,
        "shared_maps": header.share,
        **{name: record[name] for name in ("precision", "tta", "refine_share", "blend", "upsample")},
        **result.record(predictor, header.classes, covered=predictor.selects_patches),
    }


def run_table(plan: EvaluationPlan, ranks: Ranks, started: str) -> Mapping[str, Any]:
    """Return what a report says of the run, in plain values: the checkpoint, the network, options, versions."""
    record, others = plan.record, ("stage", "classes")
    run = run_record(record, plan.predictor.settings.device, ranks.world, started, [])
    network = {name: value for name, value in vars(plan.header).items() if name not in others and value is not None}
    shown = ("started", "device", "processes", "system", "git_commit", "command", "options", "versions")
    return {
        "checkpoint": str(Path(record["model_path"]) / record[plan.predictor.stage.reads]),
        "network": ", ".join(f"{name} {value}" for name, value in network.items()),
        "precision": record["precision"],
        "test-time augmentation": record["tta"],
        "blend": record["blend"],
        "upsample": record["upsample"],
        **{name: run[name] for name in shown},
    }
