"""The engine beyond one forward pass: turned images averaged, large images as scenes, results row by row.

Nothing here parses options or knows a file format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dataset.pictures import shrink
from helper import segment
from models.glnet import GLNet
from models.inference import PreparedGLNet
from utils.canvas import Ids, Sink
from utils.distributed import ALONE, Ranks
from utils.errors import InputError
from utils.patches import Settings
from utils.regions import Effort
from utils.scenes import BAND, SCENE_SIZE, Emit, Rows, SceneCanvas, scene_grid
from utils.sources import Held, Part, Source, Turned, hold
from utils.stages import Stage
from utils.tiling import Box, PatchGrid, Size
from utils.turns import TURNS, Turn


class _TurnedBack:
    """A sink that adds the scores of a turned image, turned back, to a total on the host."""

    def __init__(self, turn: Turn, size: Size, totals: dict[str, Tensor], name: str) -> None:
        self.turn, self.size, self.totals, self.name = turn, size, totals, name

    def __call__(self, top: int, scores: Tensor) -> None:
        if self.name not in self.totals:
            self.totals[self.name] = torch.zeros(len(scores), *self.size)
        box = self.turn.origin(Box(top, 0, *scores.shape[1:]), self.size)
        box.of(self.totals[self.name]).add_(self.turn.undo(scores.float().cpu()))


@torch.inference_mode()
def segment_turned(
    network: GLNet | PreparedGLNet,
    stage: Stage,
    source: Source,
    size_g: int,
    settings: Settings,
    sinks: Mapping[str, Sink],
    turns: tuple[Turn, ...] = TURNS["none"],
    on_patches: Callable[[int], None] | None = None,
    means: bool = False,
) -> Effort:
    """Segment `source` as `stage` does, averaged over `turns` of the image itself.

    With one turn, this is `segment`: `sinks` get sums over the patches, or their `means`. With several they get the
    mean over turns of the mean over the patches, all of which is held on the host. `on_patches` is told how many
    patches are done. Returns how much was looked at, in all turns together.
    """
    if len(turns) == 1:
        image = Turned(source, turns[0]) if turns[0] != Turn() else source
        return segment(network, stage, image, shrink(image, (size_g, size_g)), settings, sinks, on_patches, means)
    totals: dict[str, Tensor] = {}
    effort = Effort()
    for turn in turns:
        turned = Turned(source, turn)
        back = {name: _TurnedBack(turn, source.size, totals, name) for name in sinks}
        effort += segment(network, stage, turned, shrink(turned, (size_g, size_g)), settings, back, on_patches, True)
    for name, sink in sinks.items():
        for top in range(0, source.size[0], BAND):
            sink(top, (totals[name][:, top : top + BAND] / len(turns)).to(settings.device))
    return effort


def segment_averaged(turns: tuple[Turn, ...]) -> Callable[..., Effort]:
    """`helper.segment`, averaged over `turns`, for evaluation; with one turn `helper.segment` itself."""
    if turns == TURNS["none"]:
        return segment

    def averaged(
        network: GLNet | PreparedGLNet,
        stage: Stage,
        image: Tensor,
        global_image: Tensor,
        settings: Settings,
        sinks: Mapping[str, Sink],
    ) -> Effort:
        return segment_turned(network, stage, Held(image), global_image.shape[-1], settings, sinks, turns)

    return averaged


@dataclass(frozen=True)
class Method:
    """How any image is segmented: by its stage's headline, in scenes with sides of at most `scene_size` pixels."""

    network: GLNet | PreparedGLNet
    stage: Stage
    settings: Settings
    size_g: int
    scene_size: int = SCENE_SIZE
    turns: tuple[Turn, ...] = TURNS["none"]

    @property
    def headline(self) -> str:
        return self.stage.predictions[-1]

    @property
    def looks(self) -> bool:
        """Whether it is looked into the image where to cut patches, coarse to fine."""
        return self.stage.number > 1 and self.settings.coarse_to_fine is not None

    def patches(self, size: Size) -> int | None:
        """How many patches are segmented of an image of `size`, in mode 1 none; None where that depends on it."""
        if self.stage.number == 1:
            return 0
        if self.looks:
            return None
        scenes = scene_grid(size, self.scene_size)
        grid = PatchGrid.cover(scenes.patch, self.settings.size_p, self.settings.min_overlap)
        return len(scenes) * len(self.turns) * len(grid)

    def scores(self, source: Source, sink: Sink, on_patches: Callable[[int], None] | None, means: bool) -> Effort:
        """The scores of a scene: what `segment_turned` gives."""
        return segment_turned(
            self.network,
            self.stage,
            hold(source),
            self.size_g,
            self.settings,
            {self.headline: sink},
            self.turns,
            on_patches,
            means,
        )


