"""The JSON file that describes a data set of one's own: where its files lie, its classes, and its splits.

    {
      "root": ".",
      "images": "images/{id}.jpg",
      "labels": "masks/{id}_mask.png",
      "classes": [
        {"name": "skin", "value": 0, "counts": false},
        {"name": "lesion", "value": 255, "color": [255, 255, 255], "foreground": true}
      ],
      "ignored": [],
      "measures": ["jaccard"],
      "splits": {"fractions": {"val": 0.2}, "seed": 0},
      "bands": [4, 3, 2, 8],
      "stretch": "0,10000"
    }

`bands` and `stretch` may be left out; they are what the options of these names are without the command line.
`python -m dataset.describe` writes such a file from looking at the labels. `root`, and the lists of splits, are taken
from where the file lies.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.base import Item
from dataset.layout import SPLITS, TEST, TRAIN, VAL, decode_text, files_by_id, hashed_split, listed, paired
from imaging.probe import IMAGE_SUFFIXES, RARE_SUFFIXES
from utils.classes import IGNORED, Classes, Color, distinct_colors
from utils.errors import InputError
from utils.metrics import MEASURES, PER_IMAGE_MEASURES
from utils.stretch import MOST_BANDS, Bands, Stretch

NAME = "dataset.json"
"""The file's name where only its folder is given."""

MAX_CLASSES = 250
MAX_VALUE = 65535

_NAME_PATTERN = re.compile(r"[^/{}*]*\{id\}[^/{}*]*\.([a-z0-9]+|\*)", re.IGNORECASE)


@dataclass(frozen=True)
class Splits:
    """Holds the rule by which images are assigned to splits, one of three.

    `lists` gives text files with an id a line, `folders` what stands for `{split}` in the patterns, `fractions` the
    parts of val and test in a split by hash with `seed`, the rest being train.
    """

    lists: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)
    fractions: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def names(self) -> tuple[str, ...]:
        """Return the names of the splits."""
        given: Mapping[str, object] = self.lists or self.folders or {TRAIN: 1.0, **self.fractions}
        return tuple(name for name in SPLITS if name in given)

    def to_record(self) -> dict[str, Any]:
        given = {name: dict(getattr(self, name)) for name in ("lists", "folders") if getattr(self, name)}
        return given or {"fractions": dict(self.fractions), "seed": self.seed}


