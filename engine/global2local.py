"""Stage 2, global to local: the local branch reads patches and crops of the frozen global branch's maps."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dataset.base import Sample
from engine.counting import StepScores
from engine.patches import ImagePatches, TrainingPatches, computed_together, joint_sub_batches
from engine.terms import Terms, add_terms, global_inputs, outside_autocast
from models.efficient import branch_pyramid, ensemble_global_half, ensemble_taps, read_local
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from models.pyramid import FullPyramid, Pyramid, fitted, level_sizes
from models.sharing import crop_global, crop_pyramid
from utils.canvas import ScoreCanvas, Sink
from utils.errors import required
from utils.metrics import StageMetrics
from utils.settings import TrainingSettings
from utils.tiling import Size, map_size

PATCH_PREDICTIONS = ("local", "ensemble")
"""The predictions that are made of patches."""


def training_step(model: GLNet, batch: list[Sample], settings: TrainingSettings, metrics: StageMetrics) -> Terms:
    """Add the gradients of one step: loss(local) + loss(ensemble) + lambda MSE(local ps3, crop of the global ps3).

    Gradients of all sub-batches are added; each holds patches of one image or, if the settings mix them, of all images
    of the step. If the settings draw patches, only these are computed. The parameters and the result are those of
    `engine.global_only.training_step`.
    """
    total: Terms = {}
    for samples in computed_together(batch, settings):
        _add_gradients(model, samples, settings, metrics, total)
    return total


def _add_gradients(
    model: GLNet, samples: list[Sample], settings: TrainingSettings, metrics: StageMetrics, total: Terms
) -> None:
    """Add the gradients of images that share their sub-batches, and their terms to `total`; all else is freed."""
    read = (_read_globally(model, sample, settings, metrics) for sample in samples)
    images = [image for image in read if image is not None]
    for chosen in joint_sub_batches([image.image for image in images], settings.sub_batch_size):
        parts = [_Part(images[k], patches, x) for k, patches, x in chosen]
        terms, scores = _sub_batch_terms(model, parts, settings)
        with outside_autocast(settings):
            settings.scaler.scale(reduce(torch.add, terms.values())).backward()
        add_terms(total, terms)
        _add_scores(parts, scores)
    for image in images:
        with outside_autocast(settings):
            torch.autograd.backward(image.taps, image.leaf.grad)
        image.found.add_global(image.logits_g)
        image.found.count(metrics)


@dataclass(frozen=True)
class _GloballyRead:
    """An image of a training step, after the global branch."""

    image: TrainingPatches  # those that are computed
    logits_g: Tensor  # (1, n_class, size_g / 4, size_g / 4)
    maps: FullPyramid  # that the local branch reads, of the whole image
    taps: Tensor  # `ensemble_taps` of the global ps3, (1, 9 * n_class, size_g / 4, size_g / 4)
    leaf: Tensor  # the same, detached; gathers the gradients of all sub-batches
    found: StepScores


@dataclass(frozen=True)
class _Part:
    """The patches of one image in a sub-batch: a slice of its grid, and the network's input (n, bands, h, w)."""

    of: _GloballyRead
    patches: slice
    x: Tensor


def _read_globally(
    model: GLNet, sample: Sample, settings: TrainingSettings, metrics: StageMetrics
) -> _GloballyRead | None:
    """Let the frozen global branch read an image, and choose its patches; None if no patch is selected."""
    image = TrainingPatches(sample, settings)
    with torch.no_grad():
        maps = branch_pyramid(model.global_, global_inputs([sample], settings))
        logits_g = model.global_.head(maps.ps3)
    if not select_training_patches(image, logits_g, metrics):
        return None
    image.keep(image.draw())
    if not settings.share_maps:
        maps = maps.withheld()
    taps = ensemble_taps(model.ensemble, maps.ps3)
    leaf = taps.detach().requires_grad_()
    return _GloballyRead(image, logits_g, maps, taps, leaf, StepScores(image, metrics.matrices))


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
    model: GLNet, parts: Sequence[_Part], settings: TrainingSettings
) -> tuple[Terms, dict[str, Tensor]]:
    """Compute the loss of one sub-batch of n patches. All other tensors of it are freed when this function returns.

    Return the terms of the loss, with gradients, and the logits (n, n_class, h / 4, w / 4) by prediction, without.
    """
    x = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts])
    ps3 = branch_pyramid(model.local, x, _context(parts)).ps3  # (n, C, h / 4, w / 4)
    logits, half, distance = read_local(model, ps3, _ps3_crops(parts, map_size(ps3)))
    size = map_size(half)
    ensemble = half + torch.cat(
        [ensemble_global_half(part.of.leaf, part.of.image.grid, part.patches, size) for part in parts]
    )
    target = torch.cat([part.of.image.targets(part.patches, logits) for part in parts])
    terms = {
        settings.loss.term("local"): settings.loss(logits, target),
        settings.loss.term("ensemble"): settings.loss(ensemble, target),
        "fmreg": settings.lamb_fmreg * distance,
    }
    return terms, {"local": logits.detach(), "ensemble": ensemble.detach()}


