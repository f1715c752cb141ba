"""Inria Aerial Image Labeling (Maggiori et al. 2017): buildings in 5000 x 5000 aerial images of five cities."""

import re
from pathlib import Path

from dataset.base import Item
from dataset.layout import SPLITS, TEST, TRAIN, VAL, SplitChoice, files_by_id, listed, lists_in, natural, paired
from utils.classes import Classes
from utils.errors import InputError

INRIA = Classes(
    names=("background", "building"),
    palette=((0, 0, 0), (255, 255, 255)),
    left_out=(0,),
    values=(0, 255),
    ignored=(),
    foreground=(1,),
    measures=("accuracy",),
)
"""The benchmark counts over all pixels: IoU of buildings, which is the mIoU without background, and accuracy."""

LAYOUT = "train/images/CITY1.tif ... with train/gt/CITY1.tif ..., unlabelled test/images/CITY1.tif ..."

VALIDATION_TILES = 5
"""The set's authors recommend the first five tiles of each city for validation."""

_SUFFIXES = (".tif", ".tiff", ".png")
_ANY = re.compile("(.+)")
_TILE = re.compile("[a-z-]+([0-9]+)")


def find_items(root: Path, split: str, choice: SplitChoice) -> list[Item]:
    """Images and labels of `split`: by the authors' recommendation, or by the lists of `choice`.

    Raises InputError when `root` has another layout, labels are missing, or the lists do not fit.
    """
    inner = root / "AerialImageDataset"  # what the archive unpacks to
    root = inner if inner.is_dir() else root
    unlabelled = split == TEST and choice.lists is None
    folder = root / ("test" if unlabelled else "train") / "images"
    images = files_by_id(folder, _ANY, _SUFFIXES)
    if not images:
        raise InputError(f"{folder} has no .tif images; expected is {LAYOUT}", "empty split")
    if unlabelled:
        return [Item(id_, images[id_], None) for id_ in sorted(images, key=natural)]
    if choice.lists is not None:
        ids = listed(images, lists_in(choice.lists, SPLITS), split)
    else:
        ids = [id_ for id_, path in images.items() if (_tile(id_, path) <= VALIDATION_TILES) == (split == VAL)]
    if not ids:
        raise InputError(
            f"split {split} is empty: {folder} has none of its tiles; "
            f"tiles 1 to {VALIDATION_TILES} of each city are {VAL}, the others {TRAIN}, unless lists say otherwise",
            "empty split",
        )
    return paired(ids, images, files_by_id(folder.with_name("gt"), _ANY, _SUFFIXES), LAYOUT)


def _tile(id_: str, path: Path) -> int:
    """Return the tile's number within its city."""
    match = _TILE.fullmatch(id_)
    if match is None:
        raise InputError(
            f"{path}: the name is not a city and a number, such as tyrol-w12, so its split is not known; "
            "rename it, or give lists of ids by --split_lists"
        )
    return int(match[1])
