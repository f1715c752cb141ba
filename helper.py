"""The engine: an epoch of training steps, and the segmentation and evaluation that all inference shares.

It neither parses options nor touches files; what must be saved or shown goes to callbacks.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.base import Sample
from models.glnet import GLNet
from models.inference import Form, PreparedGLNet
from models.sharing import Mosaic
from steps import STEPS
from utils.canvas import Ids, ScoreCanvas, Sink, enlarge
from utils.distributed import ALONE, Ranks, join_step, learning_statistics
from utils.loss import Loss
from utils.patches import ImagePatches, Settings
from utils.precision import PRECISIONS, autocast
from utils.regions import Effort
from utils.sources import Source
from utils.stages import Stage
from utils.tally import Progress, Tally


def _share(batch: list[Sample], loss: Loss, ranks: Ranks) -> float:
    """What of the weight of the pixels of all processes' global labels is in this process's part of the batch."""
    own = torch.tensor([sum(loss.weight(sample.global_label) for sample in batch)], dtype=torch.float64)
    total = own.clone()
    ranks.sum_([total])
    return float(own) / (float(total) or 1)


def _joint_step(
    model: GLNet,
    stage: Stage,
    batch: list[Sample],
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
    asks: bool,
) -> tuple[dict[str, float], bool]:
    """The gradients of one step of all processes, each on its `batch`; returns the loss terms and the gradient's norm,
    and whether there was anything to learn from.

    All that the host must know of the step comes from the device in one transfer.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    if ranks.world > 1 and "global" in stage.supervised:
        settings = replace(settings, share=_share(batch, settings.loss, ranks))
    names = (*map(settings.loss.term, stage.supervised), *stage.other_terms)
    with autocast(settings.device, settings.precision):
        terms = STEPS[stage.number](model, batch, settings, progress.tally) if batch else {}
    counts = torch.tensor([len(batch), asks, bool(terms)], dtype=torch.float32)
    losses = [terms.get(name, torch.zeros((), device=settings.device)).float() for name in names]
    numbers = torch.cat([torch.stack(losses), counts.to(settings.device)])
    join_step(ranks, learned, learning_statistics(model), numbers, active=bool(terms))
    settings.scaler.unscale_(optimizer)
    norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in learned]).norm()
    *values, images, asked, active, norm = torch.cat([numbers, norm[None]]).tolist()
    progress.images += int(images)
    progress.asked = asked > 0
    losses = {f"loss/{name}": value for name, value in zip(names, values, strict=True)}
    return {**losses, "loss/total": sum(values), "gradient_norm": norm}, active > 0


