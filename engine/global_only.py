"""Stage 1: the global branch alone."""

from collections.abc import Mapping

from torch import Tensor

from dataset.base import Sample
from engine.patches import ImagePatches
from engine.terms import Terms, global_inputs, global_targets
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from utils.canvas import ArgmaxSink, Sink, enlarge
from utils.metrics import StageMetrics
from utils.settings import Settings


def training_step(model: GLNet, batch: list[Sample], settings: Settings, metrics: StageMetrics) -> Terms:
    """Add the gradients of loss(global logits), the whole batch in one pass; the optimizer is the caller's.

    Args:
        model: the network; its `global_` learns.
        batch: B samples with labels, of any sizes.
        settings: loss, sizes, device.
        metrics: counts the predictions.

    Returns:
        The terms of the loss.
    """
    logits = model.global_.logits(global_inputs(batch, settings))  # (B, n_class, size_g / 4, size_g / 4)
    loss = settings.share * settings.loss(logits, global_targets(batch, settings))
    settings.scaler.scale(loss).backward()
    for sample, scores in zip(batch, logits.detach().split(1), strict=True):
        height, width = sample.label.shape
        prediction = ArgmaxSink((height, width), settings.device)
        enlarge(scores, (height, width), prediction)
        metrics.update(settings.to_device(sample.label), {"global": prediction})
    return {settings.loss.term("global"): loss.detach()}


def infer(
    network: PreparedGLNet, x: Tensor, image: ImagePatches, sinks: Mapping[str, Sink], means: bool
) -> Tensor | None:
    """Return the global logits of one image, (1, n_class, size_g / 4, size_g / 4); no patch is computed.

    The parameters are those of `engine.global2local.infer`.
    """
    return network.global_maps(x, logits="global" in sinks, context=False, ensemble=False).logits
