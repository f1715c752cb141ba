"""A data set of one's own: images and labels in folders, as a JSON file describes them (see `folder_file`)."""

import re
from pathlib import Path

from dataset.base import Item
from dataset.folder_file import FolderFile
from dataset.layout import RARE_SUFFIXES, files_by_id, hashed_split, listed, paired
from utils.errors import InputError


def find_items(file: FolderFile, split: str) -> list[Item]:
    """Images and labels of `split`, one of `file.splits.names()`.

    Raises InputError when there are none, labels are missing, or lists do not fit.
    """
    images, labels = find_files(file, split)
    splits = file.splits
    if splits.lists:
        ids = listed(images, {name: file.folder / path for name, path in splits.lists.items()}, split)
    elif splits.folders:
        ids = list(images)
    else:
        ids = [id_ for id_ in images if hashed_split(id_, splits.fractions, splits.seed) == split]
    if not ids:
        raise InputError(
            f"split {split} is empty: the hash puts none of {len(images)} images there; change splits.seed in the "
            "data set's file, or give lists",
            "empty split",
        )
    return paired(ids, images, labels, f"{file.labels} for each {file.images} in {file.folder / file.root}")


def find_files(file: FolderFile, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """All images and all labels by id; of `split` alone where each split has its folders.

    A file that fits both patterns belongs to the one with more text: x_mask.png is a label of {id}_mask.png, not
    an image of {id}.png. Raises InputError when there is no image.
    """
    root = file.folder / file.root
    images = _matching(root, file.images, file.splits.folders.get(split))
    labels = _matching(root, file.labels, file.splits.folders.get(split))
    general, special = (images, labels) if len(file.labels) > len(file.images) else (labels, images)
    shared = set(special.values())
    for id_ in [id_ for id_, path in general.items() if path in shared]:
        del general[id_]
    if not images:
        place = root / file.images.replace("{split}", file.splits.folders.get(split, ""))
        raise InputError(f"no file is called {place}; mend root and images in the data set's file")
    return images, labels


def _matching(root: Path, pattern: str, split_folder: str | None) -> dict[str, Path]:
    """The files by id that `pattern` names below `root`, with `split_folder` for {split}."""
    path = root / pattern.replace("{split}", split_folder or "")
    stem, suffix = path.name.rsplit(".", 1)
    name = re.compile("(.+)".join(re.escape(part) for part in stem.split("{id}")))
    if suffix != "*":
        return files_by_id(path.parent, name, (f".{suffix.lower()}",))
    found = files_by_id(path.parent, name)
    # beside a picture of the same name, a .vrt or .gif is made from it
    return found | files_by_id(path.parent, name, RARE_SUFFIXES, known=found)
