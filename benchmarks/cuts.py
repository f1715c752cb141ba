"""Measures how much a result depends on the cut: GLNet with both contexts, and U-Net on patches.

- A strip, a square and a portrait are cut from the middle of each scene and segmented one by one, as `predict.py` does,
  which divides a long cut into scenes. Of the pixels that all cuts hold, the share of equal classes is reported for
  each pair, and of all three.
- With `--stability N` the whole scene is segmented, and then N shifted cuts of it, as by `predict.py --stability N`:
  the share of pixels whose class changes.
- Of the whole scene, the share of all class borders that lie on borders of scenes, those of `--context square`, within
  a few pixels; chance, the mean of that share over all shifted places of the same borders; and the part of these
  places that hold fewer class borders, which is about 50 % where a network does not know where scenes end.

Seconds are those of the whole scene.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.large_images import write_scene
from benchmarks.speed import MODES
from experiments.baselines import PatchPredictor, build_network
from imaging.image_file import open_image
from imaging.sources import CropSource, Source
from prediction.scenes import SCENE_SIZE, scene_grid, segment_scenes
from prediction.segmenter import Segmenter
from prediction.stability import shifted_cuts
from utils.arguments import AddOption, add_smoothing, whole
from utils.files import load_torch
from utils.precision import PRECISIONS
from utils.settings import CONTEXTS
from utils.tiling import Box, PatchGrid, Size

CUTS = {"strip": (1 / 6, 1), "square": (1 / 2, 1 / 2), "portrait": (2 / 3, 1 / 4)}
"""Height and width of each cut, as parts of `--length`."""

NEAR = 8
"""Pixels on either side of a border of scenes within which a class border lies on it."""

COLUMNS = {
    "image": "image",
    "network": "network",
    **{name: f"equal, {name}, %" for name in map(", ".join, combinations(CUTS, 2))},
    "all": "all three, %",
    "changed": "changed by shifts, %",
    "borders": "class borders on borders of scenes, %",
    "chance": "chance, %",
    "rank": "places with fewer, %",
    "seconds": "seconds",
}


def add_options(add: AddOption) -> None:
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="that records a scale")
    add("--mode", type=int, choices=MODES, help="(default: the checkpoint's)")
    add("--unet", type=Path, metavar="FILE", help="of experiments.baselines, with the checkpoint's encoder and patches")
    add("--images", type=Path, nargs="+", metavar="FILE", help="scenes (default: a made-up one)")
    add("--length", type=whole(60), default=6000, help="of the strip, in pixels (default: %(default)s)")
    add("--scene_size", type=whole(64), default=SCENE_SIZE, help="with --context square (default: %(default)s)")
    add("--stability", type=whole(0), default=0, metavar="N", help="shifted cuts (default: %(default)s)")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="(default: %(default)s)")
    add_smoothing(add)


def cuts_of(scene: Size, length: int) -> dict[str, Box]:
    """Return the cuts of a scene, in its middle and within it."""
    boxes = {}
    for name, parts in CUTS.items():
        height, width = (min(side, round(length * part)) for side, part in zip(scene, parts, strict=True))
        boxes[name] = Box((scene[0] - height) // 2, (scene[1] - width) // 2, height, width)
    return boxes


def common_part(boxes: dict[str, Box]) -> Box:
    """Return the part of a scene that all its cuts hold."""
    top, left = (max(box[axis] for box in boxes.values()) for axis in (0, 1))
    bottom = min(box.top + box.height for box in boxes.values())
    right = min(box.left + box.width for box in boxes.values())
    return Box(top, left, bottom - top, right - left)


def scene_lines(grid: PatchGrid) -> tuple[list[int], list[int]]:
    """Return the rows and the columns at which scenes begin or end within the image."""
    rows, columns = (
        [*axis.starts[1:], *(start + axis.patch for start in axis.starts[:-1])] for axis in (grid.rows, grid.columns)
    )
    return rows, columns


def border_shares(ids: np.ndarray, lines: tuple[list[int], list[int]], near: int = NEAR) -> np.ndarray:
    """Return the share of class borders that lie on lines, first on the lines themselves, then on them shifted.

    Args:
        ids: (H, W) uint8.
        lines: rows and columns of pixels before which a line lies.
        near: a class border, between two pixels, lies on a line that is at most so many pixels away.

    Returns:
        (max(H, W) - 1,) float, by pixels that the lines are shifted down and to the right; what leaves the image comes
        in on the other side. Zeros if there is no class border.
    """
    shifts = np.arange(max(ids.shape) - 1)
    on_lines, total = np.zeros(len(shifts)), 0
    for changes, places in zip((ids[1:] != ids[:-1], (ids[:, 1:] != ids[:, :-1]).T), lines, strict=True):
        counts = changes.sum(1)
        total += counts.sum()
        near_line = np.zeros(len(counts), bool)
        for place in places:
            near_line[max(0, place - 1 - near) : place + near] = True
        by_shift = np.array([counts[np.roll(near_line, shift)].sum() for shift in range(len(counts))])
        on_lines += by_shift[shifts % len(counts)]
    return on_lines / max(1, total)


def class_ids(predictor: Any, scene_size: int, source: Source) -> Tensor:
    """Return the class ids of an image, (H, W) uint8."""
    parts: list[Tensor] = []
    segment_scenes(predictor, source, lambda _, rows: parts.append(rows.ids.clone()), scene_size=scene_size)
    return torch.cat(parts)


Segment = Callable[[Source], Tensor]
"""Returns the class ids of an image."""


def networks(options: argparse.Namespace) -> Iterator[tuple[str, Segmenter, Segment]]:
    """Yield the name of each network, whose view and size of patches it has, and what segments an image."""
    own = {name: getattr(options, name) for name in ("device", "mode", "precision", "blend", "upsample")}
    for context in CONTEXTS:
        segmenter = Segmenter.from_checkpoint(options.checkpoint, context=context, **own)
        yield f"GLNet, context {context}", segmenter, partial(class_ids, segmenter.predictor, options.scene_size)
    if options.unet:
        header = segmenter.header
        network = build_network("unet", header.backbone, len(header.classes)).to(options.device)
        network.load_state_dict(load_torch(options.unet))
        patchwise = PatchPredictor(network.eval(), segmenter.predictor.settings)
        yield "U-Net", segmenter, partial(class_ids, patchwise, sys.maxsize)


def measure(source: Source, size_p: int, segment: Segment, options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of one network on one scene, by the keys of `COLUMNS`."""
    boxes = cuts_of(source.size, options.length)
    common = common_part(boxes)
    found = {name: common.within(box).of(segment(CropSource(source, box))) for name, box in boxes.items()}
    row = {}
    for names in (*combinations(found, 2), tuple(found)):
        first, *others = (found[name] for name in names)
        equal = torch.stack([first == other for other in others]).all(0).double().mean()
        row["all" if len(names) == len(found) else ", ".join(names)] = 100 * float(equal)
    start = time.perf_counter()
    ids = segment(source)
    row["seconds"] = time.perf_counter() - start
    if shifted := shifted_cuts(source.size, size_p, options.stability):
        differs = [segment(CropSource(source, box)) != box.of(ids) for box in shifted]
        changed = sum(float(one.sum()) for one in differs) / sum(one.numel() for one in differs)
        row["changed"] = 100 * changed
    grid = scene_grid(source.size, options.scene_size)
    if len(grid) > 1:
        shares = 100 * border_shares(ids.numpy(), scene_lines(grid))
        row |= {"borders": shares[0], "chance": shares.mean(), "rank": 100 * float((shares < shares[0]).mean())}
    return row


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each scene and network."""
    with tempfile.TemporaryDirectory() as folder:
        images = options.images
        if images is None:
            images = [Path(folder) / "scene.tif"]
            write_scene(images[0], options.length)
        loaded = list(networks(options))
        for image in images:
            for name, segmenter, segment in loaded:
                with open_image(image, segmenter.view) as source:
                    figures = measure(source, segmenter.header.size_p, segment, options)
                yield {"image": image.stem, "network": name, **figures}
