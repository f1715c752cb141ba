"""Stage 1, global only: the global branch segments the shrunk image."""

from collections.abc import Mapping

from torch import Tensor

from dataset.base import Sample
from engine.patches import ImagePatches
from engine.terms import Terms, global_inputs, global_targets, outside_autocast
from models.efficient import branch_logits, branch_maps
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from utils.canvas import ArgmaxSink, Sink, enlarge
from utils.errors import required
from utils.metrics import StageMetrics
from utils.settings import TrainingSettings
from utils.tiling import map_size


def training_step(model: GLNet, batch: list[Sample], settings: TrainingSettings, metrics: StageMetrics) -> Terms:
    """Add the gradients of loss(global logits), the whole batch in one pass, without a step of the optimizer.

    Return the terms of the loss, each the sum over the step, detached.
    """
    # (B, n_class, size_g / 4, size_g / 4)
    logits = branch_logits(model.global_, branch_maps(model.global_, global_inputs(batch, settings)))
    loss = settings.share * settings.loss(logits, global_targets(batch, settings))
    with outside_autocast(settings):
        settings.scaler.scale(loss).backward()
    for sample, scores in zip(batch, logits.detach().split(1), strict=True):
        label = settings.to_device(required(sample.label, "label"))
        prediction = ArgmaxSink(map_size(label), settings.device)
        enlarge(scores, map_size(label), prediction, upsample=settings.upsample)
        metrics.update(label, {"global": prediction})
    return {settings.loss.term("global"): loss.detach()}


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Return the global logits of one image, (1, n_class, size_g / 4, size_g / 4); no patch is computed.

    The parameters are those of `engine.global2local.infer`.
    """
    return network.global_maps(x, logits="global" in sinks, context=False, ensemble=False).logits
