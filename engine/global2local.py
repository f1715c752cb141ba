"""Stage 2, global to local: the local branch reads patches and crops of the frozen global branch's maps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dataset.base import Sample
from engine.patches import ImagePatches
from engine.terms import Terms, add_terms, global_inputs
from models.glnet import GLNet, ensemble_global_half
from models.prepared import PreparedGLNet
from models.pyramid import Pyramid
from models.sharing import crop_global, crop_pyramid
from utils.canvas import Sink, enlarge
from utils.metrics import StageMetrics
from utils.settings import Settings


def training_step(model: GLNet, batch: list[Sample], settings: Settings, metrics: StageMetrics) -> Terms:
    """Add the gradients of one step: loss(local) + loss(ensemble) + lambda MSE(local ps3, crop of the global ps3).

    Gradients of all sub-batches of all images are added. The parameters and the result are those of
    `engine.global_only.training_step`.
    """
    total: Terms = {}
    for sample in batch:
        image = ImagePatches(sample.image, sample.label, settings)
        with torch.no_grad():
            logits_g, context = model.global_(global_inputs([sample], settings))
        if not select_training_patches(image, logits_g, metrics):
            continue
        taps = model.ensemble.global_taps(context.ps3)  # (1, 9 * n_class, size_g / 4, size_g / 4)
        leaf = taps.detach().requires_grad_()
        found = {name: image.ids() for name in metrics.matrices}
        canvases = {name: image.canvas(found[name]) for name in ("local", "ensemble")}
        for patches, x in image:
            terms, scores = _sub_batch_terms(model, x, patches, image, context, leaf)
            settings.scaler.scale(sum(terms.values())).backward()
            add_terms(total, terms)
            for name, canvas in canvases.items():
                canvas.add(scores[name], patches)
        torch.autograd.backward(taps, leaf.grad)
        enlarge(logits_g, image.size, found["global"])
        metrics.update(image.label, found)
    return total


def select_training_patches(image: ImagePatches, logits_g: Tensor, metrics: StageMetrics) -> bool:
    """Select the patches of `image`, coarse to fine, and return whether any is left.

    If none is, the global branch's coarse logits (1, n_class, h, w) stand for every prediction, and are counted.
    """
    if image.select_patches(logits_g):
        return True
    ids = image.ids()
    enlarge(logits_g, image.size, ids)
    metrics.update(image.label, dict.fromkeys(metrics.matrices, ids))
    return False


def _sub_batch_terms(
    model: GLNet, x: Tensor, patches: slice, image: ImagePatches, context: Pyramid, taps: Tensor
) -> tuple[Terms, dict[str, Tensor]]:
    """Return the loss terms of one sub-batch, with gradients, and its logits by prediction, without.

    Args:
        model: the network.
        x: the patches, (n, 3, h, w), normalised.
        patches: which patches of the image's grid they are.
        image: the image's patches and their labels.
        context: the global branch's maps of the whole image.
        taps: what the ensemble reads of the image's global ps3.

    It is a function of its own so that nothing else of a sub-batch lives on while the next one is computed.
    """
    settings = image.settings
    ps3 = model.local.pyramid(model.local.backbone(x), crop_pyramid(context, image.grid, patches)).ps3
    logits, half, distance = model.read_local(ps3, crop_global(context.ps3, image.grid, patches))
    ensemble = half + ensemble_global_half(taps, image.grid, patches, (half.shape[-2], half.shape[-1]))
    target = image.targets(patches, logits)
    terms = {
        settings.loss.term("local"): settings.loss(logits, target),
        settings.loss.term("ensemble"): settings.loss(ensemble, target),
        "fmreg": settings.lamb_fmreg * distance,
    }
    return terms, {"local": logits.detach(), "ensemble": ensemble.detach()}


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Compute the requested predictions of one image.

    Args:
        network: the prepared network.
        x: the shrunk image, (1, 3, size_g, size_g), normalised.
        image: the image's patches; coarse to fine, some of them are selected.
        sinks: the requested predictions; `local` and `ensemble` get their scores here.
        means: whether scores are means over the patches that cover a pixel, or sums.

    Returns:
        The global logits (1, n_class, size_g / 4, size_g / 4); None if nothing needs them.
    """
    local, ensemble = "local" in sinks, "ensemble" in sinks
    patched = local or ensemble
    coarse = patched and image.settings.coarse_to_fine is not None
    maps = network.global_maps(x, logits=coarse or "global" in sinks, context=patched, ensemble=ensemble)
    if not patched or (coarse and not image.select_patches(maps.logits)):
        return maps.logits
    canvases = patch_canvases(image, sinks, means)
    for patches, x_p in image:
        found = network.local_maps(x_p, maps.context, image.grid, patches, logits=local, ensemble=ensemble)
        if local:
            canvases["local"].add(found.logits, patches)
        if ensemble:
            logits = network.ensemble_logits(found.half, maps.taps, image.grid, patches)
            canvases["ensemble"].add(logits, patches)
    return maps.logits


def patch_canvases(image: ImagePatches, sinks: Mapping[str, Sink], means: bool) -> dict:
    """Return a canvas for each requested prediction that is made of patches."""
    return {name: image.canvas(sinks[name], means) for name in ("local", "ensemble") if name in sinks}
