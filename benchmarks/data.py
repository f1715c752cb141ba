"""Measures the data path: how many images one worker delivers, and what each step of a sample takes.

The images are made up, in a temporary folder, as the data sets have them: 2448 x 2448 in JPEG and in PNG with labels in
colours (DeepGlobe), 5000 x 5000 in TIFF with grey labels (Inria), and JPEG of up to 6000 x 5000 pixels in mixed sizes
(ISIC). A worker is one process of the loader with one thread. Images per second are those that it delivers to the
training process, which does nothing else, in a second pass; on a shared machine they say little, CPU seconds more.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.speed import N_CLASS, TrainingStep, random_sample, seconds
from dataset.augmentation import Draw
from dataset.base import Item, SegmentationDataset
from dataset.deep_globe import DEEP_GLOBE
from dataset.inria import INRIA
from dataset.isic import ISIC
from dataset.label_file import open_label
from dataset.loader import EpochSampler, SampleLoader
from dataset.synthetic import smooth_noise
from imaging.image_file import open_image
from imaging.pictures import shrink
from imaging.probe import probe
from imaging.sources import MemorySource
from models.glnet import GLNet
from utils.arguments import AddOption, whole
from utils.classes import Classes
from utils.errors import required
from utils.resize import shrink_label
from utils.settings import TrainingSettings
from utils.tiling import Box, Size, map_size

SIZE_G = 508
BATCH = 6
"""Images of a training step, as released."""


@dataclass(frozen=True)
class Kind:
    """One kind of images: its name, the suffixes of images and labels, the classes, and sizes that take turns."""

    name: str
    suffixes: tuple[str, str]
    classes: Classes
    sizes: tuple[Size, ...]

    def write(self, folder: Path, count: int) -> list[Item]:
        """Write `count` images of smooth colours with grain, and labels of smooth regions.

        Labels of more than two classes are in colours, else grey.
        """
        colored, found = len(self.classes) > 2, []
        table = np.array(self.classes.palette if colored else self.classes.values, np.uint8)
        for k in range(count):
            name, (height, width) = f"{self.name}{k}", self.sizes[k % len(self.sizes)]
            rng = np.random.default_rng(sum(name.encode()))
            fields = [cv2.resize(smooth_noise(rng, 2048, cells), (width, height)) for cells in (6, 17, 60, 9)]
            grain = rng.normal(0, 6, (height, width, 3)).astype(np.float32)
            pixels = np.clip(110 + 35 * np.stack(fields[:3], -1) + grain, 0, 255).astype(np.uint8)
            ids = np.clip((fields[3] + 2) / 4 * len(self.classes), 0, len(self.classes) - 1).astype(np.uint8)
            item = Item(name, folder / f"{name}{self.suffixes[0]}", folder / f"{name}_label{self.suffixes[1]}")
            Image.fromarray(pixels).save(folder / f"{name}{self.suffixes[0]}", quality=90)  # of JPEG
            Image.fromarray(table[ids]).save(folder / f"{name}_label{self.suffixes[1]}")
            found.append(item)
        return found


KINDS = {
    "jpeg": Kind("jpeg", (".jpg", ".png"), DEEP_GLOBE, ((2448, 2448),)),
    "png": Kind("png", (".png", ".png"), DEEP_GLOBE, ((2448, 2448),)),
    "tiff": Kind("tiff", (".tif", ".tif"), INRIA, ((5000, 5000),)),
    "mixed": Kind("mixed", (".jpg", ".png"), ISIC, ((5000, 6000), (2848, 4288), (2000, 3008), (767, 1022))),
}


def steps(item: Item, classes: Classes) -> dict[str, float]:
    """Return the CPU seconds of each step of one sample, made one after the other in this process."""
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = time.process_time() - start
        return result

    def decoded(opened: AbstractContextManager[Any]) -> torch.Tensor:
        with opened as file:
            return file.read(Box(0, 0, *file.size))

    path, label_path = item.pairs()[0][0], required(item.pairs()[0].label, "label")
    timed("headers", lambda: (probe(path), probe(label_path)))
    image = timed("decode image", lambda: decoded(open_image(path)))
    label = timed("decode label", lambda: decoded(open_label(label_path, classes)))
    draws = [Draw.of([0, epoch]) for epoch in range(8)]
    timed("augment", lambda: [draw.apply(image, label, map_size(image)) for draw in draws])
    found["augment"] /= len(draws)
    timed("shrink", lambda: shrink(MemorySource(image), (SIZE_G, SIZE_G)))
    timed("shrink label", lambda: shrink_label(label, (SIZE_G // 4, SIZE_G // 4)))
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds that a process has used so far."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def delivered(data: SegmentationDataset) -> dict[str, float]:
    """Return images per second and CPU milliseconds per image of a worker in its second pass."""
    loader = SampleLoader(data, sampler=EpochSampler(len(data)), num_workers=1, persistent=True)
    try:
        for _ in loader:
            pass
        (worker,) = (child.pid for child in multiprocessing.active_children())
        start, used = time.perf_counter(), cpu_seconds(required(worker, "worker"))
        for _ in loader:
            pass
        taken, used = time.perf_counter() - start, cpu_seconds(required(worker, "worker")) - used
    finally:
        loader.close()
    return {"images_per_second": len(data) / taken, "cpu_ms": 1000 * used / len(data)}


def measure(kind: Kind, folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of `count` images of one kind: the mean of each of the `steps`, and what is `delivered`."""
    items = kind.write(folder, count)
    runs = [steps(item, kind.classes) for item in items for _ in range(2)][1::2]  # the first of an image warms up
    for name in runs[0]:
        yield {"images": kind.name, "work": name, "cpu_ms": 1000 * sum(run[name] for run in runs) / count}
    for name, read_whole, training in (
        ("stage 1", False, True),
        ("stages 2, 3", True, True),
        ("validation", True, False),
    ):
        data = SegmentationDataset(items, kind.classes, SIZE_G, augment=training)
        data.whole, data.keep_shrunk = read_whole, not training
        yield {"images": kind.name, "work": name, **delivered(data)}


COLUMNS = {"images": "images", "work": "work", "cpu_ms": "CPU ms per image", "images_per_second": "images per second"}


def add_options(add: AddOption) -> None:
    add("--images", type=whole(1), default=4, help="images of each kind (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of images (default: all)")
    add("--step", action="store_true", help="also measure a training step of stage 1")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of each kind, and that of a training step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    cv2.setNumThreads(1)
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            yield from measure(KINDS[name], Path(folder), options.images)
    if options.step:
        torch.set_num_threads(threads)
        settings = TrainingSettings(size_p=SIZE_G, sub_batch_size=BATCH, device=options.device)
        step = TrainingStep(GLNet(N_CLASS).to(options.device), 1, settings)
        batch = [random_sample(2448, SIZE_G) for _ in range(BATCH)]
        rate = BATCH / seconds(partial(step, batch), options.device)
        yield {"images": "random", "work": "a training step of stage 1", "images_per_second": rate}
