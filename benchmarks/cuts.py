"""Measures how much a result depends on the cut, with both contexts.

A strip, a square and a portrait are cut from the middle of one scene and segmented one by one, as `predict.py` does,
which divides a long cut into scenes. Of the pixels that all cuts hold, the share of equal classes is reported for each
pair, and of all three.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.large_images import write_scene
from benchmarks.workload import MODES
from imaging.image_file import open_image
from imaging.sources import CropSource, Source
from prediction.scenes import Rows, segment_scenes
from prediction.segmenter import Segmenter
from utils.arguments import AddOption, whole
from utils.settings import CONTEXTS
from utils.tiling import Box, Size

CUTS = {"strip": (1 / 6, 1), "square": (1 / 2, 1 / 2), "portrait": (2 / 3, 1 / 4)}
"""Height and width of each cut, as parts of `--length`."""

COLUMNS = {"context": "context", "cuts": "cuts", "pixels": "common pixels", "equal": "equal, %"}


def add_options(add: AddOption) -> None:
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="that records a scale")
    add("--mode", type=int, choices=MODES, help="(default: the checkpoint's)")
    add("--image", type=Path, metavar="FILE", help="the scene (default: a made-up one)")
    add("--length", type=whole(60), default=6000, help="of the strip, in pixels (default: %(default)s)")


def cuts_of(scene: Size, length: int) -> dict[str, Box]:
    """Return the cuts of a scene, in its middle and within it."""
    boxes = {}
    for name, parts in CUTS.items():
        height, width = (min(side, round(length * part)) for side, part in zip(scene, parts, strict=True))
        boxes[name] = Box((scene[0] - height) // 2, (scene[1] - width) // 2, height, width)
    return boxes


def class_ids(segmenter: Segmenter, source: Source) -> Tensor:
    """Return the class ids of an image, (H, W) uint8."""
    parts: list[Tensor] = []

    def emit(top: int, rows: Rows) -> None:
        parts.append(rows.ids.clone())

    segment_scenes(segmenter.predictor, source, emit, scene_size=segmenter.scene_size)
    return torch.cat(parts)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each context, and each pair and all of the cuts."""
    with tempfile.TemporaryDirectory() as folder:
        image = options.image
        if image is None:
            image = Path(folder) / "scene.tif"
            write_scene(image, options.length)
        for context in CONTEXTS:
            segmenter = Segmenter.from_checkpoint(
                options.checkpoint, device=options.device, mode=options.mode, context=context
            )
            with open_image(image, segmenter.view) as source:
                boxes = cuts_of(source.size, options.length)
                common: Box | None = boxes["square"]
                for box in boxes.values():
                    common = None if common is None else common.overlap(box)
                if common is None:
                    raise RuntimeError("cuts around one middle overlap")
                found = {
                    name: common.within(box).of(class_ids(segmenter, CropSource(source, box)))
                    for name, box in boxes.items()
                }
            for names in (*combinations(found, 2), tuple(found)):
                first, *others = (found[name] for name in names)
                equal = torch.stack([first == other for other in others]).all(0).double().mean()
                shown = {"context": context, "cuts": ", ".join(names), "pixels": first.numel()}
                yield {**shown, "equal": 100 * float(equal)}
