"""The loop of training: an epoch of steps.

Nothing here parses options or touches files; saving and showing are callbacks.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from dataset.base import Sample
from engine import global2local, global_only, local2global
from engine.terms import Terms, add_terms
from models.glnet import GLNet
from models.recompute import recomputed_activations
from utils.distributed import ALONE, Ranks, reduce_step, trained_statistics
from utils.errors import required
from utils.metrics import StageMetrics
from utils.precision import autocast
from utils.settings import TrainingSettings
from utils.stages import Stage
from utils.tiling import Size, map_size

TRAINING_STEPS = {1: global_only.training_step, 2: global2local.training_step, 3: local2global.training_step}
"""By stage, the function that adds the gradients of a batch and returns the terms of its loss."""

SHOWN_EVERY = 10
"""Steps between two updates of the mIoU in the progress bar."""


@dataclass
class EpochState:
    """The progress of an epoch, of which all but the training metric of this process is the same in all processes.

    `batches` counts skipped steps, too, whose loss or gradient was not finite; `loss` is the mean over the others.
    `seconds` is the time of the steps, the wait for images included. `save_requested` says whether any process
    requested a save in the last step.
    """

    metrics: StageMetrics
    batches: int = 0
    skipped: int = 0
    images: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    save_requested: bool = False

    def count(self, found: "_StepResult") -> None:
        """Count a step and its loss, or count it as skipped."""
        self.batches += 1
        if found.finite:
            self.loss += (found.values["loss/total"] - self.loss) / (self.batches - self.skipped)
        else:
            self.skipped += 1


class _StepResult(NamedTuple):
    """The result of a step, the same in all processes but for `mean_iou`."""

    values: dict[str, float]  # the loss terms, their sum and the gradient's norm, by their tags in the logs
    active: bool  # whether any process had anything to learn from
    mean_iou: float | None  # the training metric, in the main process in every `SHOWN_EVERY`-th step

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite numbers."""
        return all(map(math.isfinite, self.values.values()))


def _groups(
    stage: Stage, batch: list[Sample], settings: TrainingSettings, ranks: Ranks
) -> list[tuple[list[Sample], TrainingSettings]]:
    """Return this process's batch in groups whose shrunk images have one size, each with the settings of its share.

    With `--context scale` sizes may differ. The share of a group is the weight of its label pixels over that of all
    processes, so that the gradients of all groups add up to those of the mean over all pixels. Stage 2 reads shrunk
    images one by one, and its sub-batches may hold patches of all of them: its batch is one group.
    """
    groups: dict[Size, list[Sample]] = {}
    for sample in batch:
        groups.setdefault(map_size(sample.global_image), []).append(sample)
    if stage.number == 2 or (ranks.world == 1 and len(groups) == 1):
        return [(batch, settings)] if batch else []
    weights = [
        sum(settings.loss.weight(required(sample.global_label, "label")) for sample in group)
        for group in groups.values()
    ]
    total = torch.tensor([sum(weights)], dtype=torch.float64)
    ranks.sum_([total])
    shares = [weight / (float(total) or 1) for weight in weights]
    return [(group, replace(settings, share=share)) for group, share in zip(groups.values(), shares, strict=True)]


