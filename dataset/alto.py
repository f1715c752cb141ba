"""Makes a data set of scanned pages whose zones are marked in ALTO or PAGE XML.

    python -m dataset.alto books --output pages --height 1792

writes a set for `--dataset folder`: images, labels that hold class ids, lists of the splits and dataset.json. Labels of
zones are mapped to classes (see `dataset.zones`). Splits are by folder, since pages of one book look alike.
"""

import argparse
import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.folder import NAME, FolderFile
from dataset.layout import TEST, TRAIN, VAL, natural
from dataset.zones import SEGMONTO, Zone, ZoneFile, ZoneMapping, read_zones
from imaging.failures import writing
from imaging.image_file import open_image
from imaging.probe import IMAGE_SUFFIXES, FileInfo, probe
from utils.arguments import whole
from utils.classes import IGNORED
from utils.errors import InputError, exit_code, shortened
from utils.files import new_folder, write_json
from utils.tiling import Box

SHARE = 0.2
"""The part of the folders that is val, and that is test, where none are named."""

MOST_FAULTS = 10
"""How many faults an error names."""

FORMATS: dict[str, dict[str, Any]] = {"tif": {}, "png": {"compress_level": 1}, "jpg": {"quality": 95, "subsampling": 0}}
"""How images are saved, by suffix; the first is the default, as it is decoded fastest."""

_BESIDE_PICTURES = ("page", "alto", "xml")
"""Folders for XML alone, in lower case, whose pictures lie in the folder above."""


@dataclass(frozen=True)
class ScannedPage:
    """A page: its XML, its picture and its place in the set.

    `zones` are drawn in this order, with their class ids.
    """

    id: str
    book: str
    file: ZoneFile
    picture: FileInfo
    zones: list[tuple[int, Zone]]


@dataclass
class Findings:
    """What is wrong, and what the summary tells."""

    faults: list[str] = field(default_factory=list)
    unknown: dict[str, list[Path]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    other_files: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    placeless: int = 0

    def refuse(self, files: int) -> None:
        """Raise an InputError that names the faults, up to ten, if there are any."""
        if not self.faults:
            return
        if len(self.faults) == 1:
            raise InputError(self.faults[0])
        lines = [f"{len(self.faults)} faults in {files} files; nothing is written", *self.faults[:MOST_FAULTS]]
        lines += [f"and {len(self.faults) - MOST_FAULTS} more"] if len(self.faults) > MOST_FAULTS else []
        raise InputError("\n  ".join(lines))


def find_picture(file: ZoneFile, pictures: Callable[[Path], list[Path]]) -> Path:
    """Return the picture that a file names, else the one of `pictures`, those in a folder, with its stem.

    Raises InputError if there is not one.
    """
    folders = [file.path.parent]
    if file.path.parent.name.lower() in _BESIDE_PICTURES:
        folders.append(file.path.parent.parent)
    named = PurePosixPath(file.picture)
    # a path of another machine counts by its last part
    for name in () if not file.picture else (named.name,) if named.is_absolute() else (named, named.name):
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    found = [path for folder in folders for path in pictures(folder) if path.stem in (file.path.stem, named.stem)]
    if len(found) == 1:
        return found[0]
    missing = f"{file.picture}, which it names, is not there" if file.picture else "it names no picture"
    if found:
        names = shortened([path.name for path in found])
        raise InputError(f"{file.path}: {missing}, and there are {names}; keep one of them")
    raise InputError(
        f"{file.path}: {missing}, and there is no picture {file.path.stem}; put it into {folders[-1]}, "
        "or take the XML away"
    )


def _pictures(folder: Path) -> list[Path]:
    suffixes = (*IMAGE_SUFFIXES, ".jp2")
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".")]


