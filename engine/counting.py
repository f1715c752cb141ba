"""The training metric of one image: what the patches of a step predict is counted against the label."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.patches import TrainingPatches
from utils.canvas import ArgmaxSink, enlarged_boxes
from utils.metrics import StageMetrics


class StepScores:
    """The predictions of one training step on one image.

    If no patch was left out by drawing, scores are merged as in evaluation, and the whole image counts. If patches were
    drawn, the pixels that they cover count, once each, by the sum of their scores, and nothing as large as the image is
    made.
    """

    def __init__(self, image: TrainingPatches, names: Iterable[str]) -> None:
        """Start without scores; of the predictions called `names` all but `global` are made of patches."""
        self.image = image
        self.found = {name: image.ids() for name in names}
        self.local = [name for name in self.found if name != "global"]
        self.canvases = {} if image.drawn else {name: image.canvas(self.found[name]) for name in self.local}
        self.logits: dict[str, list[Tensor]] = {name: [] for name in self.local}
        self.logits_g: Tensor | None = None

    def add(self, name: str, logits: Tensor, patches: slice) -> None:
        """Add the logits (n, n_class, h, w) of the next patches, n of them, to a prediction."""
        if self.image.drawn:
            self.logits[name] += logits.split(1)
        else:
            self.canvases[name].add(logits, patches)

    def add_global(self, logits: Tensor) -> None:
        """Add the global logits of the image, (1, n_class, h, w)."""
        if self.image.drawn:
            self.logits_g = logits
        else:
            self.image.enlarge(logits, self.found["global"])

    def count(self, metrics: StageMetrics) -> None:
        """Count all predictions, of which all patches are added."""
        if not self.image.drawn:
            metrics.update(self.image.label(), self.found)
            return
        label = self.image.labels_once()
        for name in self.local:
            metrics.matrices[name].update(label, self._ids(partial(self._summed, self.logits[name])))
        if self.logits_g is not None:
            give = enlarged_boxes(self.logits_g, self.image.size, self.image.settings.upsample)
            metrics.matrices["global"].update(label, self._ids(lambda k: give(self.image.boxes[k])))

    def _ids(self, scores: Callable[[int], Tensor]) -> Tensor:
        """Return the class ids of all patches, (n, height, width) uint8, from a function of each patch's scores."""
        found = [ArgmaxSink(self.image.grid.patch, self.image.settings.device) for _ in self.image.boxes]
        for k, sink in enumerate(found):
            sink(0, scores(k))
        return torch.stack([sink.ids for sink in found])

    def _summed(self, logits: list[Tensor], k: int) -> Tensor:
        """Return the scores of patch `k`, (n_class, height, width), with those of later patches where these overlap.

        Pixels that an earlier patch covers count there.
        """
        own = self.image.boxes[k]
        total = self._enlarged(logits[k])
        for box, other in zip(self.image.boxes[k + 1 :], logits[k + 1 :], strict=True):
            if shared := own.overlap(box):
                shared.within(own).of(total).add_(shared.within(box).of(self._enlarged(other)))
        return total

    def _enlarged(self, logits: Tensor) -> Tensor:
        """Return the logits (1, n_class, h, w) of one patch at its size in pixels, (n_class, height, width)."""
        return F.interpolate(logits, size=self.image.grid.patch, mode=self.image.settings.upsample)[0]
