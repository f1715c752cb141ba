"""The data sets by name: what each is, and how to open one that lies on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset import deep_globe, dubai, folder, inria, isic
from dataset.base import Item, SegmentationDataset
from dataset.folder import FolderFile
from dataset.layout import TEST, TRAIN, VAL, SplitChoice
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
    splits: tuple[str, ...]
    validation: str
    unlabelled: tuple[str, ...]
    size_p: int
    batch_size: int
    find: Callable[[str], list[Item]]
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


class _Published(NamedTuple):
    """A published data set: see `Description`; `module` has its `SPLITS` and `find_items`."""

    title: str
    classes: Classes
    module: Any
    validation: str = VAL
    unlabelled: tuple[str, ...] = ()
    size_p: int = 508
    batch_size: int = 6


_PUBLISHED: Mapping[str, _Published] = {
    "deep_globe": _Published(
        "DeepGlobe", deep_globe.DEEP_GLOBE, deep_globe, validation="crossvali", unlabelled=(deep_globe.UNLABELLED,)
    ),
    "inria": _Published(
        "Inria Aerial Image Labeling", inria.INRIA, inria, unlabelled=(TEST,), size_p=536, batch_size=4
    ),
    "isic": _Published("ISIC lesion segmentation", isic.ISIC, isic),
    "dubai": _Published("Dubai aerial imagery", dubai.DUBAI, dubai, batch_size=2),
}


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
    if name == "folder":
        return _folder(root)
    published = _PUBLISHED[name]
    return Description(
        name=name,
        title=published.title,
        classes=published.classes,
        splits=published.module.SPLITS if choice.hold_out is None else (TRAIN, VAL),
        validation=published.validation,
        unlabelled=() if choice.lists else published.unlabelled,
        size_p=published.size_p,
        batch_size=published.batch_size,
        find=partial(published.module.find_items, root, choice=choice),
    )


def _folder(root: Path) -> Description:
    file = FolderFile.read(root)
    splits = file.splits.names()
    return Description(
        name="folder",
        title=str(root),
        classes=file.classes,
        splits=splits,
        # without images held back there is nothing else to validate on
        validation=VAL if VAL in splits else TRAIN,
        unlabelled=(),
        size_p=508,
        batch_size=6,
        find=partial(folder.find_items, file),
        bands=None if file.bands is None else spell_bands(file.bands),
        stretch=None if file.stretch is None else str(file.stretch),
    )