def reduce_scores(scores: Tensor, probabilities: bool) -> Rows:
    """The result that mean `scores` (n_class, rows, W) give."""
    ids = Ids(tuple(scores.shape[1:]), scores.device)
    ids(0, scores)
    shares = scores.float().softmax(0).half().cpu() if probabilities else None
    return Rows(ids.ids.cpu(), shares)


@torch.inference_mode()
def segment_any(
    method: Method,
    source: Source,
    emit: Emit,
    probabilities: bool = False,
    on_patches: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
) -> Effort:
    """Segment an image of any size; `emit` gets its rows as they become final. Returns how much was looked at.

    Without `probabilities` the ids of a single scene are those of sums over patches, as in evaluation. Everything else
    is of means over patches, whose ids are the same up to ties by rounding.

    Processes share the scenes of one image: all must call this, the main one alone emits, and the others leave scores
    in `folder`, which all see. Raises InputError, in all of them, where one cannot read.
    """
    grid = scene_grid(source.size, method.scene_size)
    if len(grid) == 1:

        def pass_on(top: int, scores: Tensor) -> None:
            emit(top, reduce_scores(scores, probabilities))

        return method.scores(source, pass_on, on_patches, means=probabilities)
    effort = Effort()
    canvas = SceneCanvas(grid, lambda scores: reduce_scores(scores, probabilities), emit)
    boxes = grid.boxes()
    for first in range(0, len(boxes), ranks.world):
        own, failure = first + ranks.rank, None
        try:
            if own < len(boxes):
                scene = Part(source, boxes[own])
                if ranks.main:
                    canvas.begin(own)
                    effort += method.scores(scene, canvas, on_patches, means=True)
                else:
                    with ScoreFile(folder, own) as scores:
                        effort += method.scores(scene, scores, on_patches, means=True)
        except InputError as error:
            failure = str(error), error.kind
        if failures := [one for one in ranks.gather(failure) if one]:
            raise InputError(*failures[0])
        for other in range(first + 1, min(first + ranks.world, len(boxes))) if ranks.main else ():
            canvas.begin(other)
            ScoreFile.replay(folder, other, canvas)
    return sum(ranks.gather(effort), Effort())


class ScoreFile:
    """A sink that keeps the scores of scene `index` in a file in `folder`, for another process to replay."""

    def __init__(self, folder: Path, index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path(folder, index).open("wb")

    @staticmethod
    def path(folder: Path, index: int) -> Path:
        return folder / f"scene{index}.npy"

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __call__(self, top: int, scores: Tensor) -> None:
        np.save(self._file, scores.float().cpu().numpy())  # arrays one after the other

    @classmethod
    def replay(cls, folder: Path, index: int, sink: Sink) -> None:
        """Give `sink` what the other process kept, and remove the file."""
        path = cls.path(folder, index)
        with path.open("rb") as file:
            end, top = path.stat().st_size, 0
            while file.tell() < end:
                scores = torch.from_numpy(np.load(file))
                sink(top, scores)
                top += scores.shape[1]
        path.unlink()
