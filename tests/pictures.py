"""Pictures, rasters, stub scorers and checkpoints that the tests of segmenting share."""

import json
from collections.abc import Callable
from pathlib import Path

import files
import numpy as np
import torch
from builders import N_CLASS, SIDE, build_header, build_model, build_settings
from PIL import Image
from torch import Tensor

import predict
from engine.predictor import Predictor
from models import checkpoint
from prediction.scenes import Rows
from utils.selection import Coverage
from utils.stages import STAGES
from utils.tiling import Box, Size

PROJECTED = "EPSG:32633"  # metres
PIXEL = 0.5  # metres
SIZE = (70, 100)


def random_image(size: Size, seed: int = 0) -> Tensor:
    """(3, H, W) uint8."""
    rng = np.random.default_rng([seed, *size])
    return torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8))


def write_checkpoint(path: Path, stage: int = 2) -> Path:
    checkpoint.save(path, build_model(), build_header(stage))
    return path


def write_raster(path: Path, planes: np.ndarray, **changes) -> Path:
    """A GeoTIFF of `planes` (C, H, W) in a projected reference."""
    place = {"crs": PROJECTED, "transform": (PIXEL, 0, 500000, 0, -PIXEL, 5000000)}
    return files.write_raster(path, planes, **{**place, **changes})


class Whole:
    """Takes rows of a result as they come, and checks that each comes once, from top to bottom."""

    def __init__(self) -> None:
        self.parts: list[Rows] = []
        self.next = 0

    def __call__(self, top: int, rows: Rows) -> None:
        assert top == self.next
        self.next += len(rows.ids)
        self.parts.append(rows.map(Tensor.clone))

    @property
    def ids(self) -> Tensor:
        return torch.cat([part.ids for part in self.parts])

    @property
    def probabilities(self) -> Tensor:
        return torch.cat([part.probabilities for part in self.parts], dim=1)

    @property
    def uncertainty(self) -> Tensor:
        return torch.cat([part.uncertainty for part in self.parts], dim=1)


class PixelPredictor(Predictor):
    """A predictor whose scores depend on each pixel alone: scenes, turns and windows must not change its result."""

    def __init__(self) -> None:
        super().__init__(None, STAGES[1], build_settings(), SIDE)

    def segment(self, image, sinks: dict[str, Callable], **more) -> Coverage:
        height, width = image.size
        for top in range(0, height, 37):
            rows = image.read(Box(top, 0, min(37, height - top), width))
            for sink in sinks.values():
                sink(top, pixel_scores(rows))
        return Coverage()


def pixel_scores(rows: Tensor) -> Tensor:
    """(N_CLASS, h, w) of (3, h, w) uint8."""
    x = rows.float() / 255
    return torch.stack([(x[k % 3] - 0.2 * k).sin() * (k + 1) for k in range(N_CLASS)])


def save(path: Path, size=SIZE, seed=0) -> Image.Image:
    image = Image.fromarray(random_image(size, seed).permute(1, 2, 0).numpy())
    image.save(path)
    return image


def run(checkpoint: Path, *inputs, output: Path, options=()) -> int:
    arguments = ["--checkpoint", checkpoint, "--output", output, *options, "--device", "cpu", "--input", *inputs]
    return predict.main([str(one) for one in arguments])


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