def _joint_step(
    model: GLNet,
    stage: Stage,
    batch: list[Sample],
    settings: TrainingSettings,
    optimizer: torch.optim.Optimizer,
    epoch: EpochState,
    *,
    ranks: Ranks,
    save: bool,
) -> _StepResult:
    """Compute the gradients of one step of all processes, and count its images in `epoch`.

    All values that the host needs are copied from the device in one transfer. `save` says whether this process requests
    a save. The batch is this process's part, and may be empty.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    names = (*map(settings.loss.term, stage.supervised), *stage.other_terms)
    groups = _groups(stage, batch, settings, ranks)
    recomputed = recomputed_activations(model, settings.checkpoint_activations)
    with autocast(settings.device, settings.precision), recomputed:
        terms: Terms = {}
        for group, own in groups:
            add_terms(terms, TRAINING_STEPS[stage.number](model, group, own, epoch.metrics))
    counts = torch.tensor([len(batch), save, bool(terms)], dtype=torch.float32)
    losses = [terms.get(name, torch.zeros((), device=settings.device)).float() for name in names]
    numbers = torch.cat([torch.stack(losses), counts.to(settings.device)])
    reduce_step(ranks, learned, trained_statistics(model), numbers, active=bool(terms))
    settings.scaler.unscale_(optimizer)
    gradients = [p.grad for p in learned if p.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
    shown = [epoch.metrics.mean_iou_on_device().to(norm)] if ranks.main and epoch.batches % SHOWN_EVERY == 0 else []
    values = torch.cat([numbers, torch.stack([norm, *shown])]).tolist()
    losses_now, (images, saves, active, norm_now, *mean_iou) = values[: len(names)], values[len(names) :]
    epoch.images += int(images)
    epoch.save_requested = saves > 0
    tagged = {f"loss/{name}": value for name, value in zip(names, losses_now, strict=True)}
    tagged |= {"loss/total": sum(losses_now), "gradient_norm": norm_now}
    return _StepResult(tagged, active > 0, mean_iou[0] if mean_iou else None)


def train_one_epoch(
    model: GLNet,
    stage: Stage,
    loader: Iterable[list[Sample]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: TrainingSettings,
    *,
    on_step: Callable[[dict[str, float]], None],
    title: str = "train",
    epoch: EpochState | None = None,
    ranks: Ranks = ALONE,
    save_due: Callable[[], bool] = lambda: False,
) -> StageMetrics:
    """Train on every batch of `loader`: one optimizer step and one schedule step for each.

    A step whose loss or gradient is not finite is skipped: weights, norm statistics and metric are not changed. The
    weights are not changed either by a batch without anything to learn from (coarse to fine, no foreground).

    Args:
        model: the network; `GLNet.learn` has set which parts learn.
        stage: the stage that is trained.
        loader: batches; of several processes each gets its part of every batch, which may be empty.
        optimizer, scheduler: of the parameters that learn.
        settings: loss, sizes, device, precision.
        on_step: gets the loss terms, their sum (`loss/total`), `gradient_norm` and `learning_rate` of each step. All
            state may be saved when it is called; it ends the epoch by raising.
        title: of the progress bar.
        epoch: the progress of the epoch, which is updated; by default a new one.
        ranks: the processes that train together.
        save_due: returns whether this process requests a save; `epoch.save_requested` is then True in all.

    Returns:
        The training metric of this process. As released, it counts the predictions of the steps, each made with the
        weights of its time.
    """
    # torch warns if the very first step is skipped, which is intended
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    model.train()
    epoch = epoch or EpochState(StageMetrics(stage, model.n_class))
    statistics = trained_statistics(model)
    bar = tqdm(loader, desc=title, unit="batch", dynamic_ncols=True, disable=not ranks.main)
    mean_iou = 0.0
    clock = time.perf_counter()
    for batch in bar:
        optimizer.zero_grad(set_to_none=True)
        before = [tensor.clone() for tensor in (*statistics, *epoch.metrics.sums())]
        found = _joint_step(model, stage, batch, settings, optimizer, epoch, ranks=ranks, save=save_due())
        epoch.count(found)
        if found.finite and found.active:
            settings.scaler.step(optimizer)
        else:  # if there was nothing to learn from, the metric still counts
            moved = statistics if found.finite else [*statistics, *epoch.metrics.sums()]
            for tensor, old in zip(moved, before, strict=False):
                tensor.copy_(old)
        settings.scaler.update()
        rate = float(scheduler.get_last_lr()[-1])  # the last group's is the base rate
        scheduler.step()
        mean_iou = mean_iou if found.mean_iou is None else found.mean_iou
        bar.set_postfix(loss=f"{epoch.loss:.3f}", mIoU=f"{100 * mean_iou:.1f}")
        epoch.seconds += time.perf_counter() - clock
        on_step({**found.values, "learning_rate": rate})
        clock = time.perf_counter()
    return epoch.metrics