def draw_zone(label: np.ndarray, outline: np.ndarray, value: int) -> None:
    """Set the pixels of `label` (H, W) whose centres lie within a polygon to `value`.

    `outline` holds its corners (n, 2) as x, y; the first pixel is from 0 to 1. Where sides cross, what is enclosed
    twice is outside.
    """
    height, width = label.shape
    top, bottom = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in (outline[:, 1].min(), outline[:, 1].max()))
    crossed = np.zeros((bottom - top, width + 1), np.uint8)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        low, high = min(y0, y1), max(y0, y1)
        centres = np.arange(top, bottom) + 0.5
        rows = np.flatnonzero((low <= centres) & (centres < high))
        x = x0 + (centres[rows] - y0) * (x1 - x0) / (y1 - y0) if len(rows) else centres[rows]
        # the first pixel whose centre is not left of the side
        crossed[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)] ^= 1
    inside = np.bitwise_xor.accumulate(crossed[:, :width], axis=1).astype(bool)
    label[top:bottom][inside] = value


def read_picture(picture: FileInfo, height: int | None) -> np.ndarray:
    """Read a page, shrunk by averaging areas if it is taller than `height`; (H, W) uint8 if it is grey, else
    (H, W, 3)."""
    with open_image(picture) as image:
        pixels = image.read(Box(0, 0, *image.size))
    grey = picture.bands < 3 and not picture.palette
    values = np.ascontiguousarray(pixels[0] if grey else pixels.permute(1, 2, 0))
    if height is None or picture.size[0] <= height:
        return values
    width = max(1, round(picture.size[1] * height / picture.size[0]))
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA)


def find_pages(options: argparse.Namespace, mapping: ZoneMapping, findings: Findings) -> list[ScannedPage]:
    """Read all XML files and the headers of their pictures; what is wrong with them is added to `findings`.

    Returns the pages in natural order of their ids, without those that are left out. Raises InputError if there is no
    XML file, or something is wrong with some; it names up to ten.
    """
    source: Path = options.source
    try:
        found = sorted(source.glob(options.files))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--files {options.files!r}: {error}; give a pattern below {source}, as '**/*.xml'") from error
    paths = [path for path in found if path.is_file() and not path.name.startswith(".")]
    if not paths:
        raise InputError(
            f"{source} holds no file {options.files}; name a folder of ALTO or PAGE XML, or --files PATTERN"
        )
    pages, taken = [], dict[str, Path]()
    pictures = functools.cache(_pictures)
    for path in tqdm(paths, desc="XML", unit="file", disable=options.quiet):
        try:
            file = read_zones(path)
            if file is None:
                findings.other_files.append(str(path))
                continue
            page = _page(source, file, probe(find_picture(file, pictures)), mapping, findings)
            for key in (page.id, str(page.picture.path.resolve())):
                if key in taken:
                    raise InputError(f"{path} and {taken[key]} both describe page {page.id}; keep one, or use --files")
                taken[key] = path
            pages.append(page)
        except InputError as error:
            findings.faults.append(str(error))
    if options.unknown == "refuse":
        findings.faults += [
            f"label {label!r} has no class (zones: {len(where)}, the first in {where[0]}); give it one by --mapping, "
            "or add --unknown ignore"
            for label, where in sorted(findings.unknown.items())
        ]
    findings.refuse(len(paths))
    kept = [page for page in pages if page.file.zones or options.empty == "keep"]
    findings.empty = [str(page.file.path) for page in pages if not page.file.zones]
    if not kept:
        raise InputError(f"{source}: none of {len(paths)} files has a zone; is it ALTO or PAGE XML with marked zones?")
    return sorted(kept, key=lambda page: natural(page.id))


def _page(source: Path, file: ZoneFile, picture: FileInfo, mapping: ZoneMapping, findings: Findings) -> ScannedPage:
    """Return a page. Raises InputError if the picture has another shape than the page in the XML."""
    height, width = file.size or picture.size
    if abs(picture.size[0] * width / (picture.size[1] * height) - 1) > 0.01:
        turned = ", as its EXIF data turn it" if picture.orientation > 1 else ""
        raise InputError(
            f"{file.path}: the page is {width:g} x {height:g}, but {picture.path} is {picture.size[1]} x "
            f"{picture.size[0]} pixels{turned}; use the picture that the zones were drawn on"
        )
    if (height, width) != picture.size:
        findings.scaled.append(str(file.path))
    findings.placeless += file.placeless
    drawn = []
    for zone in file.zones:
        id_ = mapping.find(zone.labels)
        if id_ is None:
            findings.unknown.setdefault(zone.labels[0], []).append(file.path)
        if id_ in (None, IGNORED):
            findings.ignored[zone.labels[0]] += 1
        drawn.append((IGNORED if id_ is None else id_, zone))
    drawn.sort(key=lambda one: one[0])  # stable: in one class as in the file
    # XML in a folder of its own belongs to the folder above, where the pictures are
    folder = file.path.parent.parent if file.path.parent.name.lower() in _BESIDE_PICTURES else file.path.parent
    book = folder.relative_to(source).as_posix() if folder.is_relative_to(source) else "."
    id_text = file.path.stem if book == "." else f"{book.replace('/', '_')}_{file.path.stem}"
    return ScannedPage(id_text, source.resolve().name if book == "." else book, file, picture, drawn)


