"""ISIC lesion segmentation (Codella et al. 2018): dermoscopic images of 0.5 to 30 megapixels, lesion or skin."""

import re
from pathlib import Path

from dataset.base import Item
from dataset.layout import SPLITS, TEST, VAL, SplitChoice, files_by_id, hashed_split, listed, lists_in, paired
from utils.classes import Classes
from utils.errors import InputError, shortened

ISIC = Classes(
    names=("skin", "lesion"),
    palette=((0, 0, 0), (255, 255, 255)),
    left_out=(0,),
    values=(0, 255),
    ignored=(),
    foreground=(1,),
    measures=("jaccard", "thresholded_jaccard", "accuracy"),
)
"""The challenge averages the lesions' Jaccard index over images; since 2018 an image below 0.65 counts 0."""

FRACTIONS = {VAL: 0.1, TEST: 0.1}
"""Of a split by hash; the rest is for training."""

LAYOUT = (
    "ISIC_0000000.jpg ... with ISIC_0000000_segmentation.png ..., in the folder itself or in those directly in it, "
    "such as images and masks, or ISIC-2017_Training_Data and ISIC-2017_Training_Part1_GroundTruth"
)

_IMAGE = re.compile("(ISIC_[0-9]+)")
_LABEL = re.compile("(ISIC_[0-9]+)_segmentation", re.IGNORECASE)


def find_items(root: Path, split: str, choice: SplitChoice) -> list[Item]:
    """Images and labels of `split`: by the lists of `choice`, or by a hash of the id.

    Raises InputError when `root` has another layout, labels are missing, or the lists do not fit.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    for folder in folders:
        files_by_id(folder, _IMAGE, (".jpg", ".jpeg"), images)
        files_by_id(folder, _LABEL, (".png",), labels)
    if not images:
        raise InputError(f"{root} has no images of ISIC; expected is {LAYOUT}")
    if choice.lists is not None:
        ids = listed(images, lists_in(choice.lists, SPLITS), split)
    else:
        ids = [id_ for id_ in images if hashed_split(id_, FRACTIONS, 0) == split]
    if not ids:
        raise InputError(
            f"split {split} is empty: the hash puts none of {len(images)} images there ({shortened(list(images))}); "
            "give lists of ids by --split_lists",
            "empty split",
        )
    return paired(ids, images, labels, LAYOUT)