def _add_scores(parts: Sequence[_Part], scores: dict[str, Tensor]) -> None:
    """Add the logits of the patches, (n, n_class, h, w) by prediction, to those of their images.

    As a function, it leaves no name behind that would keep the patches until the next sub-batch is computed.
    """
    for name, logits in scores.items():
        for part, own in zip(parts, logits.split([len(part.x) for part in parts]), strict=True):
            part.of.found.add(name, own, part.patches)


def _context(parts: Sequence[_Part]) -> Pyramid:
    """Return the global maps cropped to the patches; of several images resized to the maps of the local branch.

    Crops differ in size if images do. The local branch would resize them, too, but later, where it takes less.
    """
    crops = [crop_pyramid(part.of.maps, part.of.image.grid, part.patches) for part in parts]
    if len(crops) == 1:
        return crops[0]
    levels = zip(*(crop.levels for crop in crops), strict=True)  # c, ps0, ps1 and ps2, each of all images
    sizes = level_sizes(map_size(parts[0].x))
    return Pyramid.of(
        [torch.cat([fitted(x, size) for x in maps]) for *maps, size in zip(*level, sizes, strict=True)]
        for level in levels
    )


def _ps3_crops(parts: Sequence[_Part], size: Size) -> Tensor:
    """Return the global ps3 cropped to the patches, (n, C, h', w'); of several images resized to `size`."""
    crops = [crop_global(part.of.maps.ps3, part.of.image.grid, part.patches) for part in parts]
    return crops[0] if len(crops) == 1 else torch.cat([fitted(crop, size) for crop in crops])


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Compute the requested predictions of one image; `local` and `ensemble` get their scores here.

    `x` is the shrunk image, (1, bands, size_g, size_g), normalised. If the settings select patches, some of `image` are
    left. With `means` scores are means over the patches that cover a pixel, else sums. Return the global logits (1,
    n_class, size_g / 4, size_g / 4); None if they are not needed.
    """
    requested = patch_predictions(sinks)
    if not requested:
        return network.global_maps(x, logits="global" in sinks, context=False, ensemble=False).logits
    logits_g, context, taps = read_globally(
        network, x, image, logits="global" in sinks, ensemble="ensemble" in requested
    )
    if context is None:
        return logits_g
    canvases = patch_canvases(image, sinks, means)
    for patches, x_p in image:
        found = network.local_maps(x_p, context, image.grid, patches, requested)
        if "local" in found:
            canvases["local"].add(found["local"], patches)
        if "ensemble" in found:
            logits = network.ensemble_logits(found["ensemble"], required(taps, "taps"), image.grid, patches)
            canvases["ensemble"].add(logits, patches)
    return logits_g


def read_globally(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, *, logits: bool, ensemble: bool
) -> tuple[Tensor | None, Pyramid | None, Tensor | None]:
    """Run the global branch on the shrunk image `x`, and select patches by its logits if the settings do.

    Return its logits, None if neither `logits` requests them nor patches are selected; and what the patches read: the
    shared maps, and if `ensemble` requests it the taps, both None if no patch is left.
    """
    selects, own = image.settings.selection is not None, image.shared is None
    maps = given = network.global_maps(x, logits=logits or selects, context=own, ensemble=own and ensemble)
    if selects and not image.select_patches(required(maps.logits, "logits")):
        return maps.logits, None, None
    if image.shared is not None:
        given = network.global_maps(image.shared, logits=False, context=True, ensemble=ensemble)
    context, taps = required(given.context, "context"), given.taps
    if not image.settings.share_maps:
        context, taps = context.withheld(), None if taps is None else torch.zeros_like(taps)
    return maps.logits, context, taps


def patch_predictions(names: Container[str]) -> list[str]:
    """Return the predictions among `names` that are made of patches."""
    return [name for name in PATCH_PREDICTIONS if name in names]


def patch_canvases(image: ImagePatches, sinks: Mapping[str, Sink], means: bool = False) -> dict[str, ScoreCanvas]:
    """Return a canvas for each prediction that is made of patches; see `ImagePatches.canvas`."""
    return {name: image.canvas(sinks[name], means) for name in patch_predictions(sinks)}
