"""The predictor: segments one image of any size that fits the memory, in one stage, averaged over turned images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import global2local, global_only, local2global
from engine.patches import ImagePatches, OnPatches
from imaging.pictures import shrink
from imaging.sources import Source, TurnedSource
from models.folding import Placement
from models.glnet import GLNet
from models.prepared import PreparedGLNet
from utils.canvas import RESULT_ROWS, FiniteScores, Sink
from utils.precision import PRECISIONS
from utils.selection import Coverage
from utils.settings import ContextScale, Settings
from utils.stages import Stage
from utils.tiling import Box, PatchGrid, Size, map_size
from utils.turns import TURNS, Turn

_INFER = {1: global_only.infer, 2: global2local.infer, 3: local2global.infer}
"""The inference of each stage."""


@dataclass(frozen=True)
class Predictor:
    """A network prepared for one stage, with settings: for validation in training, for evaluation and for prediction.

    For the attributes see `prepare`.
    """

    network: PreparedGLNet
    stage: Stage
    settings: Settings
    size_g: int
    turns: tuple[Turn, ...] = TURNS["none"]
    context: ContextScale | None = None

    @classmethod
    def prepare(
        cls,
        model: GLNet,
        stage: Stage,
        settings: Settings,
        size_g: int,
        turns: tuple[Turn, ...] = TURNS["none"],
        context: ContextScale | None = None,
    ) -> "Predictor":
        """Prepare a copy of the plain network for inference, with the settings' precision and device.

        Scores are averaged over the image turned in all `turns`. `size_g` is the side of the shrunk image in pixels;
        `context` gives it instead, by the size of the image.
        """
        placement = Placement(settings.device, PRECISIONS[settings.precision])
        return cls(PreparedGLNet(model.eval(), stage, placement), stage, settings, size_g, turns, context)

    @property
    def selects_patches(self) -> bool:
        """Whether the local branch computes some patches only, which the global prediction selects."""
        return self.stage.number > 1 and self.settings.selection is not None

    def patch_count(self, size: Size) -> int | None:
        """Return how many patches of an image of `size` are computed; None if that depends on its pixels."""
        if self.stage.number == 1:
            return 0
        if self.selects_patches:
            return None
        return len(self.turns) * len(PatchGrid.cover(size, self.settings.size_p, self.settings.min_overlap))

    @torch.inference_mode()
    def segment(
        self,
        image: Source,
        sinks: Mapping[str, Sink],
        *,
        global_image: Tensor | None = None,
        shared: Tensor | None = None,
        on_patches: OnPatches | None = None,
        means: bool = False,
        check: FiniteScores | None = None,
    ) -> Coverage:
        """Segment one image.

        The settings may select the patches that the local branch computes. The selection gives the local and ensemble
        scores of other pixels; if no patch is selected, every prediction is the global branch's.

        Args:
            image: the image.
            sinks: by name, the predictions that are requested (of `stage.predictions`); nothing else is computed. Each
                sink gets the scores (n_class, rows, W) of its prediction, from top to bottom.
            global_image: the image shrunk, (bands, h, w) uint8, if it is available.
            shared: the shrunk image whose maps are shared in place of the image's own, in all turns; of the same form.
            on_patches: called after each sub-batch.
            means: whether scores are means over the patches that cover a pixel. By default they are sums, as released.
                Over several turns they are always the mean over turns of such means, which are held on the host.
            check: gets all logits that become scores.

        Returns:
            The part of the image that was computed at full resolution, in all turns together.
        """
        watch = on_patches, check
        if len(self.turns) == 1:
            turned = TurnedSource(image, self.turns[0]) if self.turns[0] != Turn() else image
            if turned is not image or global_image is None:
                global_image = self._shrink(turned)
            return self._segment_turned(turned, global_image, shared, sinks, watch, means)
        totals: dict[str, Tensor] = {}
        coverage = Coverage()
        for turn in self.turns:
            turned = TurnedSource(image, turn)
            back = {name: _TurnedBackSink(turn, image.size, totals, name) for name in sinks}
            coverage += self._segment_turned(turned, self._shrink(turned), shared, back, watch, True)
        for name, sink in sinks.items():
            for top in range(0, image.size[0], RESULT_ROWS):
                sink(top, (totals[name][:, top : top + RESULT_ROWS] / len(self.turns)).to(self.settings.device))
        return coverage

    def _shrink(self, image: Source) -> Tensor:
        """Return the whole image, shrunk, (bands, h, w) uint8."""
        size = (self.size_g, self.size_g) if self.context is None else self.context.size(image.size)
        return shrink(image, size)

    def _segment_turned(
        self,
        image: Source,
        global_image: Tensor,
        shared: Tensor | None,
        sinks: Mapping[str, Sink],
        watch: tuple[OnPatches | None, FiniteScores | None],
        means: bool,
    ) -> Coverage:
        """Segment one image as it is, without turns; see `segment`, whose `on_patches` and `check` are `watch`."""
        patches = ImagePatches(image, self.settings, *watch)
        if shared is not None:
            patches.shared = self.settings.to_input(shared[None])
        x = self.settings.to_input(global_image[None])
        logits = _INFER[self.stage.number](self.network, x, patches, sinks, means)
        for name, sink in sinks.items():
            if logits is not None and (name == "global" or not patches.boxes):
                patches.enlarge(logits, sink)
        return patches.coverage()


class _TurnedBackSink:
    """A sink that adds the scores of a turned image, turned back, to a total on the host."""

    def __init__(self, turn: Turn, size: Size, totals: dict[str, Tensor], name: str) -> None:
        """Start a sink for an image of `size` that was turned; a missing total (n_class, H, W) starts at 0."""
        self.turn, self.size, self.totals, self.name = turn, size, totals, name

    def __call__(self, top: int, scores: Tensor) -> None:
        if self.name not in self.totals:
            self.totals[self.name] = torch.zeros((len(scores), *self.size))
        height, width = map_size(scores)
        box = self.turn.origin(Box(top, 0, height, width), self.size)
        box.of(self.totals[self.name]).add_(self.turn.undo(scores.float().cpu()))
