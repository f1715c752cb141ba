"""The images of `experiments.ablation`, at a size that two cores train: pages, real scenes shrunk, and made-up ones."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import deep_globe, dubai, synthetic
from dataset.folder import NAME, FolderFile, Splits
from dataset.layout import TRAIN, VAL, SplitChoice, read_list
from dataset.pairs import PairReader
from experiments.ablation_plan import Recipe
from utils.classes import IGNORED, Classes
from utils.errors import InputError, required
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

Lists = dict[str, list[str]]
"""Ids of images by split."""

Picture = tuple[str, str, np.ndarray, np.ndarray]
"""Split, id, image (H, W, 3) uint8, and its class ids (H, W) uint8."""

TRAINING, SHRUNK = "training.json", "shrunk.json"
"""The files of a fold's data set that training reads: they validate one image, as runs are evaluated by themselves. The
second names the same images at a smaller size, for stage 1, which reads shrunk images alone."""


def prepare(data: str, recipe: Recipe, source: Path | None, folder: Path, shrunk: Path | None = None) -> None:
    """Write the data sets of an experiment, unless they are there: one folder for each fold, named by its number.

    Folds of pages are of books: each validates some of them and trains on all others. Other data sets have one split,
    and folds that differ by their seeds.

    Args:
        data: a key of `RECIPES`.
        recipe: says how many folds there are, and what an image belongs to.
        source: of pages, the data set that `dataset.alto` wrote; of Dubai, the published set.
        folder: of the data sets, which `--dataset folder` reads.
        shrunk: of pages, the same set at a smaller height; by default `source`.

    Raises:
        InputError: a source is not named, or cannot be used.
    """
    if folder.is_dir():
        return
    beside = folder.with_name(f"{folder.name}.part")  # renamed when complete
    shutil.rmtree(beside, ignore_errors=True)
    if data == "synthetic":
        described, ids = _write(beside / "scenes", deep_globe.DEEP_GLOBE, _made_up())
        lists = [ids] * recipe.folds
    elif source is None:
        raise InputError(f"--data {data} needs --data_path: the folder of the data set")
    elif data == "dubai":
        described, ids = _write(beside / "scenes", dubai.DUBAI, _scenes(source))
        lists = [ids] * recipe.folds
    else:
        described = FolderFile.read(source)
        if not described.splits.lists:
            raise InputError(
                f"{described.folder / NAME} names no lists of images; make the set by python -m dataset.alto"
            )
        listed = {id_ for path in described.splits.lists.values() for id_ in read_list(described.folder / path)}
        lists = deal(sorted(listed), recipe)
    small = described if shrunk is None else FolderFile.read(shrunk)
    for number, of_fold in enumerate(lists):
        _write_lists(beside / str(number), of_fold, {NAME: described})
        of_training = {TRAIN: of_fold[TRAIN], "one": of_fold[VAL][:1]}
        _write_lists(beside / str(number), of_training, {TRAINING: described, SHRUNK: small})
    beside.rename(folder)


def deal(ids: Sequence[str], recipe: Recipe) -> list[Lists]:
    """Return the lists of each fold: the k-th validates the images of groups k, k + folds, ... in order of names.

    Raises InputError if there are fewer groups than folds.
    """
    groups = sorted({recipe.group(id_) for id_ in ids})
    if len(groups) < recipe.folds:
        raise InputError(f"{recipe.folds} folds need as many books, and there are {len(groups)}: {', '.join(groups)}")
    return [
        {
            TRAIN: [id_ for id_ in ids if recipe.group(id_) not in held_back],
            VAL: [id_ for id_ in ids if recipe.group(id_) in held_back],
        }
        for held_back in (groups[number :: recipe.folds] for number in range(recipe.folds))
    ]


def _write_lists(folder: Path, ids: Lists, files: Mapping[str, FolderFile]) -> None:
    """Write lists of images, the first for training, the second for validation, and files of sets that have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, listed in ids.items():
        (folder / f"{name}.txt").write_text("".join(f"{id_}\n" for id_ in listed))
    splits = Splits(lists={split: f"{name}.txt" for split, name in zip((TRAIN, VAL), ids, strict=True)})
    for name, file in files.items():
        root = os.path.relpath((file.folder / file.root).resolve(), folder.resolve())
        write_json(folder / name, replace(file, folder=folder, root=root, splits=splits).to_record())


def _write(folder: Path, classes: Classes, pictures: Iterable[Picture]) -> tuple[FolderFile, Lists]:
    """Write images and ids as TIFF files, which windows are read from; return their description, and their ids."""
    ids: Lists = {}
    for split, id_, *arrays in tqdm(pictures, desc=f"images to {folder}", unit="image"):
        for kind, pixels in zip(("images", "labels"), arrays, strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{id_}.tif")
        ids.setdefault(split, []).append(id_)
    numbered = replace(classes, values=(), ignored=(IGNORED,))  # labels hold ids
    return FolderFile(folder, ".", "images/{id}.tif", "labels/{id}.tif", numbered, Splits()), ids


def _scenes(source: Path) -> Iterator[Picture]:
    """Yield the joined scenes, shrunk: images by the mean of their pixels, ids to the nearest."""
    reader = PairReader(dubai.DUBAI)
    for split in (TRAIN, VAL):
        for item in dubai.find_items(source, split, SplitChoice()):
            image, label = reader.read(item)
            ids = required(label, f"label of {item.id}")
            height, width = (side // SHRINK for side in ids.shape)
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
            yield split, item.id, small, shrink_label(ids, (height, width)).numpy()


def _made_up() -> Iterator[Picture]:
    for index in range(sum(COUNTS.values())):
        split = TRAIN if index < COUNTS[TRAIN] else VAL
        yield split, f"scene{index:02d}", *synthetic.draw_scene(SEED, index, SIDE)
