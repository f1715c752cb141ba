"""One training step of each stage: forward, loss terms and gradients of a batch; the optimizer is the caller's."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from dataset.base import Sample
from models.glnet import GLNet, spread_crop
from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.canvas import Ids, enlarge
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
    return settings.send(torch.stack([sample.global_label for sample in batch]))


def step_global(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 1: loss(global logits) of the whole batch in one pass."""
    logits = model.global_.logits(global_inputs(batch, settings))
    loss = settings.share * settings.loss(logits, global_targets(batch, settings))
    settings.scaler.scale(loss).backward()
    for sample, scores in zip(batch, logits.detach().split(1), strict=True):
        prediction = Ids(tuple(sample.label.shape), settings.device)
        enlarge(scores, tuple(sample.label.shape), prediction)
        tally.count(settings.send(sample.label), {"global": prediction})
    return {settings.loss.term("global"): loss.detach()}


def step_global2local(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 2: per sub-batch loss(local) + loss(ensemble) + lambda MSE(local ps3, crop of the global ps3).

    Gradients of all sub-batches of all images are added.
    """
    total: Terms = {}
    for sample in batch:
        image = ImagePatches(sample.image, sample.label, settings)
        with torch.no_grad():
            logits_g, context = model.global_(global_inputs([sample], settings))
        if image.looks and not _look(image, logits_g, tally):
            continue
        taps = model.ensemble.global_taps(context.ps3)
        leaf = taps.detach().requires_grad_()
        found = {name: image.ids() for name in tally.matrices}
        canvases = {name: image.canvas(found[name]) for name in ("local", "ensemble")}
        for patches, x in image:
            terms, scores = _local_terms(model, x, context, leaf, image, patches, settings)
            settings.scaler.scale(sum(terms.values())).backward()
            add_terms(total, terms)
            for name, canvas in canvases.items():
                canvas.add(scores[name], patches)
        torch.autograd.backward(taps, leaf.grad)
        enlarge(logits_g, image.size, found["global"])
        tally.count(image.label, found)
    return total


def _look(image: ImagePatches, coarse: Tensor, tally: Tally) -> bool:
    """Whether there is something to look at in `image`, coarse to fine, to whose patches it is then confined.

    Where there is nothing, the `coarse` logits of the global branch are every prediction, and counted.
    """
    image.look(coarse)
    if image.boxes:
        return True
    ids = image.ids()
    enlarge(coarse, image.size, ids)
    tally.count(image.label, dict.fromkeys(tally.matrices, ids))
    return False


def _local_terms(
    model: GLNet,
    x: Tensor,
    context: Pyramid,
    taps: Tensor,
    image: ImagePatches,
    patches: slice,
    settings: Settings,
) -> tuple[Terms, dict[str, Tensor]]:
    """Stage 2's loss terms of one sub-batch, with gradients, and its logits by prediction, without.

    `taps`: what the ensemble reads of the image's global ps3.
    A function of its own so that nothing else of a sub-batch lives on while the next one is computed.
    """
    ps3 = model.local.pyramid(model.local.backbone(x), crop_pyramid(context, image.grid, patches)).ps3
    logits, half, distance = model.read_local(ps3, crop_global(context.ps3, image.grid, patches))
    ensemble = half + spread_crop(taps, image.grid, patches, half)
    target = image.targets(patches, logits)
    terms = {
        settings.loss.term("local"): settings.loss(logits, target),
        settings.loss.term("ensemble"): settings.loss(ensemble, target),
        "fmreg": settings.lamb_fmreg * distance,
    }
    return terms, {"local": logits.detach(), "ensemble": ensemble.detach()}


def step_local2global(model: GLNet, batch: list[Sample], settings: Settings, tally: Tally) -> Terms:
    """Stage 3: loss(refined logits) + the sum over sub-batches of loss(ensemble), in one backward pass.

    Local maps are constants here. Each ensemble sub-batch backpropagates into a detached copy of the taps that it reads
    of the refined ps3; what gathers there goes through the refined branch once, together with the global loss.
    """
    images = [ImagePatches(sample.image, sample.label, settings) for sample in batch]
    inputs = global_inputs(batch, settings)
    merged, kept = _local_maps(model, inputs, images, tally)
    # no name is given to what only the backward pass needs: it is freed on its way
    logits_g, taps = model.read_refined(model.refined.pyramid(model.refined.backbone(inputs), merged).ps3)
    del merged
    loss = settings.share * settings.loss(logits_g, global_targets(batch, settings))
    total: Terms = {}
    add_terms(total, {settings.loss.term("global"): loss})
    gradient = torch.zeros_like(taps)
    of_images = (x.detach().split(1) for x in (taps, gradient, logits_g))
    for maps, whole, gathered, scores in zip(kept, *of_images, strict=True):
        image = images.pop(0)
        if not image.boxes:
            continue
        leaf = whole.clone().requires_grad_()
        leaf.grad = gathered
        found = {"ensemble": image.ids(), "global": image.ids()}
        canvas = image.canvas(found["ensemble"])
        for patches, ps3 in zip(image.grid.sub_batches(settings.sub_batch_size), maps, strict=True):
            half = model.ensemble.local_half(ps3.to(settings.device))
            ensemble = half + spread_crop(leaf, image.grid, patches, half)
            term = settings.loss(ensemble, image.targets(patches, ensemble))
            settings.scaler.scale(term).backward()
            add_terms(total, {settings.loss.term("ensemble"): term})
            canvas.add(ensemble.detach(), patches)
        enlarge(scores, image.size, found["global"])
        tally.count(image.label, found)
    image = found = canvas = None  # not `del`: of images without patches there were none
    torch.autograd.backward([settings.scaler.scale(loss), taps], [None, gradient])
    return total


@torch.no_grad()
def _local_maps(
    model: GLNet, inputs: Tensor, images: list[ImagePatches], tally: Tally
) -> tuple[Pyramid, list[list[Tensor]]]:
    """The merged local maps of a batch, and of each image the local ps3 of each sub-batch, kept on the host.

    Coarse to fine, images are first confined to where there is something; where there is nothing, merged maps are 0.
    """
    mosaic, kept = None, []
    for i, (x, image) in enumerate(zip(inputs.split(1), images, strict=True)):
        kept.append([])
        context = model.global_.context(x)
        if image.looks and not _look(image, model.global_.read(context), tally):
            continue
        mosaic = mosaic or Mosaic(len(images), context)
        ids = image.ids()
        canvas = image.canvas(ids)
        for patches, x_p in image:
            logits, pyramid = model.local(x_p, crop_pyramid(context, image.grid, patches))
            pyramid.show(partial(mosaic.add, i, image.grid, patches))
            canvas.add(logits, patches)
            kept[-1].append(pyramid.ps3.cpu())
            del pyramid  # or it would live on while the next one is computed
        tally.count(image.label, {"local": ids})
    if mosaic is None:
        return context.map(lambda x: x.new_zeros(len(images), *x.shape[1:])), kept
    return mosaic.merged(), kept


STEPS = {1: step_global, 2: step_global2local, 3: step_local2global}
