"""Measures time and memory of images of 0.01 to 1 gigapixel.

`predict.py` segments each image, a made-up GeoTIFF, in a process of its own, by default with random weights. These
change neither time nor memory, but `--polygons`, passed on, finds many small regions. Of the seconds, those that the
process takes for an image of one pixel, its start, are taken off. An image is divided into scenes, and these into
patches, of equal size, so the number of patches for a megapixel depends on the side; what should stay the same is the
time of a patch.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.speed import MODES, save_random
from dataset.synthetic import smooth_noise
from models.backbone import backbone_name
from models.fpn import WIDTH
from prediction.scenes import patch_count
from prediction.segmenter import Segmenter
from utils.arguments import AddOption, number, whole
from utils.results import Usage, run_measured
from utils.run_record import ROOT

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
    add("--checkpoint", type=Path, metavar="FILE", help="a network (default: random weights, by the next five options)")
    add("--mode", type=int, choices=MODES, default=1, help="(default: %(default)s)")
    add("--backbone", type=backbone_name, default="resnet18", metavar="NAME", help="(default: %(default)s)")
    add("--pyramid_width", type=whole(2), default=WIDTH, metavar="N", help="(default: %(default)s)")
    add("--size_g", type=whole(32), default=508, help="of the shrunk image (default: %(default)s)")
    add("--size_p", type=whole(51), default=508, help="of a patch (default: %(default)s)")
    add("--scene_size", type=whole(64), help="as of predict.py")
    add("--folder", type=Path, help="where images lie meanwhile (default: a temporary one)")
    add("--results", type=Path, metavar="DIR", help="keep what predict.py writes in DIR")
    add("more", nargs="*", help="after --: passed on to predict.py")


def rows(options: argparse.Namespace) -> Iterator[dict[str, float | None]]:
    """Yield a row for each image. Seconds are those beyond the process's start."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        weights = options.checkpoint or folder / "weights.pth"
        if options.checkpoint is None:
            sizes = {name: getattr(options, name) for name in ("pyramid_width", "size_g", "size_p")}
            save_random(weights, options.mode, options.backbone, **sizes)
        scenes = [] if options.scene_size is None else ["--scene_size", options.scene_size]
        segmenter = Segmenter.from_checkpoint(weights, device="cpu", scene_size=options.scene_size)

        def segment(side: int) -> Usage:
            image, output = folder / f"{side}.tif", (options.results or folder) / f"out{side}"
            write_scene(image, side)
            where = ["--checkpoint", weights, "--input", image, "--output", output, "--overwrite"]
            command = [str(part) for part in (sys.executable, ROOT / "predict.py", *where, *scenes, *options.more)]
            code, found = run_measured(command, subprocess.DEVNULL, GDAL_CACHEMAX="96")
            if code:
                raise RuntimeError(f"{' '.join(command)} failed")
            image.unlink()
            return found

        start = segment(1)
        for gigapixels in options.gigapixels:
            side = round((gigapixels * 1e9) ** 0.5)
            patches = patch_count(segmenter.predictor, (side, side), segmenter.scene_size)
            used = segment(side)
            seconds, cpu = used.seconds - start.seconds, used.cpu_seconds - start.cpu_seconds
            yield {
                "gigapixels": gigapixels,
                "side": side,
                "patches": patches,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "per_megapixel": 1e6 * seconds / side**2,
                "cpu_per_patch": cpu / patches if patches else None,
                "memory_mb": used.memory_mb,
            }
