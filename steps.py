"""One training step of each stage: forward, loss terms and gradients of a batch; the optimizer is the caller's."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import Sample
from models.glnet import GLNet, spread_crop
from models.pyramid import Pyramid
from models.resized import resize
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.canvas import Ids, ScoreCanvas, enlarge
from utils.loss import focal_loss
from utils.patches import ImagePatches, Settings
from utils.tally import Tally

Terms = dict[str, Tensor]
"""The terms of one step's loss by name, each the sum over the step, detached."""


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
    loss = settings.share * focal_loss(logits, global_targets(batch, settings))
    settings.scaler.scale(loss).backward()
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
            terms, scores = _local_terms(model, x, context, image, patches, settings)
            settings.scaler.scale(sum(terms.values())).backward()
            add_terms(total, terms)
            for name, canvas in canvases.items():
                canvas.add(scores[name], patches)
        enlarge(logits_g, image.size, found["global"])
        tally.count(image.label, found)
    return total


def _local_terms(
    model: GLNet, x: Tensor, context: Pyramid, image: ImagePatches, patches: slice, settings: Settings
) -> tuple[Terms, dict[str, Tensor]]:
    """Stage 2's loss terms of one sub-batch, with gradients, and its logits by prediction, without.

    A function of its own so that nothing else of a sub-batch lives on while the next one is computed.
    """
    logits, pyramid = model.local(x, crop_pyramid(context, image.grid, patches))
    crop = crop_global(context.ps3, image.grid, patches)
    ensemble = model.ensemble(pyramid.ps3, crop)
    target = image.targets(patches, logits)
    terms = {
        "focal_local": focal_loss(logits, target),
        "focal_ensemble": focal_loss(ensemble, target),
        "fmreg": settings.lamb_fmreg * F.mse_loss(pyramid.ps3, resize(crop, pyramid.ps3.shape[-2:])),
    }
    return terms, {"local": logits.detach(), "ensemble": ensemble.detach()}


def step_local2global(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 3: focal(refined logits) + the sum over sub-batches of focal(ensemble), in one backward pass.

    Local maps are constants here. Each ensemble sub-batch backpropagates into a detached copy of the taps that it reads
    of the refined ps3; what gathers there goes through the refined branch once, together with the global loss.
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
    loss = settings.share * focal_loss(logits_g, global_targets(batch, settings))
    total: Terms = {}
    add_terms(total, {"focal_global": loss})
    taps = model.ensemble.global_taps(pyramid.ps3)
    gradients = []
    for image, ids, (_, kept), whole in zip(images, found, shared, taps.detach().split(1), strict=True):
        leaf = whole.clone().requires_grad_()
        canvas = ScoreCanvas(image.grid, ids["ensemble"])
        for patches, ps3 in zip(image.grid.sub_batches(settings.sub_batch_size), kept, strict=True):
            half = model.ensemble.local_half(ps3.to(settings.device))
            ensemble = half + spread_crop(leaf, image.grid, patches, half)
            term = focal_loss(ensemble, image.targets(patches, ensemble))
            settings.scaler.scale(term).backward()
            add_terms(total, {"focal_ensemble": term})
            canvas.add(ensemble.detach(), patches)
        gradients.append(leaf.grad)
    for image, ids, scores in zip(images, found, logits_g.detach().split(1), strict=True):
        enlarge(scores, image.size, ids["global"])
        tally.count(image.label, ids)
    torch.autograd.backward([settings.scaler.scale(loss), taps], [None, torch.cat(gradients)])
    return total


def _local_maps(model: GLNet, x: Tensor, image: ImagePatches, local: Ids) -> tuple[Pyramid, list[Tensor]]:
    """The merged local maps of one image, and the local ps3 of each sub-batch, kept on the host."""
    context = model.global_.context(x)
    mosaic = Mosaic(image.grid, context)
    canvas = ScoreCanvas(image.grid, local)
    kept = []
    for patches, x_p in image:
        logits, pyramid = model.local(x_p, crop_pyramid(context, image.grid, patches))
        pyramid.show(partial(mosaic.add, patches))
        canvas.add(logits, patches)
        kept.append(pyramid.ps3.cpu())
        del pyramid  # or it would live on while the next one is computed
    return mosaic.merged(), kept


STEPS = {1: step_global, 2: step_global2local, 3: step_local2global}
