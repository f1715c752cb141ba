"""The data sets by name: what each is, and how to open one that lies on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataset import deep_globe, dubai, folder, inria, isic
from dataset.base import Item, SegmentationDataset
from dataset.folder import FolderFile
from dataset.layout import SPLITS, TEST, TRAIN, VAL, SplitChoice
from utils.classes import Classes
from utils.errors import InputError
from utils.stretch import spell_bands

NAMES = ("deep_globe", "inria", "isic", "dubai", "folder")
"""The values of `--dataset`."""


@dataclass(frozen=True)
class Description:
    """A data set where it lies: all that training, evaluation and reports need to know of it.

    `splits` are its parts, `validation` the one that follows every epoch, `unlabelled` those without labels. `size_p`
    (pixels) and `batch_size` (images) are the published settings. `find` gives a split's items. `bands` and `stretch`
    are those of the set's own file, as the options of these names spell them; None where it has none.
    """

    name: str
    title: str
    classes: Classes
    find: Callable[[str], list[Item]]
    splits: tuple[str, ...] = SPLITS
    validation: str = VAL
    unlabelled: tuple[str, ...] = ()
    size_p: int = 508
    batch_size: int = 6
    bands: str | None = None
    stretch: str | None = None

    def open(self, split: str, size_g: int, classes: Classes | None = None, **more: Any) -> SegmentationDataset:
        """The images of `split`; `classes` replaces the set's own, `more` are arguments of `SegmentationDataset`.

        Raises InputError for a split that it does not have, and as its `find` does for what is wrong on disk.
        """
        if split not in self.splits:
            raise InputError(f"--split {split}: {self.title} has {', '.join(self.splits)}")
        return SegmentationDataset(self.find(split), classes or self.classes, size_g, **more)

    def labelled_split(self, given: str | None) -> str:
        """Return the given split, by default the one for validation. Raises InputError if it has no labels."""
        split = given or self.validation
        if split in self.unlabelled:
            raise InputError(f"--split {split} has no labels, and so no mIoU; take another")
        return split

    @property
    def labels_are_ids(self) -> bool:
        """Whether the grey values of labels are the ids themselves, so that there may be another number of them."""
        return self.classes.values == tuple(range(len(self.classes)))

    def classes_for(self, n_class: int | None) -> Classes:
        """The set's classes, or numbered ones where another number is asked for.

        Raises InputError where labels hold no ids that could be numbered.
        """
        if n_class in (None, len(self.classes)):
            return self.classes
        if not self.labels_are_ids:
            raise InputError(f"--n_class {n_class}: {self.title} has {len(self.classes)} classes; leave it out")
        return Classes.generic(n_class)


def describe(name: str, root: Path, choice: SplitChoice | None = None) -> Description:
    """The data set `name` at `root`; of `folder`, `root` is its JSON file or the folder that holds it.

    Raises InputError for a name that is none, a JSON file that is wrong, and a `choice` that the set does not leave.
    """
    if name not in NAMES:
        raise InputError(f"--dataset {name} is none of {', '.join(NAMES)}")
    choice = choice or SplitChoice()
    if choice.lists is not None and name not in ("inria", "isic", "dubai"):
        instead = "names lists in its file" if name == "folder" else "has published lists"
        raise InputError(f"--split_lists goes with inria, isic and dubai; {name} {instead}")
    if choice.hold_out is not None and (name != "dubai" or choice.lists is not None):
        raise InputError("--hold_out goes with dubai, where no lists are given; other sets have enough images to split")
    match name:
        case "deep_globe":
            return Description(
                name,
                "DeepGlobe",
                deep_globe.DEEP_GLOBE,
                partial(deep_globe.find_items, root),
                splits=deep_globe.SPLITS,
                validation="crossvali",
                unlabelled=(deep_globe.UNLABELLED,),
            )
        case "inria":
            find = partial(inria.find_items, root, choice=choice)
            unlabelled = () if choice.lists else (TEST,)
            title = "Inria Aerial Image Labeling"
            return Description(name, title, inria.INRIA, find, unlabelled=unlabelled, size_p=536, batch_size=4)
        case "isic":
            find = partial(isic.find_items, root, choice=choice)
            return Description(name, "ISIC lesion segmentation", isic.ISIC, find)
        case "dubai":
            find = partial(dubai.find_items, root, choice=choice)
            parts = SPLITS if choice.hold_out is None else (TRAIN, VAL)
            return Description(name, "Dubai aerial imagery", dubai.DUBAI, find, parts, batch_size=2)
    file = FolderFile.read(root)
    splits = file.splits.names()
    return Description(
        name,
        str(root),
        file.classes,
        partial(folder.find_items, file),
        splits,
        # without images held back there is nothing else to validate on
        validation=VAL if VAL in splits else TRAIN,
        bands=None if file.bands is None else spell_bands(file.bands),
        stretch=None if file.stretch is None else str(file.stretch),
    )
