"""Stage 2, global to local: the local branch reads patches and crops of the frozen global branch's maps."""

from collections.abc import Container, Mapping
from functools import reduce

import torch
from torch import Tensor

from dataset.base import Sample
from engine.counting import StepScores
from engine.patches import ImagePatches, TrainingPatches
from engine.terms import Terms, add_terms, global_inputs, outside_autocast
from models.efficient import branch_pyramid, ensemble_global_half, ensemble_taps, read_local
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from models.pyramid import FullPyramid
from models.sharing import crop_global, crop_pyramid
from utils.canvas import ScoreCanvas, Sink
from utils.errors import required
from utils.metrics import StageMetrics
from utils.settings import TrainingSettings
from utils.tiling import map_size

PATCH_PREDICTIONS = ("local", "ensemble")
"""The predictions that are made of patches."""


def training_step(model: GLNet, batch: list[Sample], settings: TrainingSettings, metrics: StageMetrics) -> Terms:
    """Add the gradients of one step: loss(local) + loss(ensemble) + lambda MSE(local ps3, crop of the global ps3).

    Gradients of all sub-batches of all images are added. If the settings draw patches, only these are computed. The
    parameters and the result are those of `engine.global_only.training_step`.
    """
    total: Terms = {}
    for sample in batch:
        image = TrainingPatches(sample, settings)
        with torch.no_grad():
            context = branch_pyramid(model.global_, global_inputs([sample], settings))
            logits_g = model.global_.head(context.ps3)
        if not select_training_patches(image, logits_g, metrics):
            continue
        image.keep(image.draw())
        if not settings.share_maps:
            context = context.withheld()
        taps = ensemble_taps(model.ensemble, context.ps3)  # (1, 9 * n_class, size_g / 4, size_g / 4)
        leaf = taps.detach().requires_grad_()  # gathers the gradients of all sub-batches
        found = StepScores(image, metrics.matrices)
        for patches, x in image:
            terms, scores = _sub_batch_terms(model, x, patches, image, context, leaf)
            with outside_autocast(settings):
                settings.scaler.scale(reduce(torch.add, terms.values())).backward()
            add_terms(total, terms)
            for name in PATCH_PREDICTIONS:
                found.add(name, scores[name], patches)
        with outside_autocast(settings):
            torch.autograd.backward(taps, leaf.grad)
        found.add_global(logits_g)
        found.count(metrics)
    return total


def select_training_patches(image: TrainingPatches, logits_g: Tensor, metrics: StageMetrics) -> bool:
    """Select the patches of an image, if the settings do; return whether any is left.

    If none is, the global branch's logits (1, n_class, size_g / 4, size_g / 4) are counted as every prediction.
    """
    if image.select_patches(logits_g):
        return True
    ids = image.ids()
    image.enlarge(logits_g, ids)
    metrics.update(image.label(), dict.fromkeys(metrics.matrices, ids))
    return False


def _sub_batch_terms(
    model: GLNet, x: Tensor, patches: slice, image: TrainingPatches, context: FullPyramid, taps: Tensor
) -> tuple[Terms, dict[str, Tensor]]:
    """Compute the loss of one sub-batch. All other tensors of the sub-batch are freed when this function returns.

    `x` are n patches (n, bands, h, w), normalised, `context` the global branch's maps of the whole image, and `taps`
    `ensemble_taps` of it, (1, 9 * n_class, size_g / 4, size_g / 4). Return the terms of the loss, with gradients, and
    the logits (n, n_class, h / 4, w / 4) by prediction, without.
    """
    settings = image.settings
    # (n, C, h / 4, w / 4)
    ps3 = branch_pyramid(model.local, x, crop_pyramid(context, image.grid, patches)).ps3
    logits, half, distance = read_local(model, ps3, crop_global(context.ps3, image.grid, patches))
    ensemble = half + ensemble_global_half(taps, image.grid, patches, map_size(half))
    target = image.targets(patches, logits)  # (n, h / 4, w / 4)
    terms = {
        settings.loss.term("local"): settings.loss(logits, target),
        settings.loss.term("ensemble"): settings.loss(ensemble, target),
        "fmreg": settings.lamb_fmreg * distance,
    }
    return terms, {"local": logits.detach(), "ensemble": ensemble.detach()}


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Compute the requested predictions of one image; `local` and `ensemble` get their scores here.

    `x` is the shrunk image, (1, bands, size_g, size_g), normalised. If the settings select patches, some of `image` are
    left. With `means` scores are means over the patches that cover a pixel, else sums. Return the global logits (1,
    n_class, size_g / 4, size_g / 4); None if they are not needed.
    """
    requested = patch_predictions(sinks)
    selects = bool(requested) and image.settings.selection is not None
    own, shared = selects or "global" in sinks, {"context": bool(requested), "ensemble": "ensemble" in requested}
    if image.shared is None:
        maps = given = network.global_maps(x, logits=own, **shared)
    else:
        maps = network.global_maps(x, logits=own, context=False, ensemble=False)
        given = network.global_maps(image.shared, logits=False, **shared)
    if not requested or (selects and not image.select_patches(required(maps.logits, "logits"))):
        return maps.logits
    context, taps = required(given.context, "context"), given.taps
    if not image.settings.share_maps:
        context, taps = context.withheld(), None if taps is None else torch.zeros_like(taps)
    canvases = patch_canvases(image, sinks, means)
    for patches, x_p in image:
        found = network.local_maps(x_p, context, image.grid, patches, requested)
        if "local" in found:
            canvases["local"].add(found["local"], patches)
        if "ensemble" in found:
            logits = network.ensemble_logits(found["ensemble"], required(taps, "taps"), image.grid, patches)
            canvases["ensemble"].add(logits, patches)
    return maps.logits


def patch_predictions(names: Container[str]) -> list[str]:
    """Return the predictions among `names` that are made of patches."""
    return [name for name in PATCH_PREDICTIONS if name in names]


def patch_canvases(image: ImagePatches, sinks: Mapping[str, Sink], means: bool = False) -> dict[str, ScoreCanvas]:
    """Return a canvas for each prediction that is made of patches; see `ImagePatches.canvas`."""
    return {name: image.canvas(sinks[name], means) for name in patch_predictions(sinks)}