def train_one_epoch(
    model: GLNet,
    stage: Stage,
    loader: Iterable[list[Sample]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    on_step: Callable[[dict[str, float]], None],
    title: str = "train",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    asks: Callable[[], bool] = lambda: False,
) -> Tally:
    """Train on every batch of `loader`; one optimizer step a batch, one schedule step after it.

    Of several processes each gets its part of every batch, which may be empty. A step whose loss or gradient is not
    finite is skipped: weights, norm statistics and metric stay as they were. So do the weights where a batch holds
    nothing to learn from (coarse to fine, images without foreground).

    After each step, when everything stands as it may be saved, `on_step` gets the step's loss terms, their sum
    (`loss/total`), `gradient_norm` and `learning_rate`; it ends the epoch by raising. `progress` is kept up to date,
    and tells in `asked` whether `asks()` was true in any process. Returns the training metric of this process, counted
    on the predictions that the steps made while the weights moved, as released.
    """
    # it comes where the very first step is skipped, and is meant
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    model.train()
    progress = progress or Progress(Tally(stage, model.n_class))
    statistics = learning_statistics(model)
    bar = tqdm(loader, desc=title, unit="batch", dynamic_ncols=True, disable=not ranks.main)
    clock = time.perf_counter()
    for batch in bar:
        optimizer.zero_grad(set_to_none=True)
        before = [tensor.clone() for tensor in (*statistics, *progress.tally.sums())]
        values, active = _joint_step(model, stage, batch, settings, optimizer, progress, ranks, asks())
        values["learning_rate"] = scheduler.get_last_lr()[0]
        progress.batches += 1
        finite = all(map(math.isfinite, values.values()))
        if finite:
            progress.loss += (values["loss/total"] - progress.loss) / (progress.batches - progress.skipped)
        else:
            progress.skipped += 1
        if finite and active:
            settings.scaler.step(optimizer)
        else:  # what was counted stands where there was nothing to learn from
            moved = statistics if finite else [*statistics, *progress.tally.sums()]
            for tensor, old in zip(moved, before, strict=False):
                tensor.copy_(old)
        settings.scaler.update()
        scheduler.step()
        bar.set_postfix(loss=f"{progress.loss:.3f}", mIoU=f"{100 * progress.tally.mean_iou():.1f}")
        progress.seconds += time.perf_counter() - clock
        on_step(values)
        clock = time.perf_counter()
    return progress.tally


@torch.inference_mode()
def segment(
    network: GLNet | PreparedGLNet,
    stage: Stage,
    image: Tensor | Source,
    global_image: Tensor,
    settings: Settings,
    sinks: Mapping[str, Sink],
    on_patches: Callable[[int], None] | None = None,
    means: bool = False,
) -> Effort:
    """Segment one image as `stage` does. The network is in evaluation mode and on the settings' device.

    `image` is a source of any size, or (3, H, W) uint8; `global_image` (3, size_g, size_g) uint8, the same image
    shrunk. The scores of each prediction named in `sinks` (of `stage.predictions`) go to its sink, sums over patches or
    their `means`; nothing else is computed. `on_patches` is told how many patches are done. Returns how much was looked
    at: coarse to fine, the local branch works where the global branch found something. Elsewhere local and ensemble
    predictions are background; where it found nothing at all, every prediction is its own.
    """
    whole = ImagePatches(image, None, settings, on_patches)
    x = settings.to_input(global_image[None])
    logits = (_segment_refined if stage.number == 3 else _segment_context)(network, x, whole, sinks, means)
    for name, sink in sinks.items():
        if name == "global" or not whole.boxes:
            enlarge(logits, whole.size, sink)
    return whole.effort()


def _canvases(whole: ImagePatches, sinks: Mapping[str, Sink], means: bool) -> dict[str, ScoreCanvas]:
    """For the predictions that are made of patches."""
    return {name: whole.canvas(sinks[name], means) for name in ("local", "ensemble") if name in sinks}


def _segment_context(
    network: GLNet | PreparedGLNet, x: Tensor, whole: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Stages 1 and 2: the global branch, and where `sinks` ask for them the patches; returns the global logits."""
    local, ensemble = "local" in sinks, "ensemble" in sinks
    patched = local or ensemble
    coarse = whole.looks and patched
    seen = network.read_whole(x, logits=coarse or "global" in sinks, context=patched, ensemble=ensemble)
    if coarse:
        whole.look(seen.logits)
    canvases = _canvases(whole, sinks, means)
    for patches, x_p in whole if patched else ():
        maps = network.read_patches(x_p, seen, whole.grid, patches, logits=local, ensemble=ensemble)
        if local:
            canvases["local"].add(maps.logits, patches)
        if ensemble:
            canvases["ensemble"].add(network.join(maps.half, seen, whole.grid, patches), patches)
    return seen.logits


def _segment_refined(
    network: GLNet | PreparedGLNet, x: Tensor, whole: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Stage 3: patches, then the refined branch on their merged maps; returns the refined logits, or those of the
    global branch where it found nothing to look at.

    The local half of the ensemble is applied while a patch is at hand, so that n_class channels are kept of it, on the
    host, as of its logits: what the device holds does not grow with the number of patches, and canvases are made when
    the maps that the branches share are gone.
    """
    local, ensemble = "local" in sinks, "ensemble" in sinks
    seen = network.read_whole(x, logits=whole.looks, context=True, ensemble=False)
    if whole.looks:
        whole.look(seen.logits)
        if not whole.boxes:
            return seen.logits
    mosaic = Mosaic(1, seen.context)
    kept = []
    for patches, x_p in whole:
        merge = partial(mosaic.add, 0, whole.grid, patches)
        maps = network.read_patches(x_p, seen, whole.grid, patches, logits=local, ensemble=ensemble, see=merge)
        kept.append((patches, *(None if scores is None else scores.cpu() for scores in (maps.logits, maps.half))))
    del seen
    refined = network.refine(x, mosaic.merged(), logits="global" in sinks, ensemble=ensemble)
    del mosaic
    canvases = _canvases(whole, sinks, means)
    for patches, scores, _ in kept if local else ():
        canvases["local"].add(scores.to(whole.settings.device), patches)
    for patches, _, half in kept if ensemble else ():
        half = half.to(whole.settings.device)
        canvases["ensemble"].add(network.join(half, refined, whole.grid, patches), patches)
    return refined.logits


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the metric of each prediction, and the mean seconds of segmenting one image.

    Of several processes each has the same, of all images together. `effort` is how much of them was looked at.
    `complete` is False where one was told to stop.
    """

    tally: Tally
    images: int
    seconds_per_image: float
    effort: Effort = field(default_factory=Effort)
    complete: bool = True


def prepare(model: GLNet, stage: Stage, settings: Settings) -> PreparedGLNet:
    """`model` as `stage` evaluates it, in the settings' precision and on their device; it copies what it needs."""
    return PreparedGLNet(model.eval(), stage, Form(settings.device, PRECISIONS[settings.precision]))


def evaluate(
    network: GLNet | PreparedGLNet,
    stage: Stage,
    loader: Iterable[list[Sample]],
    settings: Settings,
    on_image: Callable[[Sample, dict[str, Tensor]], None] | None = None,
    title: str = "evaluate",
    ranks: Ranks = ALONE,
    stops: Callable[[], bool] = lambda: False,
    tally: Tally | None = None,
    segment: Callable[..., Effort] = segment,
) -> Evaluation:
    """Segment every image of `loader` and count it against its label; GLNet itself is prepared for inference first.

    `on_image` gets each sample and its predictions by name, (H, W) uint8 ids. Of several processes each has its part
    of the images, and `on_image` sees that part. Where `stops()` is true after an image, this process does no more.
    It is counted in `tally`, by default a new one.
    Another `segment` may stand in for the plain one; it takes the same.
    """
    if isinstance(network, GLNet):
        network = prepare(network, stage, settings)
    tally = tally or Tally(stage, network.n_class)
    seconds, images, stopped, effort = 0.0, 0, False, Effort()
    bar = tqdm(loader, desc=title, unit="image", dynamic_ncols=True, disable=not ranks.main)
    for sample in (sample for batch in bar for sample in batch):
        start = time.perf_counter()
        found = {name: Ids(tuple(sample.image.shape[-2:]), settings.device) for name in stage.predictions}
        effort += segment(network, stage, sample.image, sample.global_image, settings, found)
        if sample.label is not None:
            tally.count(settings.send(sample.label), found)
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        seconds += time.perf_counter() - start
        images += 1
        bar.set_postfix(mIoU=f"{100 * tally.mean_iou():.1f}")
        if on_image is not None:
            on_image(sample, {name: prediction.ids for name, prediction in found.items()})
        if stopped := stops():
            break
    seconds, images, stopped = (sum(parts) for parts in zip(*ranks.gather((seconds, images, stopped)), strict=True))
    effort = sum(ranks.gather(effort), Effort())
    for counts in tally.sums():
        ranks.sum_([counts])
    return Evaluation(tally, images, seconds / max(images, 1), effort, complete=not stopped)
