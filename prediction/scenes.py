"""Scenes: parts of a large image that are segmented one by one, each with a global context of its own.

An image that `--context scale` shrinks to few enough pixels is one scene. Scenes overlap. Across an overlap the scores
change linearly from those of one scene to those of the next.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.patches import OnPatches
from engine.predictor import Predictor
from imaging.sources import Source, load_in_memory
from prediction.read_ahead import read_ahead
from prediction.uncertainty import DisagreementSinks, bands_of_mode, measure_uncertainty
from utils.canvas import RESULT_ROWS, ArgmaxSink, FiniteScores, Sink
from utils.classes import IGNORED
from utils.distributed import ALONE, Ranks
from utils.errors import InputError, required
from utils.precision import not_finite
from utils.selection import Coverage
from utils.settings import ContextScale, ViewScale
from utils.tiling import Axis, Box, PatchGrid, Size

SCENE_SIZE = 5000
"""Pixels of the longest side for which results are published."""

OVERLAPS_PER_SCENE = 16
"""Neighbouring scenes overlap by the longest side of a scene divided by this."""

OVERLAPS_PER_VIEW = 4
"""The same of scenes with `--context scale`."""


class Rows(NamedTuple):
    """The result in some rows of an image, on the host.

    Attributes:
        ids: (rows, W) uint8.
        probabilities: (n_class, rows, W) float16; None if they are not requested.
        uncertainty: (1 or 2, rows, W) uint8; see `prediction.uncertainty`; None if it is not requested.
    """

    ids: Tensor
    probabilities: Tensor | None = None
    uncertainty: Tensor | None = None

    def leave_out(self, valid: Tensor | None) -> None:
        """Mark pixels without data, where `valid`, (rows, W) bool, is false; None is all true."""
        if valid is not None:
            self.ids[~valid] = IGNORED
            if self.probabilities is not None:
                self.probabilities[:, ~valid] = torch.nan
            if self.uncertainty is not None:
                self.uncertainty[:, ~valid] = 0

    def tensors(self) -> list[Tensor]:
        """Return those of these tensors that are requested, (..., rows, W) each."""
        return [x for x in self if x is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Return rows whose tensors are `change` of these."""
        return Rows(change(self.ids), *(None if x is None else change(x) for x in self[1:]))


Emit = Callable[[int, Rows], None]
"""Takes rows of a result, from the top of an image to its bottom: the first row's number, and the rows."""


