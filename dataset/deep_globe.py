"""DeepGlobe land cover (Demir et al. 2018): 2448 x 2448 satellite images, seven classes, in either of its layouts."""

import csv
import logging
import re
from pathlib import Path

from dataset.base import Item
from dataset.layout import files_by_id, natural, paired
from utils.classes import Classes
from utils.errors import InputError

DEEP_GLOBE = Classes(
    names=("unknown", "urban", "agriculture", "rangeland", "forest", "water", "barren"),
    palette=((0, 0, 0), (0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255)),
    left_out=(0,),
)

UNLABELLED = "offical_crossvali"
"""The unlabelled split, spelt as in the prepared layout."""

SPLITS = ("train", "crossvali", "test", UNLABELLED)

_IMAGE, _LABEL = re.compile("(.+)_sat"), re.compile("(.+)_mask")
_LAYOUTS = (
    "prepared (train/Sat/ID_sat.jpg, train/Label/ID_mask.png, crossvali/Sat, crossvali/Label) "
    "or distributed (all ID_sat.jpg and ID_mask.png in the folder itself, in land-train or in train)"
)
_SOURCE = (
    "DeepGlobe is handed out at http://deepglobe.org; `python -m dataset.synthetic --help` tells how to make a stand-in"
)


def published_splits() -> dict[str, str]:
    """The split (train, crossvali or test) of every published id, in the order of the lists."""
    with (Path(__file__).parent / "splits" / "deep_globe.csv").open(newline="") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file)}


def find_items(root: Path, split: str) -> list[Item]:
    """Images and labels of `split`, one of `SPLITS`, in whichever layout `root` has; ids in numeric order.

    Raises InputError when `root` has neither layout, the split is empty, or a labelled split lacks labels.
    """
    if any((root / name / "Sat").is_dir() for name in SPLITS):
        folder, label_folder = root / split / "Sat", root / split / "Label"
        images = files_by_id(folder, _IMAGE)
    else:
        folder = label_folder = _distributed_folder(root)
        images = _listed(folder, files_by_id(folder, _IMAGE), split)
    if not images:
        raise InputError(f"split {split} is empty: no ID_sat.jpg of it in {folder}; {_SOURCE}", "empty split")
    if split == UNLABELLED:
        return [Item(id_, images[id_], None) for id_ in sorted(images, key=natural)]
    labels = files_by_id(label_folder, _LABEL, (".png", ".tif", ".tiff", ".bmp"))
    return paired(images, images, labels, f"ID_mask.png in {label_folder}")


def _distributed_folder(root: Path) -> Path:
    for folder in (root, root / "land-train", root / "train"):
        if files_by_id(folder, _IMAGE):
            return folder
    state = "has no DeepGlobe images" if root.is_dir() else "is no folder"
    raise InputError(f"{root} {state}; expected is either layout: {_LAYOUTS}. {_SOURCE}")


def _listed(folder: Path, images: dict[str, Path], split: str) -> dict[str, Path]:
    """Return the `images` of a split of the published lists; log once how many are unlisted or missing."""
    lists = published_splits()
    wanted = [id_ for id_, name in lists.items() if name == split]
    found = {id_: images[id_] for id_ in wanted if id_ in images}
    unlisted, missing = len(images.keys() - lists.keys()), len(wanted) - len(found)
    if found and (unlisted or missing):
        logging.warning(
            f"{folder}: {missing} of the {len(wanted)} images listed for {split} are not there, and {unlisted} images "
            "there are in no list; going on without"
        )
    return found