@dataclass(frozen=True)
class FolderFile:
    """Holds the file's entries. Patterns are paths below `root` with `{id}` in the last part; `.*` is any suffix.

    `root` is as written in the file, relative to `folder`, where the file lies. `bands` and `stretch` are None where
    the file does not give them.
    """

    folder: Path
    root: str
    images: str
    labels: str
    classes: Classes
    splits: Splits
    bands: Bands | None = None
    stretch: Stretch | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the contents of the file."""
        classes, recorded = self.classes, self.classes.to_record()
        record: dict[str, Any] = {
            "root": self.root,
            "images": self.images,
            "labels": self.labels,
            "classes": [
                {
                    "name": name,
                    "value": classes.values[k],
                    "color": recorded["palette"][k],
                    "counts": k not in classes.left_out,
                    "foreground": k in classes.foreground,
                }
                for k, name in enumerate(classes.names)
            ],
            "ignored": recorded["ignored"],
            "measures": recorded["measures"],
            "splits": self.splits.to_record(),
        }
        record |= {} if self.bands is None else {"bands": list(self.bands)}
        return record | ({} if self.stretch is None else {"stretch": str(self.stretch)})

    @classmethod
    def read(cls, path: Path) -> "FolderFile":
        """Read the file, or `dataset.json` in the folder `path`.

        Raises InputError, naming the file and the entry, when it is missing, no JSON, or an entry breaks a rule.
        """
        path = path / NAME if path.is_dir() else path
        try:
            # a line that starts with // or # can be no part of JSON
            record = json.loads(re.sub(r"(?m)^\s*(//|#).*$", "", decode_text(path.read_bytes())))
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}; `python -m dataset.describe --help` tells how to make it"
            ) from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}; mend it, or write it anew by dataset.describe") from error
        try:
            return cls.from_record(record, path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_record(cls, record: Any, folder: Path) -> "FolderFile":
        """Return the inverse of `to_record`. Raises InputError, with the name of the entry, if a rule is broken."""
        known = ("root", "images", "labels", "classes", "ignored", "measures", "splits", "bands", "stretch")
        _known_keys(record, "the file", known)
        splits = _splits(record.get("splits", {"fractions": {VAL: 0.2}}))
        images, labels = (check_pattern(record.get(key), key, splits) for key in ("images", "labels"))
        if images == labels:
            raise InputError(f"images and labels are both {images}; they must be different files")
        root = record.get("root", ".")
        if not isinstance(root, str):
            raise InputError("root must be a folder's path, such as '.'")
        classes = _classes(record.get("classes"), record.get("ignored"), record.get("measures", []))
        bands, stretch = record.get("bands"), record.get("stretch")
        if bands is not None:
            numbered = isinstance(bands, list) and all(_is_value(number) and number for number in bands)
            if not numbered or not 1 <= len(bands) <= MOST_BANDS:
                raise InputError(
                    f"bands {bands!r} must be a list of 1 to {MOST_BANDS} numbers from 1, such as [4, 3, 2, 8]"
                )
            bands = tuple(bands)
        if stretch is not None:
            try:
                stretch = Stretch.parse(stretch)
            except (InputError, AttributeError):  # another text, or none
                raise InputError(
                    f"stretch {stretch!r} must be a text: two rising percentiles ('2%,98%') or two rising values "
                    "('0,10000')"
                ) from None
        return cls(folder, root, images, labels, classes, splits, bands, stretch)


def check_pattern(pattern: Any, key: str, splits: Splits) -> str:
    """Return `pattern`, the entry `key`. Raises InputError if it cannot name files."""
    if not isinstance(pattern, str) or not _NAME_PATTERN.fullmatch(pattern.rsplit("/", 1)[-1].replace("{split}", "")):
        raise InputError(
            f"{key} {pattern!r} must be a path whose last part has {{id}} once and a suffix (.* for any image's), "
            "such as 'images/{id}.jpg'"
        )
    if "{id}" in pattern.rpartition("/")[0]:
        raise InputError(f"{key} {pattern!r} has {{id}} in a folder's name; only a file's name may have it")
    suffix = "." + pattern.rpartition(".")[2].lower()
    known = (*IMAGE_SUFFIXES, *RARE_SUFFIXES, ".*")
    if suffix not in known:
        raise InputError(f"{key} {pattern!r} ends in no image's suffix; use one of {', '.join(known)}")
    if ("{split}" in pattern) != bool(splits.folders):
        does, rule = ("has", "no") if "{split}" in pattern else ("lacks", "the")
        raise InputError(f"{key} {pattern!r} {does} {{split}}, but splits are given by {rule} folders")
    return pattern


def _known_keys(record: Any, where: str, known: Sequence[str]) -> None:
    """Raise InputError unless `record` is a mapping whose keys are all `known`: a misspelt one would do nothing."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where} must be an object with the entries {', '.join(known)}")
    unknown = [key for key in record if key not in known]
    if unknown:
        raise InputError(f"{where} has the unknown entry {unknown[0]!r}; known are {', '.join(known)}")