def split_books(
    books: Iterable[str], val: Sequence[str] | None, test: Sequence[str] | None, seed: int
) -> dict[str, str]:
    """Return the split of each folder; one at least is for training.

    `val` and `test` name folders; None is a fifth of all, by a hash of seed and name, one at least. Raises InputError
    if a named folder is not there or in both, or none is left for training.
    """
    books = sorted(set(books), key=natural)
    splits: dict[str, str] = {}
    for split, names in ((TEST, test), (VAL, val)):
        for name in (given.rstrip("/") for given in names or ()):
            if name not in books:
                raise InputError(f"--{split} {name}: there is no such folder of pages; there are {', '.join(books)}")
            if splits.setdefault(name, split) != split:
                raise InputError(f"{name} is named by --{VAL} and by --{TEST}; a folder belongs to one split")
    free = [book for book in books if book not in splits]
    if not free:
        raise InputError(f"--{VAL} and --{TEST} name all {len(books)} folders; leave one for training")
    free.sort(key=lambda book: hashlib.sha256(f"{seed}:{book}".encode("utf-8", "surrogateescape")).digest())
    for split, names in ((VAL, val), (TEST, test)):
        if names is None:
            count = min(max(1, round(SHARE * len(books))), len(free) - 1)
            splits |= dict.fromkeys(free[:count], split)
            free = free[count:]
    return splits | dict.fromkeys(free, TRAIN)


def write_set(options: argparse.Namespace, mapping: ZoneMapping) -> str:
    """Write the set that `options` ask for and return a summary. Raises InputError; then nothing is written."""
    if not options.source.is_dir():
        raise InputError(f"{options.source} is not a folder; name one of ALTO or PAGE XML files with their pictures")
    record: dict[str, Any] = {
        "images": f"images/{{id}}.{options.format}",
        "labels": "labels/{id}.tif",
        "classes": list(mapping.classes),
        "measures": ["accuracy"],
    }
    try:
        FolderFile.from_record(record, options.output)
    except InputError as error:
        raise InputError(f"--mapping {options.mapping}: {error}") from error
    findings = Findings()
    with new_folder(options.output) as folder:
        pages = find_pages(options, mapping, findings)
        splits = split_books((page.book for page in pages), options.val, options.test, options.seed)
        used = [split for split in (TRAIN, VAL, TEST) if split in splits.values()]
        record["splits"] = {"lists": {split: f"{split}.txt" for split in used}}
        file = FolderFile.from_record(record, folder)
        counts = np.zeros((len(pages), 256), np.int64)
        for name in ("images", "labels"):
            (folder / name).mkdir()
        for k, page in enumerate(tqdm(pages, desc="pages", unit="page", disable=options.quiet)):
            try:
                counts[k] = _write_page(folder, page, options)
            except InputError as error:
                findings.faults.append(str(error))
        findings.refuse(len(pages))
        for split in used:
            ids = [page.id for page in pages if splits[page.book] == split]
            (folder / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids), "utf-8", "surrogateescape")
        write_json(folder / NAME, file.to_record())
    return summary(options, file, pages, splits, counts, findings)


def _write_page(folder: Path, page: ScannedPage, options: argparse.Namespace) -> np.ndarray:
    """Write image and label of a page; return how many pixels each class id has, (256,)."""
    pixels = read_picture(page.picture, options.height)
    height, width = pixels.shape[:2]
    units = page.file.size or page.picture.size
    label, scale = np.zeros((height, width), np.uint8), np.array([width / units[1], height / units[0]])
    for id_, zone in page.zones:
        draw_zone(label, zone.outline * scale, id_)
    image_path, label_path = folder / "images" / f"{page.id}.{options.format}", folder / "labels" / f"{page.id}.tif"
    with writing(image_path):
        Image.fromarray(pixels).save(image_path, **FORMATS[options.format])
    with writing(label_path):
        Image.fromarray(label).save(label_path, compression="packbits")
    return np.bincount(label.ravel(), minlength=256)