def scene_grid(size: Size, scene_size: int, context: ContextScale | None = None) -> PatchGrid:
    """Return the scenes of an image: as few as possible, of one size, overlapping by a sixteenth of `scene_size`.

    With `--context scale`, by `context`, scenes have the largest sides whose views fit, and overlap by a quarter of
    these. Along an axis at most two scenes share a pixel. An image without a longer side is one scene.
    """
    longest, parts = (scene_size, scene_size), OVERLAPS_PER_SCENE
    if isinstance(context, ViewScale):
        longest, parts = context.scene(size), OVERLAPS_PER_VIEW
    return PatchGrid(*(_scene_axis(side, most, most // parts) for side, most in zip(size, longest, strict=True)))


def _scene_axis(side: int, longest: int, overlap: int) -> Axis:
    """Return the scenes along an axis of `side` pixels."""
    if side <= longest:
        return Axis.cover(side, side, overlap)
    count = -(-(side - overlap) // (longest - overlap))
    return Axis.cover(side, -(-(side + (count - 1) * overlap) // count), overlap)


def ramps(axis: Axis) -> list[Tensor]:
    """Return for each scene along `axis` weights that rise and fall over the overlaps, (scene's length,) float32.

    At every pixel of the axis the weights of all scenes add up to 1.
    """
    weights = [torch.ones(axis.patch) for _ in axis.starts]
    for k in range(len(weights) - 1):
        shared = axis.starts[k] + axis.patch - axis.starts[k + 1]
        rising = (torch.arange(shared) + 0.5) / shared
        weights[k][axis.patch - shared :] = 1 - rising
        weights[k + 1][:shared] = rising
    return weights


class SceneCanvas:
    """Joins the scores of overlapping scenes.

    Scenes come in the grid's order, each from top to bottom; the canvas is the sink of the scene that `begin` named.
    Scores that are final become results at once. Other scores, where scenes overlap, are held: the right edge of one
    scene, and one strip across the image. Results are held for one row of scenes.
    """

    def __init__(self, grid: PatchGrid, reduce: Callable[[Tensor], Rows], emit: Emit) -> None:
        """Start before the first scene.

        `reduce` turns final scores (n_class, rows, w) into results; `emit` gets those of each row of scenes.
        """
        self.grid, self.reduce, self.emit = grid, reduce, emit
        self.weights = ramps(grid.rows), ramps(grid.columns)
        self.row = self.column = 0
        self.edge: Tensor | None = None  # (n_class, h, overlap): the right edge of the scene to the left
        self.own_edge: Tensor | None = None  # the right edge of the current scene
        self.strip: Tensor | None = None  # (n_class, overlap, W): the lower edges, of this row or the one above
        self.page: Rows | None = None  # the results of this row of scenes

    def begin(self, index: int) -> None:
        """Start scene `index` of the grid, whose scores come next."""
        self.row, self.column = divmod(index, len(self.grid.columns.starts))
        self.edge, self.own_edge = self.own_edge if self.column else None, None

    def _span(self, axis: Axis, k: int) -> tuple[int, int, int]:
        """Return the start of scene `k`, its length up to the next scene, and that shared with the one before."""
        start = axis.starts[k]
        last = k + 1 == len(axis.starts)
        own = axis.patch if last else axis.starts[k + 1] - start
        shared = axis.starts[k - 1] + axis.patch - start if k else 0
        return start, own, shared

    def __call__(self, top: int, scores: Tensor) -> None:
        """Add rows of the current scene from its row `top` on, (n_class, rows, w): means over patches."""
        down, across = self.weights[0][self.row], self.weights[1][self.column]
        weights = torch.outer(down[top : top + scores.shape[1]], across)
        scores = scores.float().cpu() * weights
        left, own, shared = self._span(self.grid.columns, self.column)
        if own < scores.shape[2]:
            if self.own_edge is None:
                self.own_edge = scores.new_empty(len(scores), self.grid.patch[0], scores.shape[2] - own)
            self.own_edge[:, top : top + scores.shape[1]] = scores[:, :, own:]
        scores = scores[:, :, :own]
        if shared:
            scores[:, :, :shared] += required(self.edge, "edge")[:, top : top + scores.shape[1]]
        self._add_rows(top, scores, slice(left, left + own))
        if self.column + 1 == len(self.grid.columns.starts) and top + scores.shape[1] == self.grid.patch[0]:
            self._emit_page(required(self.page, "page"), self.grid.rows.starts[self.row])
            self.page = None

    def _add_rows(self, top: int, scores: Tensor, columns: slice) -> None:
        """Add rows that are final across: those shared with the scenes below go to the strip, the others to the page.

        In any column all rows of the strip that the scenes above wrote are read before the first row is overwritten.
        `top` is a row of the scene, `columns` are of the image.
        """
        _, own, shared = self._span(self.grid.rows, self.row)
        joined = max(0, min(shared - top, scores.shape[1]))
        if joined:
            scores[:, :joined] += required(self.strip, "strip")[:, top : top + joined, columns]
        final = max(0, min(own - top, scores.shape[1]))
        if final:
            rows = self.reduce(scores[:, :final])
            if self.page is None:
                self.page = rows.map(lambda x: x.new_empty(*x.shape[:-2], own, self.grid.image[1]))
            for target, source in zip(self.page.tensors(), rows.tensors(), strict=True):
                target[..., top : top + final, columns] = source
        if final < scores.shape[1]:
            if self.strip is None:
                longest = self.grid.patch[0] - min(b - a for a, b in pairwise(self.grid.rows.starts))
                self.strip = scores.new_empty(len(scores), longest, self.grid.image[1])
            first = top + final - own
            self.strip[:, first : first + scores.shape[1] - final, columns] = scores[:, final:]

    def _emit_page(self, page: Rows, first: int) -> None:
        """Emit the results of a row of scenes from row `first` on, a few rows at a time, as writers copy them."""
        for top in range(0, len(page.ids), RESULT_ROWS):
            count = min(RESULT_ROWS, len(page.ids) - top)
            self.emit(first + top, page.map(partial(torch.narrow, dim=-2, start=top, length=count)))


def reduce_scores(scores: Tensor, probabilities: bool, uncertainty: int = 0) -> Rows:
    """Return class ids, and what else is requested, of `scores` (n_class, rows, W), means over patches.

    `uncertainty` is the number of its measures; with 2, the last channel of `scores` is that of `DisagreementSinks`.
    """
    disagreement = scores[-1] if uncertainty == 2 else None
    scores = scores if disagreement is None else scores[:-1]
    measures = measure_uncertainty(scores, disagreement) if uncertainty else None
    ids = ArgmaxSink((scores.shape[1], scores.shape[2]), scores.device)
    ids(0, scores)
    shares = scores.float().softmax(0).half().cpu() if probabilities else None
    return Rows(ids.ids.cpu(), shares, measures)


@torch.inference_mode()
def segment_scenes(
    predictor: Predictor,
    source: Source,
    emit: Emit,
    *,
    scene_size: int = SCENE_SIZE,
    probabilities: bool = False,
    uncertainty: bool = False,
    on_patches: OnPatches | None = None,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
    name: object = "the image",
) -> Coverage:
    """Segment an image of any size, in the scenes of `scene_grid`.

    The next scene is read by a thread while one is computed, see `read_ahead`.

    The ids of a single scene, alone, are those of sums over patches, as in evaluation. All else is made of means over
    patches, which give the same ids up to ties by rounding.

    Args:
        predictor: segments one scene; its headline is the result.
        source: the image.
        emit: gets rows of the result as they become final.
        scene_size: the longest side of a scene, in pixels; without influence if the predictor keeps the scale.
        probabilities: whether the result holds the classes' probabilities.
        uncertainty: whether it holds the measures of uncertainty that the mode gives; the same in all processes.
        on_patches: called after each sub-batch.
        ranks: processes that share the scenes of the image: all call this, and the main one emits. It segments a single
            scene alone.
        folder: common to all processes, for the scores of all but the main one; needed with several processes.
        name: of the image, for messages.

    Returns:
        The part of the image that was computed at full resolution, by all processes.

    Raises:
        InputError: in all processes, if one cannot read the image, or computes scores that are not finite numbers.
    """

    measures = len(bands_of_mode(predictor.stage.number)) if uncertainty else 0
    reduce = partial(reduce_scores, probabilities=probabilities, uncertainty=measures)

    def segment(scene: Source, sink: Sink, means: bool) -> Coverage:
        """Send the headline's scores of one scene to a sink."""
        check = FiniteScores()
        rounds: list[dict[str, Sink]] = [{predictor.stage.headline: sink}]
        if measures == 2:
            rounds = DisagreementSinks(scene.size, predictor.settings.device, sink).rounds(predictor)
        for sinks in rounds:
            found = predictor.segment(scene, sinks, on_patches=on_patches, means=means, check=check)
        if not check.ok():
            reason = not_finite(predictor.settings.precision)
            raise InputError(f"{name}: the scores of the network are {reason}", "scores not finite")
        return found

    grid = scene_grid(source.size, scene_size, predictor.context)
    if len(grid) == 1:

        def segment_whole() -> Coverage:
            """Segment the image in the main process: it is as few as one scene, such as a cut of an image of two."""
            if not ranks.main:
                return Coverage()
            means = probabilities or uncertainty
            return segment(load_in_memory(source), lambda top, scores: emit(top, reduce(scores)), means)

        return sum(ranks.gather(ranks.together(segment_whole)), Coverage())
    canvas = SceneCanvas(grid, reduce, emit)
    return _share_scenes(source, grid.boxes(), canvas, partial(segment, means=True), ranks, folder)


def _share_scenes(
    source: Source,
    boxes: Sequence[Box],
    canvas: SceneCanvas,
    segment: Callable[[Source, Sink], Coverage],
    ranks: Ranks,
    folder: Path | None,
) -> Coverage:
    """Segment the scenes `boxes` of an image, a round of one for each process at a time, and join them on `canvas`.

    The main process sends the scores of its scene to the canvas at once, and those of the others, which keep them in
    `folder`, before its next one. The others are those of `segment_scenes`.
    """

    def score_file(index: int) -> Path:
        return required(folder, "folder") / f"scene{index}.npy"

    def take_turn(index: int, before: Iterable[int]) -> Coverage:
        """Replay the scores of the scenes `before`, which others kept, and segment scene `index`, if there is one."""
        try:
            for other in before if ranks.main else ():
                canvas.begin(other)
                replay_scores(score_file(other), canvas)
            if index >= len(boxes):
                return Coverage()
            if ranks.main:
                canvas.begin(index)
                return segment(next(scenes), canvas)
            score_file(index).parent.mkdir(parents=True, exist_ok=True)
            with score_file(index).open("wb") as file:  # arrays one after the other
                return segment(next(scenes), lambda top, scores: np.save(file, scores.float().cpu().numpy()))
        except OSError as error:
            raise InputError(f"scores cannot be kept in {folder}: {error.strerror or error}") from error

    coverage = Coverage()
    others = range(0)  # of the last round, by the other processes
    with closing(read_ahead(source, boxes[ranks.rank :: ranks.world])) as scenes:
        for first in range(0, len(boxes), ranks.world):
            coverage += ranks.together(partial(take_turn, first + ranks.rank, others))
            others = range(first + 1, min(first + ranks.world, len(boxes)))
    ranks.together(partial(take_turn, len(boxes), others))
    return sum(ranks.gather(coverage), Coverage())


def patch_count(predictor: Predictor, size: Size, scene_size: int) -> int | None:
    """Return how many patches of an image of `size` are computed; None if that depends on its pixels."""
    scenes = scene_grid(size, scene_size, predictor.context)
    count = predictor.patch_count(scenes.patch)
    return None if count is None else len(scenes) * count


def replay_scores(path: Path, sink: Sink) -> None:
    """Send the scores that another process kept to `sink`; remove the file."""
    with path.open("rb") as file:
        end, top = path.stat().st_size, 0
        while file.tell() < end:
            scores = torch.from_numpy(np.load(file))
            sink(top, scores)
            top += scores.shape[1]
    path.unlink()
