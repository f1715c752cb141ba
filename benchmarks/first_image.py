"""Measures predict.py on one picture: seconds of the whole process by part, and those before the first patch.

The picture and the weights are made up, which changes no time. The process is a new one, whose files the system has
read before. CPU seconds are those of all its threads; on a machine that others use, they say more than the clock.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.speed import MODES, save_random
from dataset.synthetic import smooth_noise
from models.backbone import backbone_name
from utils.arguments import AddOption, whole
from utils.run_record import ROOT

PROCESS = """
import json, sys, time
from contextlib import contextmanager

start, arguments = float(sys.argv[1]), sys.argv[2:]
spent = dict.fromkeys(("import", "network", "reading", "preparing", "computing", "writing", "rest"), (0.0, 0.0))
clock = lambda: (time.perf_counter() - start, time.process_time())
part, since = "import", (0.0, 0.0)

def enter(new):  # a part; returns the one that it interrupts
    global part, since
    now = clock()
    spent[part] = [b + n - s for b, n, s in zip(spent[part], now, since)]
    old, part, since = part, new, now
    return old

def count(name, *owners_and_functions):
    for owner, function in owners_and_functions:
        def timed(*given, plain=getattr(owner, function), **more):
            old = enter(name)
            try:
                return plain(*given, **more)
            finally:
                enter(old)
        setattr(owner, function, timed)

import predict
from engine import patches, predictor
from prediction import run, scenes, segmenter

enter("rest")
count("network", (segmenter, "load_network"), (predictor, "PreparedGLNet"))
count("reading", (run, "probe"), (scenes, "load_in_memory"))
count("preparing", (predictor, "shrink"))
count("computing", (predictor.Predictor, "segment"))
count("writing", (run.Outputs, "emit"), (run.Outputs, "__enter__"), (run.Outputs, "__exit__"), (run.Records, "add"))

def iterate(self, plain=patches.ImagePatches.__iter__):
    spent.setdefault("before the first patch", clock())
    return plain(self)

@contextmanager
def opened(*given, plain=run.open_image):
    old = enter("reading")
    with plain(*given) as source:
        enter(old)
        yield source

patches.ImagePatches.__iter__, run.open_image = iterate, opened
code = predict.main(arguments)
enter("rest")
print(json.dumps({**spent, "whole process": clock()}))
sys.exit(code)
"""

COLUMNS = {"part": "part", "seconds": "seconds", "cpu_seconds": "CPU seconds"}


def add_options(add: AddOption) -> None:
    add("--mode", type=int, choices=MODES, default=3, help="(default: %(default)s)")
    add("--backbone", type=backbone_name, default="resnet50", metavar="NAME", help="(default: %(default)s)")
    add("--pyramid_width", type=whole(1), default=256, help="(default: %(default)s)")
    add("--side", type=whole(1), default=2448, help="of the picture, in pixels (default: %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each part of the process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder / "weights.pth", options.mode, options.backbone, pyramid_width=options.pyramid_width)
        noise = np.stack([smooth_noise(np.random.default_rng(k), options.side, 17) for k in range(3)], -1)
        scaled = 255 * (noise - noise.min()) / np.ptp(noise)
        Image.fromarray(scaled.astype(np.uint8)).save(folder / "image.jpg")
        command: list[Any] = [sys.executable, "-c", PROCESS, time.perf_counter(), "--device", options.device]
        command += ["--checkpoint", folder / "weights.pth", "--input", folder / "image.jpg", "--output", folder / "out"]
        done = subprocess.run([str(one) for one in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for part, (seconds, cpu_seconds) in json.loads(done.stdout.splitlines()[-1]).items():
        yield {"part": part, "seconds": seconds, "cpu_seconds": cpu_seconds}