def summary(
    options: argparse.Namespace,
    file: FolderFile,
    pages: Sequence[ScannedPage],
    splits: dict[str, str],
    counts: np.ndarray,
    findings: Findings,
) -> str:
    """Return what was written and what was left out, as lines of text; `counts` is of pixels, (pages, 256)."""
    lines = [f"{len(pages)} pages; the labels hold", f"{'value':>7}  {'share':>9}  {'pages':>6}  class"]
    for value, name in (*enumerate(file.classes.names), (IGNORED, "(ignored)")):
        share = f"{100 * counts[:, value].sum() / counts.sum():.3f} %"
        lines.append(f"{value:>7}  {share:>9}  {np.count_nonzero(counts[:, value]):>6}  {name}")
    for split in file.splits.names():
        books = sorted((book for book in splits if splits[book] == split), key=natural)
        count = sum(splits[page.book] == split for page in pages)
        lines.append(f"{split}: {count} pages of {len(books)} folders: {', '.join(books)}")
    if VAL not in file.splits.names():
        lines.append("No folder is for validation; training will validate on its own images")
    if findings.ignored:
        zones = ", ".join(f"{label} {count}" for label, count in sorted(findings.ignored.items()))
        lines.append(f"Ignored zones: {zones}")
    if findings.unknown:
        lines.append(f"Of these, labels without a class: {', '.join(sorted(findings.unknown))}")
    if findings.placeless:
        lines.append(f"Zones without a place, or of less than three corners, not drawn: {findings.placeless}")
    what = "kept, all pixels outside" if options.empty == "keep" else "skipped"
    for text, paths in (
        (f"Pages without zones, {what}", findings.empty),
        ("Pages whose zones were scaled to a picture of another size", findings.scaled),
        ("XML files of other kinds, passed over", findings.other_files),
    ):
        lines += [f"{text}: {len(paths)}: {shortened(paths, MOST_FAULTS)}"] if paths else []
    return "\n".join([*lines, f"Written: {options.output}", f"Next: --dataset folder --data_path {options.output}"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.alto",
        description="Makes a data set of scanned pages whose zones are marked in ALTO or PAGE XML.",
    )
    add = parser.add_argument
    add("source", type=Path, help="folder of XML files and their pictures, in folders by book")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist, or be empty")
    add("--files", default="**/*.xml", metavar="PATTERN", help="which XML files are read (default: %(default)s)")
    add("--mapping", type=Path, metavar="FILE", help="JSON file: classes and their labels (default: SegmOnto's labels)")
    add("--height", type=whole(1), metavar="N", help="shrink taller pages to N pixels in height (default: none)")
    add(
        "--format",
        choices=tuple(FORMATS),
        default=next(iter(FORMATS)),
        help="format of images: tif is quickest to read, png lossless, jpg smallest (default: %(default)s)",
    )
    add(
        "--empty",
        choices=("skip", "keep"),
        default="skip",
        help="pages without any zone; keep, if they are blank (default: %(default)s)",
    )
    add(
        "--unknown",
        choices=("refuse", "ignore"),
        default="refuse",
        help="labels without a class; ignore leaves their pixels out of loss and metrics (default: %(default)s)",
    )
    share = f"(default: {100 * SHARE:.0f} %% of the folders, by hash; without a BOOK: none)"
    add("--val", nargs="*", metavar="BOOK", help=f"folders for validation {share}")
    add("--test", nargs="*", metavar="BOOK", help=f"folders for testing {share}")
    add("--seed", type=int, default=0, help="seed of the split by hash (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 2 after the lines that say what is wrong."""

    def work() -> None:
        options = parse(arguments)
        mapping = ZoneMapping.from_record(SEGMONTO) if options.mapping is None else ZoneMapping.read(options.mapping)
        print(write_set(options, mapping))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
