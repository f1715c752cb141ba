"""`predict.py` in processes of its own: several that share the work, and how much memory one takes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import runs
from pictures import random_image, run, save, write_checkpoint
from PIL import Image

pytestmark = pytest.mark.slow


def test_several_processes_write_the_same_files(tmp_path):
    checkpoint, images = write_checkpoint(tmp_path / "two.pth"), tmp_path / "images"
    images.mkdir()
    for seed in range(3):
        save(images / f"{seed}.png", seed=seed)
    save(images / "large.png", size=(150, 260))
    (images / "bad.jpg").write_text("no image")
    options = ["--scene_size", "100", "--probabilities"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run(checkpoint, images, output=alone, options=options) == 1
    port = runs.free_port()
    command = [sys.executable, "predict.py", "--checkpoint", checkpoint, "--input", images, "--output", together]
    processes = []
    for rank in (0, 1):
        environment = {**os.environ, **runs.environment_of(rank, 2, port), "OMP_NUM_THREADS": "1"}
        whole = [*map(str, command), *options, "--device", "cpu"]
        processes.append(subprocess.Popen(whole, cwd=runs.ROOT, env=environment, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert {path.name for path in alone.iterdir()} == {path.name for path in together.iterdir()}
    for path in alone.iterdir():
        if path.suffix == ".npz":
            found, expected = (np.load(folder / path.name)["probabilities"] for folder in (together, alone))
            assert np.abs(found - expected).max() <= 2e-3  # other numbers of threads sum in another order
        elif path.suffix == ".png":
            found, expected = (np.asarray(Image.open(folder / path.name)) for folder in (together, alone))
            assert (found == expected).mean() > 0.999


GROWTH = """
import resource, sys
sys.path[:0] = ["tests"]
import torch
torch.set_num_threads(1)
from pathlib import Path
from imaging.image_file import open_image
from prediction.outputs import OutputOptions, Outputs
from pictures import PixelPredictor
from prediction.scenes import segment_scenes
from utils.classes import Classes
path = Path(sys.argv[1])
paths = {"mask": path.with_suffix(".mask.tif")}
with open_image(path) as source, Outputs(source, paths, Classes.generic(5), OutputOptions(path.parent)) as outputs:
    segment_scenes(PixelPredictor(), source, outputs.emit, scene_size=1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_height(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    peaks = []
    for height in (1000, 6000):
        path = tmp_path / f"{height}.tif"
        profile = {"driver": "GTiff", "count": 3, "height": height, "width": 4000, "dtype": "uint8"}
        profile["crs"] = "EPSG:32633"
        tiles = {"tiled": True, "compress": "lzw", "photometric": "rgb"}
        with rasterio.open(path, "w", **profile, **tiles) as file:
            for top in range(0, height, 1000):
                band = np.broadcast_to(random_image((1, 4000), top).numpy(), (3, 1000, 4000))
                file.write(band, window=((top, top + 1000), (0, 4000)))
        peaks.append(int(runs.run_python(GROWTH, path, GDAL_CACHEMAX="16").split()[-1]))
    assert peaks[1] - peaks[0] < 25  # MB; the taller image has 57 MB more, and its ids 19
