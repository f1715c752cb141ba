"""The engine: one training step per stage, an epoch of them, and the evaluation that all inference shares.

It neither parses options nor touches files; what must be saved or shown goes to callbacks.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.base import Sample
from models.fpn import resize
from models.glnet import GLNet
from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.canvas import Ids, ScoreCanvas, Sink, enlarge
from utils.loss import focal_loss
from utils.metrics import ConfusionMatrix
from utils.patches import ImagePatches, Settings
from utils.stages import Stage

Terms = dict[str, Tensor]
"""The terms of one step's loss by name, each the sum over the step, detached."""


class Tally:
    """A confusion matrix for each prediction of a stage."""

    def __init__(self, stage: Stage, n_class: int) -> None:
        self.matrices = {name: ConfusionMatrix(n_class) for name in stage.predictions}
        self.headline = stage.predictions[-1]

    def count(self, label: Tensor, predictions: Mapping[str, Ids]) -> None:
        for name, prediction in predictions.items():
            self.matrices[name].update(label, prediction.ids)


def add_terms(total: Terms, terms: Mapping[str, Tensor]) -> None:
    """Add detached `terms` to `total`, name by name."""
    for name, value in terms.items():
        total[name] = total.get(name, 0) + value.detach()


def global_inputs(batch: list[Sample], settings: Settings) -> Tensor:
    """(B, 3, size_g, size_g): the shrunk images of a batch as the network reads them."""
    return settings.to_input(torch.stack([sample.global_image for sample in batch]))


def global_targets(batch: list[Sample], settings: Settings) -> Tensor:
    """(B, size_g / 4, size_g / 4): their labels."""
    return torch.stack([sample.global_label for sample in batch]).to(settings.device)


