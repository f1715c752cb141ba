"""Measures time and memory of images of 0.01 to 1 gigapixel.

Each image is a made-up GeoTIFF, segmented by `predict.py` in a process of its own with random weights, which change
neither time nor memory. Of the seconds, those that the process takes for an image of one pixel, its start, are taken
off. An image is divided into scenes, and these into patches, of equal size, so the number of patches for a megapixel
depends on the side; what should stay the same is the time of a patch.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import MODES, save_random
from dataset.synthetic import smooth_noise
from models.backbone import backbone_name
from prediction.scenes import SCENE_SIZE, scene_grid
from utils.arguments import AddOption, number, whole
from utils.results import Usage, run_measured
from utils.run_record import ROOT
from utils.tiling import MIN_OVERLAP, PatchGrid

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
        save_random(weights, options.mode, options.backbone, size_g=options.size_g, size_p=options.size_p)

        def segment(side: int) -> Usage:
            image, output = folder / f"{side}.tif", folder / f"out{side}"
            write_scene(image, side)
            command: list[Any] = [sys.executable, ROOT / "predict.py", "--checkpoint", weights, "--input", image]
            command += ["--output", output, "--scene_size", options.scene_size, *options.more]
            code, found = run_measured([str(part) for part in command], subprocess.DEVNULL, GDAL_CACHEMAX="96")
            if code:
                raise RuntimeError(f"{' '.join(map(str, command))} failed")
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
                "memory_mb": used.memory_mb,
            }
