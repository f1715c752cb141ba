"""Stage 3, local to global: the refined branch reads the shrunk image and the local maps merged into its frame."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from dataset.base import Sample
from engine.global2local import patch_canvases, select_training_patches
from engine.patches import ImagePatches
from engine.terms import Terms, add_terms, global_inputs, global_targets
from models.glnet import GLNet, ensemble_global_half
from models.prepared import PreparedGLNet
from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_pyramid
from utils.canvas import Sink, enlarge
from utils.metrics import StageMetrics
from utils.settings import Settings


def training_step(model: GLNet, batch: list[Sample], settings: Settings, metrics: StageMetrics) -> Terms:
    """Add the gradients of one step: loss(refined logits) + the sum over sub-batches of loss(ensemble).

    Local maps are constants here. Each ensemble sub-batch backpropagates into a detached copy of the taps that it reads
    of the refined ps3. The gradient that gathers there goes through the refined branch once, together with that of the
    global loss. The parameters and the result are those of `engine.global_only.training_step`.
    """
    images = [ImagePatches(sample.image, sample.label, settings) for sample in batch]
    inputs = global_inputs(batch, settings)  # (B, 3, size_g, size_g)
    merged, kept = _local_maps(model, inputs, images, metrics)
    # no name is given to what only the backward pass needs: it is freed on its way
    logits_g, taps = model.read_refined(model.refined.pyramid(model.refined.backbone(inputs), merged).ps3)
    del merged
    loss = settings.share * settings.loss(logits_g, global_targets(batch, settings))
    total: Terms = {}
    add_terms(total, {settings.loss.term("global"): loss})
    gradient = torch.zeros_like(taps)  # (B, 9 * n_class, size_g / 4, size_g / 4)
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
            ensemble = half + ensemble_global_half(leaf, image.grid, patches, (half.shape[-2], half.shape[-1]))
            term = settings.loss(ensemble, image.targets(patches, ensemble))
            settings.scaler.scale(term).backward()
            add_terms(total, {settings.loss.term("ensemble"): term})
            canvas.add(ensemble.detach(), patches)
        enlarge(scores, image.size, found["global"])
        metrics.update(image.label, found)
    image = found = canvas = None  # not `del`: without any patch there were none
    torch.autograd.backward([settings.scaler.scale(loss), taps], [None, gradient])
    return total


@torch.no_grad()
def _local_maps(
    model: GLNet, inputs: Tensor, images: list[ImagePatches], metrics: StageMetrics
) -> tuple[Pyramid, list[list[Tensor]]]:
    """Run the frozen global and local branches on a batch.

    Args:
        model: the network.
        inputs: the shrunk images, (B, 3, size_g, size_g).
        images: the patches of each image; coarse to fine, some of them are selected.
        metrics: counts the local predictions.

    Returns:
        The merged local maps, (B, C, H, W) each, 0 for images without patches; and for each image the local ps3 of
        each sub-batch, (n, 512, h, w), on the host.
    """
    mosaic: Mosaic | None = None
    kept: list[list[Tensor]] = []
    for i, (x, image) in enumerate(zip(inputs.split(1), images, strict=True)):
        kept.append([])
        context = model.global_.context(x)
        coarse = image.settings.coarse_to_fine is not None
        if coarse and not select_training_patches(image, model.global_.logits_of(context), metrics):
            continue
        mosaic = mosaic or Mosaic(len(images), context)
        ids = image.ids()
        canvas = image.canvas(ids)
        for patches, x_p in image:
            logits, pyramid = model.local(x_p, crop_pyramid(context, image.grid, patches))
            pyramid.visit(partial(mosaic.add, i, image.grid, patches))
            canvas.add(logits, patches)
            kept[-1].append(pyramid.ps3.cpu())
            del pyramid  # or it would live on while the next one is computed
        metrics.update(image.label, {"local": ids})
    if mosaic is None:
        return context.map(lambda x: x.new_zeros(len(images), *x.shape[1:])), kept
    return mosaic.merged(), kept


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Compute the requested predictions of one image: patches first, then the refined branch on their merged maps.

    The local half of the ensemble is applied while a patch is at hand, so that n_class channels of it are kept, on the
    host, as are those of its logits. Memory on the device does not grow with the number of patches, and canvases are
    made when the maps that the branches share are freed.

    The parameters are those of `engine.global2local.infer`.

    Returns:
        The refined logits (1, n_class, size_g / 4, size_g / 4), or None if they are not requested. Coarse to fine,
        those of the global branch if no patch is selected.
    """
    local, ensemble = "local" in sinks, "ensemble" in sinks
    coarse = image.settings.coarse_to_fine is not None
    maps = network.global_maps(x, logits=coarse, context=True, ensemble=False)
    if coarse and not image.select_patches(maps.logits):
        return maps.logits
    mosaic = Mosaic(1, maps.context)
    kept = []
    for patches, x_p in image:
        merge = partial(mosaic.add, 0, image.grid, patches)
        found = network.local_maps(
            x_p, maps.context, image.grid, patches, logits=local, ensemble=ensemble, on_map=merge
        )
        kept.append((patches, *(None if scores is None else scores.cpu() for scores in (found.logits, found.half))))
    del maps
    refined = network.refined_maps(x, mosaic.merged(), logits="global" in sinks, ensemble=ensemble)
    del mosaic
    canvases = patch_canvases(image, sinks, means)
    device = image.settings.device
    for patches, scores, _ in kept if local else ():
        canvases["local"].add(scores.to(device), patches)
    for patches, _, half in kept if ensemble else ():
        logits = network.ensemble_logits(half.to(device), refined.taps, image.grid, patches)
        canvases["ensemble"].add(logits, patches)
    return refined.logits
