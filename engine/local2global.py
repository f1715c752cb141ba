"""Stage 3, local to global: the refined branch reads the shrunk image and the local maps merged into its frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dataset.base import Sample
from engine.counting import StepScores
from engine.global2local import patch_canvases, patch_predictions, read_globally, select_training_patches
from engine.patches import ImagePatches, TrainingPatches
from engine.terms import Terms, add_terms, global_inputs, global_targets, outside_autocast
from models.efficient import branch_logits, branch_maps, branch_pyramid, conv_ps3, ensemble_global_half, read_refined
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from models.pyramid import Levels, Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.canvas import Sink
from utils.errors import required
from utils.metrics import StageMetrics
from utils.settings import TrainingSettings
from utils.tiling import map_size


def training_step(model: GLNet, batch: list[Sample], settings: TrainingSettings, metrics: StageMetrics) -> Terms:
    """Add the gradients of one step: loss(refined logits) + the sum over sub-batches of loss(ensemble).

    Local maps are constants here, and those of all patches are merged; if the settings draw patches, the ensemble's
    loss reads these. Each ensemble sub-batch backpropagates into a detached copy of the taps of its
    image's refined ps3. The gradient that gathers there goes through the refined branch once, with that of the global
    loss. The parameters and the result are those of `engine.global_only.training_step`.
    """
    images = [TrainingPatches(sample, settings) for sample in batch]
    inputs = global_inputs(batch, settings)  # (B, bands, size_g, size_g)
    merged, kept = _local_maps(model, inputs, images, metrics)
    # no name is given to what only the backward pass needs: it is freed on its way
    # (B, n_class, size_g / 4, size_g / 4) and (B, 9 * n_class, size_g / 4, size_g / 4)
    logits_g, taps = read_refined(model, branch_pyramid(model.refined, inputs, merged).ps3)
    del merged
    loss = settings.share * settings.loss(logits_g, global_targets(batch, settings))
    total: Terms = {}
    add_terms(total, {settings.loss.term("global"): loss})
    gradient = torch.zeros_like(taps)
    of_images = zip(kept, taps.detach().split(1), gradient.split(1), logits_g.detach().split(1), strict=True)
    for maps, own_taps, own_gradient, scores in of_images:
        leaf = own_taps.clone().requires_grad_()
        leaf.grad = own_gradient
        _train_ensemble(model, images.pop(0), maps, leaf, scores, total=total, metrics=metrics)
    with outside_autocast(settings):
        torch.autograd.backward([settings.scaler.scale(loss), taps], [None, gradient])
    return total


def _train_ensemble(
    model: GLNet,
    image: TrainingPatches,
    maps: "_KeptMaps",
    taps: Tensor,
    logits_g: Tensor,
    *,
    total: Terms,
    metrics: StageMetrics,
) -> None:
    """Add the gradients of the ensemble's loss of one image, sub-batch by sub-batch, and count its predictions.

    The terms of the loss are added to `total`. An image without patches is left out: its predictions are counted
    already. `taps` is a leaf with `ensemble_taps` of the image, (1, 9 * n_class, size_g / 4, size_g / 4).
    """
    if not image.boxes:
        return
    settings = image.settings
    found = StepScores(image, ("ensemble", "global"))
    context = tuple(x.to(settings.device) for x in maps.context)
    weight, bias = model.ensemble.local_weight, model.ensemble.bias
    for patches, kept in zip(image.grid.sub_batches(settings.sub_batch_size), maps.local, strict=True):
        ps2 = tuple(x.to(settings.device) for x in kept)
        crops = tuple(crop_global(x, image.grid, patches) for x in context)
        half = conv_ps3(model.local.pyramid, ps2, weight, bias, crops)
        logits = half + ensemble_global_half(taps, image.grid, patches, map_size(half))  # (n, n_class, h / 4, w / 4)
        term = settings.loss(logits, image.targets(patches, logits))
        with outside_autocast(settings):
            settings.scaler.scale(term).backward()
        add_terms(total, {settings.loss.term("ensemble"): term})
        found.add("ensemble", logits.detach(), patches)
    found.add_global(logits_g)
    found.count(metrics)


@dataclass
class _KeptMaps:
    """What the ensemble reads of the frozen branches' maps of one image, on the host.

    The ensemble's weights learn, so its part of the logits alone does not do. But the maps that ps3 is computed from
    take a third of the memory of ps3, and folding both convolutions (`conv_ps3`) costs less than computing ps3.
    """

    context: Levels = ()  # ps2 of `global_`, (1, 128, h, w) each
    local: list[Levels] = field(default_factory=list)  # ps2 of `local`, of each sub-batch (n, 128, h, w) each

    def add(self, ps2: Levels, wanted: Sequence[int]) -> None:
        """Add the `wanted` patches of one sub-batch, whose maps `ps2` are (n, 128, h, w) each."""
        if wanted:
            self.local.append(tuple((x if len(wanted) == len(x) else x[wanted]).cpu() for x in ps2))

    def regroup(self, size: int) -> None:
        """Make sub-batches of `size` patches of what was added."""
        whole = [torch.cat(level) for level in zip(*self.local, strict=True)]
        self.local = list(zip(*(level.split(size) for level in whole), strict=True))


@torch.no_grad()
def _local_maps(
    model: GLNet, inputs: Tensor, images: list[TrainingPatches], metrics: StageMetrics
) -> tuple[Pyramid, list[_KeptMaps]]:
    """Run the frozen global and local branches on a batch of shrunk images, (B, bands, size_g, size_g).

    If the settings select patches, some of them are left; if they draw, the drawn ones are left in the end. Return the
    merged local maps, (B, C, H, W) each, 0 for images without patches; and the maps that are kept of each image.
    """
    settings = images[0].settings
    mosaic: Mosaic | None = None
    kept: list[_KeptMaps] = []
    for i, (x, image) in enumerate(zip(inputs.split(1), images, strict=True)):
        kept.append(_KeptMaps())
        context = branch_maps(model.global_, x)
        selects = settings.selection is not None
        if selects and not select_training_patches(image, branch_logits(model.global_, context), metrics):
            continue
        if not settings.share_maps:
            context = context.withheld()
        mosaic = mosaic or Mosaic(len(images), context)
        kept[-1].context = tuple(x.cpu() for x in context.ps2)
        found, drawn = StepScores(image, ("local",)), image.draw()
        for patches, x_p in image:
            crops = crop_pyramid(context, image.grid, patches)
            maps = branch_maps(model.local, x_p, crops)
            maps.visit(partial(mosaic.add, i, image.grid, patches))
            found.add("local", branch_logits(model.local, maps, crops), patches)
            kept[-1].add(maps.ps2, [k - patches.start for k in drawn if patches.start <= k < patches.stop])
            del maps, crops  # so that they are freed before the next ones are computed
        found.count(metrics)
        image.keep(drawn)
        if image.drawn:
            kept[-1].regroup(settings.sub_batch_size)
    if mosaic is None:
        return context.map(lambda x: x.new_zeros((len(images), *x.shape[1:]))), kept
    return mosaic.merged(), kept


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Compute the requested predictions of one image: patches first, then the refined branch on their merged maps.

    Of each patch the logits and the local half of the ensemble are kept, on the host, n_class channels each. So memory
    on the device does not grow with the number of patches. Canvases are made after the maps that the branches share are
    freed. The refined logits go to their sink before other scores do. For the parameters see
    `engine.global2local.infer`. If no patch is selected, return the logits of the global branch, else None.
    """
    requested = patch_predictions(sinks)
    logits_g, context, _ = read_globally(network, x, image, logits=False, ensemble=False)
    if context is None:
        return logits_g
    mosaic = Mosaic(1, context)
    kept: list[tuple[slice, dict[str, Tensor]]] = []
    for patches, x_p in image:
        merge = partial(mosaic.add, 0, image.grid, patches)
        found = network.local_maps(x_p, context, image.grid, patches, requested, on_map=merge)
        kept.append((patches, {name: scores.cpu() for name, scores in found.items()}))
    del context
    refined = network.refined_maps(x, mosaic.merged(), logits="global" in sinks, ensemble="ensemble" in requested)
    del mosaic, merge
    if "global" in sinks:
        image.enlarge(required(refined.logits, "logits"), sinks["global"])
    canvases = patch_canvases(image, sinks, means)
    device = image.settings.device
    if "local" in requested:
        for patches, found in kept:
            canvases["local"].add(found["local"].to(device), patches)
    if "ensemble" in requested:
        taps = required(refined.taps, "taps")
        for patches, found in kept:
            logits = network.ensemble_logits(found["ensemble"].to(device), taps, image.grid, patches)
            canvases["ensemble"].add(logits, patches)
    return None
