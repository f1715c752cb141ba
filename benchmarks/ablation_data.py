"""The images of `benchmarks.ablation`, at a size that two cores train: real scenes shrunk, and made-up ones."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset import deep_globe, dubai, synthetic
from dataset.base import Item
from dataset.folder_file import NAME, FolderFile, Splits
from dataset.layout import TRAIN, VAL, SplitChoice
from dataset.pairs import PairReader
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.files import write_json
from utils.resize import shrink_label

SHRINK = 4
"""Dubai's scenes are read at a quarter of their width and height."""

SIDE = 384
"""Of a made-up scene, in pixels."""

COUNTS = {TRAIN: 48, VAL: 16}
"""How many made-up scenes there are."""

SEED = 12
"""Of the made-up scenes; the demo's have another."""


class Picture(NamedTuple):
    """An image (H, W, 3) uint8 and its class ids (H, W) uint8."""

    split: str
    id: str
    image: np.ndarray
    label: np.ndarray


def prepare(data: str, source: Path | None, folder: Path) -> None:
    """Write the data sets of an experiment, unless they are there: `scenes`, and of Dubai `parts`.

    Args:
        data: `dubai` or `synthetic`.
        source: of Dubai, the published set.
        folder: of the data sets, which `--dataset folder` reads.

    Raises:
        InputError: the published set is not named, or cannot be used.
    """
    if folder.is_dir():
        return
    beside = folder.with_name(f"{folder.name}.part")  # renamed when complete
    shutil.rmtree(beside, ignore_errors=True)
    if data == "synthetic":
        _write(beside / "scenes", deep_globe.DEEP_GLOBE, _made_up())
    elif source is None:
        raise InputError("--data dubai needs --data_path: the folder of the published set")
    else:
        _write(beside / "scenes", dubai.DUBAI, _scenes(source))
        _write(beside / "parts", dubai.DUBAI, _parts(source))
    beside.rename(folder)


def _write(folder: Path, classes: Classes, pictures: Iterable[Picture]) -> None:
    """Write images and ids as TIFF files, which windows are read from, with lists and the file that describes them."""
    ids: dict[str, list[str]] = {}
    for picture in tqdm(pictures, desc=f"images to {folder}", unit="image"):
        for kind, pixels in (("images", picture.image), ("labels", picture.label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{picture.id}.tif")
        ids.setdefault(picture.split, []).append(picture.id)
    for split, listed in ids.items():
        (folder / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in listed))
    numbered = replace(classes, values=(), ignored=(IGNORED,))  # labels hold ids
    splits = Splits(lists={split: f"{split}.txt" for split in ids})
    file = FolderFile(folder, ".", "images/{id}.tif", "labels/{id}.tif", numbered, splits)
    write_json(folder / NAME, file.to_record())


def _items(source: Path) -> Iterator[tuple[str, Item]]:
    for split in (TRAIN, VAL):
        for item in dubai.find_items(source, split, SplitChoice()):
            yield split, item


def _scenes(source: Path) -> Iterator[Picture]:
    """Yield the joined scenes, shrunk."""
    reader = PairReader(dubai.DUBAI)
    for split, item in _items(source):
        yield _shrunk(split, item.id, *reader.read(item))


def _parts(source: Path) -> Iterator[Picture]:
    """Yield the published parts of the scenes, shrunk."""
    reader = PairReader(dubai.DUBAI)
    for split, item in _items(source):
        for number, (image, label) in enumerate(item.pairs(), 1):
            part = item._replace(id=f"{item.id}_{number}", image=image, label=label)
            yield _shrunk(split, part.id, *reader.read(part))


def _shrunk(split: str, id_: str, image: Tensor, label: Tensor | None) -> Picture:
    """Shrink an image (3, H, W) by the mean of its pixels and its ids (H, W) to the nearest."""
    if label is None:
        raise InputError(f"{id_} has no label")
    height, width = (side // SHRINK for side in label.shape)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return Picture(split, id_, small, shrink_label(label, (height, width)).numpy())


def _made_up() -> Iterator[Picture]:
    """Yield made-up scenes."""
    index = 0
    for split, count in COUNTS.items():
        for _ in range(count):
            yield Picture(split, f"scene{index:02d}", *synthetic.draw_scene(SEED, index, SIDE))
            index += 1