def step_global(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 1: focal(global logits) of the whole batch in one pass."""
    logits, _ = model.global_(global_inputs(batch, settings))
    loss = focal_loss(logits, global_targets(batch, settings))
    loss.backward()
    for sample, scores in zip(batch, logits.detach().split(1), strict=True):
        prediction = Ids(tuple(sample.label.shape), settings.device)
        enlarge(scores, tuple(sample.label.shape), prediction)
        tally.count(sample.label.to(settings.device), {"global": prediction})
    return {"focal_global": loss.detach()}


def step_global2local(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 2: per sub-batch focal(local) + focal(ensemble) + lambda MSE(local ps3, crop of the global ps3).

    Gradients of all sub-batches of all images are added.
    """
    total: Terms = {}
    for sample in batch:
        image = ImagePatches(sample.image, sample.label, settings)
        with torch.no_grad():
            logits_g, context = model.global_(global_inputs([sample], settings))
        found = {name: image.ids() for name in tally.matrices}
        canvases = {name: ScoreCanvas(image.grid, found[name]) for name in ("local", "ensemble")}
        for patches, x in image:
            logits, pyramid = model.local(x, crop_pyramid(context, image.grid, patches))
            crop = crop_global(context.ps3, image.grid, patches)
            ensemble = model.ensemble(pyramid.ps3, crop)
            target = image.targets(patches, logits)
            terms = {
                "focal_local": focal_loss(logits, target),
                "focal_ensemble": focal_loss(ensemble, target),
                "fmreg": settings.lamb_fmreg * F.mse_loss(pyramid.ps3, resize(crop, pyramid.ps3.shape[-2:])),
            }
            sum(terms.values()).backward()
            add_terms(total, terms)
            canvases["local"].add(logits.detach(), patches)
            canvases["ensemble"].add(ensemble.detach(), patches)
        enlarge(logits_g, image.size, found["global"])
        tally.count(image.label, found)
    return total


def step_local2global(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 3: focal(refined logits) + the sum over sub-batches of focal(ensemble), in one backward pass.

    Local maps are constants here. Each ensemble sub-batch backpropagates into a detached copy of the refined ps3;
    what gathers there goes through the refined branch once, together with the global loss.
    """
    images = [ImagePatches(sample.image, sample.label, settings) for sample in batch]
    found = [{name: image.ids() for name in tally.matrices} for image in images]
    inputs = global_inputs(batch, settings)
    with torch.no_grad():
        shared = [
            _local_maps(model, x, image, ids["local"])
            for x, image, ids in zip(inputs.split(1), images, found, strict=True)
        ]
    merged, *others = (maps for maps, _ in shared)
    logits_g, pyramid = model.refined(inputs, merged.map(lambda *maps: torch.cat(maps), *others))
    loss = focal_loss(logits_g, global_targets(batch, settings))
    total: Terms = {}
    add_terms(total, {"focal_global": loss})
    gradients = []
    for i, (image, ids) in enumerate(zip(images, found, strict=True)):
        leaf = pyramid.ps3[i : i + 1].detach().requires_grad_()
        canvas = ScoreCanvas(image.grid, ids["ensemble"])
        for patches, ps3 in zip(image.grid.sub_batches(settings.sub_batch_size), shared[i][1], strict=True):
            ensemble = model.ensemble(ps3.to(settings.device), crop_global(leaf, image.grid, patches))
            term = focal_loss(ensemble, image.targets(patches, ensemble))
            term.backward()
            add_terms(total, {"focal_ensemble": term})
            canvas.add(ensemble.detach(), patches)
        gradients.append(leaf.grad)
        enlarge(logits_g[i : i + 1].detach(), image.size, ids["global"])
        tally.count(image.label, ids)
    torch.autograd.backward([loss, pyramid.ps3], [None, torch.cat(gradients)])
    return total


def _local_maps(model: GLNet, x: Tensor, image: ImagePatches, local: Ids) -> tuple[Pyramid, list[Tensor]]:
    """The merged local maps of one image, and the local ps3 of each sub-batch, kept on the host."""
    context = model.global_.context(x)
    mosaic = Mosaic(image.grid, context)
    canvas = ScoreCanvas(image.grid, local)
    kept = []
    for patches, x_p in image:
        logits, pyramid = model.local(x_p, crop_pyramid(context, image.grid, patches))
        mosaic.add(pyramid, patches)
        canvas.add(logits, patches)
        kept.append(pyramid.ps3.cpu())
    return mosaic.merged(), kept


STEPS = {1: step_global, 2: step_global2local, 3: step_local2global}


def train_one_epoch(
    model: GLNet,
    stage: Stage,
    loader: Iterable[list[Sample]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    on_step: Callable[[dict[str, float]], None],
    title: str = "train",
) -> Tally:
    """Train on every batch of `loader` once; one optimizer step a batch, one schedule step after it.

    `on_step` gets the step's loss terms, their sum (`total`) and the learning rate. Returns the training metric,
    counted on the predictions that the steps made while the weights moved, as released.
    """
    model.train()
    tally = Tally(stage, model.n_class)
    bar = tqdm(loader, desc=title, unit="batch", dynamic_ncols=True)
    running = 0.0
    for count, batch in enumerate(bar, start=1):
        optimizer.zero_grad(set_to_none=True)
        terms = STEPS[stage.number](model, batch, settings, tally)
        optimizer.step()
        values = {name: float(value) for name, value in terms.items()}
        loss = sum(values.values())
        on_step(
            {
                **{f"loss/{name}": v for name, v in values.items()},
                "loss/total": loss,
                "learning_rate": scheduler.get_last_lr()[0],
            }
        )
        scheduler.step()
        running += (loss - running) / count
        bar.set_postfix(loss=f"{running:.3f}", mIoU=f"{100 * tally.matrices[tally.headline].mean_iou():.1f}")
    return tally


@torch.inference_mode()
def segment(
    model: GLNet, stage: Stage, image: Tensor, global_image: Tensor, settings: Settings, sinks: Mapping[str, Sink]
) -> None:
    """Segment one image as `stage` does, on the model's device; the model is in evaluation mode.

    `image` (3, H, W) uint8 of any size, `global_image` (3, size_g, size_g) uint8, the same image shrunk. The scores
    of each prediction named in `sinks` (of `stage.predictions`) go to its sink.
    """
    whole = ImagePatches(image, None, settings)
    x = settings.to_input(global_image[None])
    canvases = {name: ScoreCanvas(whole.grid, sinks[name]) for name in ("local", "ensemble") if name in sinks}
    if stage.number == 3:
        logits_g = _segment_refined(model, x, whole, canvases)
    else:
        logits_g, context = model.global_(x)
        for patches, x_p in whole if canvases else ():
            logits, pyramid = model.local(x_p, crop_pyramid(context, whole.grid, patches))
            if "local" in canvases:
                canvases["local"].add(logits, patches)
            if "ensemble" in canvases:
                crop = crop_global(context.ps3, whole.grid, patches)
                canvases["ensemble"].add(model.ensemble(pyramid.ps3, crop), patches)
    if "global" in sinks:
        enlarge(logits_g, whole.size, sinks["global"])


def _segment_refined(model: GLNet, x: Tensor, whole: ImagePatches, canvases: Mapping[str, ScoreCanvas]) -> Tensor:
    """Stage 3's patches and refined branch; returns the refined logits.

    The local half of the ensemble is applied while a patch is at hand, so that n_class channels are kept of it.
    """
    context = model.global_.context(x)
    mosaic = Mosaic(whole.grid, context)
    halves = []
    for patches, x_p in whole:
        logits, pyramid = model.local(x_p, crop_pyramid(context, whole.grid, patches))
        mosaic.add(pyramid, patches)
        if "local" in canvases:
            canvases["local"].add(logits, patches)
        if "ensemble" in canvases:
            halves.append((patches, model.ensemble.local_half(pyramid.ps3)))
    logits_g, refined = model.refined(x, mosaic.merged())
    for patches, half in halves:
        crop = resize(crop_global(refined.ps3, whole.grid, patches), half.shape[-2:])
        canvases["ensemble"].add(half + model.ensemble.global_half(crop), patches)
    return logits_g


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the metric of each prediction, and the mean seconds of segmenting one image."""

    tally: Tally
    images: int
    seconds_per_image: float


def evaluate(
    model: GLNet,
    stage: Stage,
    loader: Iterable[list[Sample]],
    settings: Settings,
    on_image: Callable[[Sample, dict[str, Tensor]], None] | None = None,
    title: str = "evaluate",
) -> Evaluation:
    """Segment every image of `loader` and count it against its label.

    `on_image` gets each sample and its predictions by name, (H, W) uint8 ids.
    """
    model.eval()
    tally = Tally(stage, model.n_class)
    seconds, images = 0.0, 0
    bar = tqdm(loader, desc=title, unit="image", dynamic_ncols=True)
    for sample in (sample for batch in bar for sample in batch):
        start = time.perf_counter()
        found = {name: Ids(tuple(sample.image.shape[-2:]), settings.device) for name in stage.predictions}
        segment(model, stage, sample.image, sample.global_image, settings, found)
        if sample.label is not None:
            tally.count(sample.label.to(settings.device), found)
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        seconds += time.perf_counter() - start
        images += 1
        bar.set_postfix(mIoU=f"{100 * tally.matrices[tally.headline].mean_iou():.1f}")
        if on_image is not None:
            on_image(sample, {name: prediction.ids for name, prediction in found.items()})
    return Evaluation(tally, images, seconds / max(images, 1))
