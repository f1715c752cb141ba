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
from utils.scenes import BAND, SCENE_SIZE, Emit, Rows, SceneCanvas, scene_grid
from utils.sources import Held, Part, Source, Turned, hold
from utils.stages import Stage
from utils.tiling import Box, PatchGrid, Size
from utils.turns import TURNS, Turn


class Mean:
    """A sink that divides the sums of patches' scores by how many patches cover each pixel, and passes them on."""

    def __init__(self, grid: PatchGrid, sink: Sink) -> None:
        self.rows, self.columns = grid.rows.counts(), grid.columns.counts()
        self.sink = sink

    def __call__(self, top: int, scores: Tensor) -> None:
        counts = torch.outer(self.rows[top : top + scores.shape[1]], self.columns)
        self.sink(top, scores / counts.to(scores.device))


def _mean_of(name: str, size: Size, settings: Settings, sink: Sink) -> Sink:
    """A sink of the sums of prediction `name` that gives `sink` their mean: the global one covers each pixel once."""
    return sink if name == "global" else Mean(PatchGrid.cover(size, settings.size_p, settings.min_overlap), sink)


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
) -> None:
    """Segment `source` as `stage` does, averaged over `turns` of the image itself.

    With one turn, `sinks` get what `segment` gives: sums over the patches. With several they get the mean over turns of
    the mean over the patches, all of which is held on the host. `on_patches` is told how many patches are done.
    """
    if len(turns) == 1:
        image = Turned(source, turns[0]) if turns[0] != Turn() else source
        segment(network, stage, image, shrink(image, (size_g, size_g)), settings, sinks, on_patches)
        return
    totals: dict[str, Tensor] = {}
    for turn in turns:
        turned = Turned(source, turn)
        back = {
            name: _mean_of(name, turned.size, settings, _TurnedBack(turn, source.size, totals, name)) for name in sinks
        }
        segment(network, stage, turned, shrink(turned, (size_g, size_g)), settings, back, on_patches)
    for name, sink in sinks.items():
        for top in range(0, source.size[0], BAND):
            sink(top, (totals[name][:, top : top + BAND] / len(turns)).to(settings.device))


def segment_averaged(turns: tuple[Turn, ...]) -> Callable[..., None]:
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
    ) -> None:
        segment_turned(network, stage, Held(image), global_image.shape[-1], settings, sinks, turns)

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

    def patches(self, size: Size) -> int:
        """How many patches are segmented of an image of `size`, in mode 1 none."""
        if self.stage.number == 1:
            return 0
        scenes = scene_grid(size, self.scene_size)
        grid = PatchGrid.cover(scenes.patch, self.settings.size_p, self.settings.min_overlap)
        return len(scenes) * len(self.turns) * len(grid)

    def sums(self, source: Source, sink: Sink, on_patches: Callable[[int], None] | None) -> None:
        """The scores of a scene: what `segment_turned` gives."""
        segment_turned(
            self.network,
            self.stage,
            hold(source),
            self.size_g,
            self.settings,
            {self.headline: sink},
            self.turns,
            on_patches,
        )

    def means(self, source: Source, sink: Sink, on_patches: Callable[[int], None] | None) -> None:
        """The scores of a scene, divided by how many patches cover a pixel."""
        self.sums(source, self.mean_sink(source.size, sink), on_patches)

    def mean_sink(self, size: Size, sink: Sink) -> Sink:
        """A sink for `sums` that gives `sink` means."""
        return sink if len(self.turns) > 1 else _mean_of(self.headline, size, self.settings, sink)


def reduce_scores(scores: Tensor, probabilities: bool) -> Rows:
    """The result that mean `scores` (n_class, rows, W) give."""
    ids = Ids(tuple(scores.shape[1:]), scores.device)
    ids(0, scores)
    shares = scores.float().softmax(0).half().cpu() if probabilities else None
    return Rows(ids.ids.cpu(), shares)


class _OneScene:
    """A sink for the sums of a single scene: ids are those of the sums themselves, as in evaluation."""

    def __init__(self, method: Method, size: Size, emit: Emit, probabilities: bool) -> None:
        self.emit = emit
        self.means = method.mean_sink(size, self._keep) if probabilities else None
        self.kept: Tensor | None = None

    def _keep(self, top: int, scores: Tensor) -> None:
        self.kept = reduce_scores(scores, True).probabilities

    def __call__(self, top: int, scores: Tensor) -> None:
        rows = reduce_scores(scores, False)
        if self.means is not None:
            self.means(top, scores)
            rows.probabilities = self.kept
        self.emit(top, rows)


@torch.inference_mode()
def segment_any(
    method: Method,
    source: Source,
    emit: Emit,
    probabilities: bool = False,
    on_patches: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
) -> None:
    """Segment an image of any size; `emit` gets its rows as they become final.

    Processes share the scenes of one image: all must call this, the main one alone emits, and the others leave scores
    in `folder`, which all see. Raises InputError, in all of them, where one cannot read.
    """
    grid = scene_grid(source.size, method.scene_size)
    if len(grid) == 1:
        method.sums(source, _OneScene(method, source.size, emit, probabilities), on_patches)
        return
    canvas = SceneCanvas(grid, lambda scores: reduce_scores(scores, probabilities), emit)
    boxes = grid.boxes()
    for first in range(0, len(boxes), ranks.world):
        own, failure = first + ranks.rank, None
        try:
            if own < len(boxes):
                scene = Part(source, boxes[own])
                if ranks.main:
                    canvas.begin(own)
                    method.means(scene, canvas, on_patches)
                else:
                    with ScoreFile(folder, own) as scores:
                        method.means(scene, scores, on_patches)
        except InputError as error:
            failure = str(error), error.kind
        if failures := [one for one in ranks.gather(failure) if one]:
            raise InputError(*failures[0])
        for other in range(first + 1, min(first + ranks.world, len(boxes))) if ranks.main else ():
            canvas.begin(other)
            ScoreFile.replay(folder, other, canvas)


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