def _splits(record: Any) -> Splits:
    _known_keys(record, "splits", ("lists", "folders", "fractions", "seed"))
    rules = [key for key in ("lists", "folders", "fractions") if key in record]
    if len(rules) != 1:
        raise InputError(f"splits must have one of lists, folders and fractions, not {' and '.join(rules) or 'none'}")
    given, seed = record[rules[0]], record.get("seed", 0)
    named = (VAL, TEST) if rules[0] == "fractions" else SPLITS
    _known_keys(given, f"splits.{rules[0]}", named)
    if rules[0] != "fractions":
        if TRAIN not in given or not all(isinstance(value, str) and value for value in given.values()):
            raise InputError(f"splits.{rules[0]} must give a path for {TRAIN} and for what else there is")
    elif not all(_is_number(value) and 0 <= value < 1 for value in given.values()) or sum(given.values()) >= 1:
        raise InputError("splits.fractions must be 0 or more and together below 1, such as {'val': 0.2, 'test': 0.1}")
    if not isinstance(seed, int):
        raise InputError(f"splits.seed {seed!r} must be an integer")
    return Splits(**{rules[0]: dict(given)}, seed=seed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_value(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and 0 <= value <= MAX_VALUE


def _is_color(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_value(v) and v <= 255 for v in value)


def _classes(records: Any, ignored: Any, measures: Any) -> Classes:
    """Return the classes of the entries. Raises InputError if they are incomplete or contradict each other."""
    if not isinstance(records, list) or not 2 <= len(records) <= MAX_CLASSES:
        raise InputError(
            f"classes must be a list of 2 to {MAX_CLASSES} objects, such as {{'name': 'road', 'value': 1}}"
        )
    for k, record in enumerate(records):
        _check_class(record, f"classes[{k}]")
    given = [record["value"] for record in records if "value" in record]
    if given and len(given) < len(records):
        raise InputError("either all classes have a value, or none has: then their positions are the values")
    values = tuple(given or range(len(records)))
    if ignored is None:
        ignored = [] if IGNORED in values else [IGNORED]
    if not isinstance(ignored, list) or not all(_is_value(one) or _is_color(one) for one in ignored):
        raise InputError("ignored must be a list of grey values and colours, such as [255] or [[224, 224, 192]]")
    palette = _palette(records, values)
    spellings = [*values, *palette, *(one if isinstance(one, int) else tuple(one) for one in ignored)]
    if len(set(spellings)) < len(spellings):
        twice = next(one for one in spellings if spellings.count(one) > 1)
        raise InputError(f"{twice} stands for more than one of the classes and ignored; each needs its own")
    names = tuple(record["name"] for record in records)
    foreground = tuple(k for k, record in enumerate(records) if record.get("foreground", False))
    left_out = tuple(k for k, record in enumerate(records) if not record.get("counts", True))
    if len(set(names)) < len(names):
        raise InputError("two classes have the same name; give each its own")
    if len(left_out) == len(names):
        raise InputError("no class counts in the metric; let counts be true for one at least")
    if not isinstance(measures, list | tuple) or not all(name in MEASURES for name in measures):
        raise InputError(f"measures {measures!r} must be a list of names out of {', '.join(MEASURES)}")
    if not foreground and any(name in PER_IMAGE_MEASURES for name in measures):
        raise InputError(f"measures: {' and '.join(PER_IMAGE_MEASURES)} need a class with foreground true")
    if len(foreground) == len(names):
        raise InputError("every class is foreground; let one be background")
    return Classes(names, palette, left_out, values, tuple(spellings[2 * len(names) :]), foreground, tuple(measures))


def _check_class(record: Any, where: str) -> None:
    _known_keys(record, where, ("name", "value", "color", "counts", "foreground"))
    if not isinstance(record.get("name"), str) or not record["name"]:
        raise InputError(f"{where}.name must be a text")
    if not _is_value(record.get("value", 0)):
        raise InputError(f"{where}.value {record['value']!r} must be a grey value, 0..{MAX_VALUE}")
    if not _is_color(record.get("color", (0, 0, 0))):
        raise InputError(f"{where}.color {record['color']!r} must be three numbers 0..255, such as [255, 0, 0]")
    for key in ("counts", "foreground"):
        if not isinstance(record.get(key, True), bool):
            raise InputError(f"{where}.{key} {record[key]!r} must be true or false")


def _palette(records: Sequence[Mapping[str, Any]], values: Sequence[int]) -> tuple[Color, ...]:
    """Return the classes' colours; one that is not given is black or white for the value 0 or 255, else distinct."""
    taken = [tuple(record["color"]) for record in records if "color" in record]
    free = (color for color in distinct_colors(2 * len(records)) if color not in taken)
    made = (
        record.get("color") or ((value,) * 3 if value in (0, 255) else next(free))
        for record, value in zip(records, values, strict=True)
    )
    palette = tuple(tuple(color) for color in made)
    for color, value, record in zip(palette, values, records, strict=True):
        if "value" in record and len(set(color)) == 1 and color[0] != value and color[0] in values:
            raise InputError(
                f"class {record['name']} has the grey colour {list(color)}, which is another class's value; "
                "give it a colour that is no grey"
            )
    return palette


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
