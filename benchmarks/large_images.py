"""Measures time and memory of images of 0.01 to 1 gigapixel.

Each image is a made-up GeoTIFF, segmented by `predict.py` in a process of its own with random weights, which change
neither time nor memory. Of the seconds, those that the process takes for an image of one pixel, its start, are taken
off. An image is divided into scenes, and these into patches, of equal size, so the number of patches for a megapixel
depends on the side; what should stay the same is the time of a patch.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workload import MODES
from dataset import deep_globe
from dataset.synthetic import smooth_noise
from models import checkpoint
from models.backbone import backbone_name
from models.glnet import GLNet
from models.header import Header
from prediction.scenes import SCENE_SIZE, scene_grid
from utils.arguments import AddOption, number, whole
from utils.tiling import MIN_OVERLAP, PatchGrid

ROOT = Path(__file__).parents[1]
TILE = 2048


def write_scene(path: Path, side: int) -> None:
    """Write a GeoTIFF of side x side pixels: a smooth pattern with speckle, rotated and shifted from tile to tile."""
    import rasterio

    rng = np.random.default_rng(0)
    smooth = np.stack([smooth_noise(rng, TILE, cells) for cells in (4, 9, 17)])
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    pattern = (230 * smooth + rng.integers(0, 16, smooth.shape)).astype(np.uint8)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": side, "width": side, "crs": "EPSG:32633"}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw", "bigtiff": "if_safer"}
    transform = rasterio.transform.from_origin(400000, 5000000, 0.5, 0.5)
    with rasterio.open(path, "w", transform=transform, **profile, **layout) as file:
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                height, width = min(TILE, side - top), min(TILE, side - left)
                tile = np.roll(np.rot90(pattern, int(rng.integers(4)), (1, 2)), int(rng.integers(TILE)), 2)
                file.write(tile[:, :height, :width], window=((top, top + height), (left, left + width)))


def write_weights(path: Path, mode: int, backbone: str, size_g: int, size_p: int) -> None:
    """Write a checkpoint with random weights."""
    header = Header(
        stage=mode,
        backbone=backbone,
        classes=deep_globe.DEEP_GLOBE,
        size_g=size_g,
        size_p=size_p,
        min_overlap=MIN_OVERLAP,
        normalize="none",
    )
    checkpoint.save(path, GLNet(len(header.classes), backbone), header)


class Usage(NamedTuple):
    """What a process took: seconds, CPU seconds of all its threads, and its peak memory in MB of 2**20 bytes."""

    seconds: float
    cpu_seconds: float
    memory: float


def measure(command: list[str]) -> Usage:
    """Run a process and return what it took. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]  # its own table
    # not subprocess: only wait4 returns the peak of this one process
    process = os.posix_spawn(command[0], command, {**os.environ, "GDAL_CACHEMAX": "96"}, file_actions=quiet)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return Usage(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def count_patches(side: int, scene_size: int, size_p: int) -> int:
    """Return the number of patches of an image of side x side pixels, over all its scenes."""
    scenes = scene_grid((side, side), scene_size)
    return len(scenes) * len(PatchGrid.cover(scenes.patch, size_p, MIN_OVERLAP))


COLUMNS = {
    "gigapixels": "gigapixels",
    "side": "side",
    "patches": "patches",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
    "per_megapixel": "s / megapixel",
    "cpu_per_patch": "CPU s / patch",
    "memory_mb": "peak MB",
}


def add_options(add: AddOption) -> None:
    """Add the options of this benchmark."""
    add("--gigapixels", type=number(1e-6), nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0], help="(default: five sizes)")
    add("--mode", type=int, choices=MODES, default=1, help="(default: %(default)s)")
    add("--backbone", type=backbone_name, default="resnet18", metavar="NAME", help="(default: %(default)s)")
    add("--size_g", type=whole(32), default=508, help="of the shrunk image (default: %(default)s)")
    add("--size_p", type=whole(51), default=508, help="of a patch (default: %(default)s)")
    add("--scene_size", type=whole(64), default=SCENE_SIZE, help="as of predict.py (default: %(default)s)")
    add("--folder", type=Path, help="where images and results lie meanwhile (default: a temporary one)")
    add("more", nargs="*", help="after --: passed on to predict.py")


def rows(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Yield a row for each image. Seconds are those beyond the process's start."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        weights = folder / "weights.pth"
        write_weights(weights, options.mode, options.backbone, options.size_g, options.size_p)

        def segment(side: int) -> Usage:
            image, output = folder / f"{side}.tif", folder / f"out{side}"
            write_scene(image, side)
            command: list[Any] = [sys.executable, ROOT / "predict.py", "--checkpoint", weights, "--input", image]
            command += ["--output", output, "--scene_size", options.scene_size, *options.more]
            found = measure([str(part) for part in command])
            image.unlink()
            return found

        start = segment(1)
        for gigapixels in options.gigapixels:
            side = round((gigapixels * 1e9) ** 0.5)
            patches = count_patches(side, options.scene_size, options.size_p)
            used = segment(side)
            seconds, cpu = used.seconds - start.seconds, used.cpu_seconds - start.cpu_seconds
            yield {
                "gigapixels": gigapixels,
                "side": side,
                "patches": patches,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "per_megapixel": 1e6 * seconds / side**2,
                "cpu_per_patch": cpu / patches,
                "memory_mb": used.memory,
            }
