"""Finding images and labels in folders, and dealing them out to splits: what the data sets share."""

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.base import Item
from imaging.probe import IMAGE_SUFFIXES
from utils.errors import InputError, shortened

SPLITS = TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True)
class SplitChoice:
    """Chooses how images are assigned to splits, if the data set leaves that open; None is the set's own rule.

    `lists` is a folder that holds train.txt, val.txt and test.txt, as far as they are needed, with an id a line.
    `hold_out` is the id of the only image that is for validation.
    """

    lists: Path | None = None
    hold_out: str | None = None


def files_by_id(
    folder: Path,
    name: re.Pattern[str],
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    into: dict[str, Path] | None = None,
    known: Container[str] = (),
) -> dict[str, Path]:
    """Add the files of `folder` to `into` by id, and return it: group 1 of `name`, which must match the whole stem.

    Hidden files, other suffixes and `known` ids are passed over. Raises InputError where two files have one id.
    """
    found = {} if into is None else into
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = name.fullmatch(path.stem)
        if match is None or path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        id_ = match[1]
        if id_ in known:
            continue
        if id_ in found:
            raise InputError(f"{path} and {found[id_]} are both {id_}'s; keep one of them")
        found[id_] = path
    return found


def paired(ids: Iterable[str], images: Mapping[str, Path], labels: Mapping[str, Path], expected: str) -> list[Item]:
    """Return image and label of each of `ids`, in natural order. Raises InputError if one is missing."""
    ids = sorted(ids, key=natural)
    bare = [str(images[id_]) for id_ in ids if id_ not in labels]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(ids)} images have no label: {shortened(bare)}; expected is {expected}. "
            "Add the labels, or take the images away or out of the lists"
        )
    return [Item(id_, images[id_], labels[id_]) for id_ in ids]


def natural(id_: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a sorting key that takes numbers in names by value: vienna2 comes before vienna10."""
    return tuple(
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", id_) if part
    )


def read_list(path: Path, known: Container[str] = ()) -> list[str]:
    """Return the ids of a text file, one a line, in order; those `known` are taken as they stand, whatever they hold.

    A byte order mark, blanks around ids, any line ends, empty lines, lines that start with # and what follows a blank
    and # are passed over. Raises InputError if the file cannot be read, or an id stands there twice.
    """
    try:
        text = decode_text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path} cannot be read: {reason}; a list holds an id a line, in UTF-8") from error
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    ids = [line if line in known else re.split(r"(?:^|\s+)#", line)[0] for line in lines]
    ids = [id_ for id_ in ids if id_]
    twice = sorted(id_ for id_, count in Counter(ids).items() if count > 1)
    if twice:
        raise InputError(f"{path}: {shortened(twice)} stands there more than once; name each image once")
    return ids


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 with its byte order mark; names of files in it may hold any bytes but 0.

    Raises UnicodeDecodeError for what is no text.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if b"\0" in content:
        raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), content.index(b"\0") + 1, "a byte of 0")
    return content.decode("utf-8-sig", "surrogateescape")


def lists_in(folder: Path, splits: Iterable[str]) -> dict[str, Path]:
    """Return the list files SPLIT.txt in `folder`. Raises InputError if there is none."""
    found = {split: folder / f"{split}.txt" for split in splits if (folder / f"{split}.txt").is_file()}
    if not found:
        names = ", ".join(f"{split}.txt" for split in splits)
        raise InputError(f"{folder} holds no lists; expected are {names}, as far as they are needed, with an id a line")
    return found


def listed(images: Mapping[str, Path], lists: Mapping[str, Path], split: str) -> list[str]:
    """Return the ids in the list file of `split`, all of which must be among `images`.

    Raises InputError when there is no such list, an image is missing, or an image is in two lists.
    """
    if split not in lists:
        raise InputError(f"split {split} has no list; there are {', '.join(map(str, lists.values()))}", "empty split")
    ids = {name: read_list(path, images) for name, path in lists.items()}
    if not ids[split]:
        raise InputError(f"{lists[split]} is empty; a list holds an id a line, such as {shortened(list(images), 1)}")
    for name, others in ids.items():
        both = sorted(set(others) & set(ids[split]), key=natural)
        if name != split and both:
            raise InputError(
                f"{lists[split]} and {lists[name]} share {len(both)} ids ({shortened(both)}); "
                "an image belongs to one split only"
            )
    missing = [id_ for id_ in ids[split] if id_ not in images]
    if missing:
        known = f"such as {shortened(sorted(images, key=natural), 2)}" if images else "of which there is none"
        raise InputError(
            f"{lists[split]}: {len(missing)} of {len(ids[split])} ids have no image ({shortened(missing)}); "
            f"a list names images by their ids, {known}"
        )
    return ids[split]


def hashed_split(id_: str, fractions: Mapping[str, float], seed: int) -> str:
    """Return the split of an image: by chance, but the same for the same `id_`, `fractions` and `seed`.

    Each split gets about its fraction, `train` the rest. No other image matters: adding some moves none from
    one split to another.
    """
    # ids come from names of files, which are bytes
    digest = hashlib.sha256(f"{seed}:{id_}".encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    for split, fraction in fractions.items():
        if share < fraction:
            return split
        share -= fraction
    return TRAIN
