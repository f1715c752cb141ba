"""Where a prediction is unsure: the entropy of the classes' probabilities, and whether two branches disagree."""

import math

import torch
from torch import Tensor

from engine.predictor import Predictor
from utils.canvas import ArgmaxSink, Sink
from utils.tiling import Size

BANDS = ("entropy", "disagreement")
"""The measures; mode 1 has no local prediction, and so the first alone."""


def bands_of_mode(mode: int) -> tuple[str, ...]:
    """Return the measures that a mode gives."""
    return BANDS[:1] if mode == 1 else BANDS


class DisagreementSinks:
    """Sinks for all predictions of one image: the headline's scores get a channel that is 1 where two others disagree.

    The ids of the global and the local prediction are kept, 2 bytes a pixel. They come before the headline's scores.
    """

    def __init__(self, size: Size, device: torch.device, sink: Sink) -> None:
        """`sink` gets the headline's scores with the further channel, (n_class + 1, rows, W)."""
        self.kept = {name: ArgmaxSink(size, device) for name in ("global", "local")}
        self.sink = sink

    def headline(self, top: int, scores: Tensor) -> None:
        """Take scores of the headline, (n_class, rows, W)."""
        one, other = (kept.ids[top : top + scores.shape[1]] for kept in self.kept.values())
        self.sink(top, torch.cat([scores, (one != other)[None].to(scores)]))

    def rounds(self, predictor: Predictor) -> list[dict[str, Sink]]:
        """Return the sinks of each call of the predictor. Stage 2 would give the global prediction last."""
        first: dict[str, Sink] = {"global": self.kept["global"]}
        others: dict[str, Sink] = {"local": self.kept["local"], predictor.stage.headline: self.headline}
        return [first, others] if predictor.stage.number == 2 else [{**first, **others}]


def measure_uncertainty(scores: Tensor, disagreement: Tensor | None) -> Tensor:
    """Return the measures of rows as bytes, 0..255, on the host.

    Args:
        scores: (n_class, rows, W), logits.
        disagreement: (rows, W), 0..1, the share of disagreement; None if there is no local prediction.

    Returns:
        (1 or 2, rows, W) uint8: the entropy of the softmax over log(n_class), and the disagreement.
    """
    logs = scores.float().log_softmax(0)
    entropy = -(logs.exp() * logs).sum(0) / math.log(max(2, len(scores)))
    shares = [entropy] if disagreement is None else [entropy, disagreement.float()]
    return torch.stack(shares).mul_(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
