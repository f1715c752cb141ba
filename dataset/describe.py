"""Writes the JSON file of a data set of one's own, from the values that its labels hold.

    python -m dataset.describe pictures --images '{id}.jpg' --labels '{id}_mask.png'

finds which grey values or colours the labels hold, makes each a class, and writes pictures/dataset.json. Names, and
what counts in the metric, can be given here or edited there. Images of other than one or three bands, and of more than
8 bits, get the entries `bands` and `stretch`.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.census import Census, Value
from dataset.folder import NAME, FolderFile, find_files
from dataset.layout import SPLITS, TEST, TRAIN, VAL, hashed_split, lists_in, paired
from imaging.image_file import View, open_image
from imaging.probe import FileInfo, probe
from utils.arguments import stretch
from utils.errors import InputError, exit_code
from utils.files import write_json
from utils.metrics import MEASURES
from utils.stretch import MOST_BANDS, RGB, Bands, Stretch, spell_bands

MEASURED = "measured"
"""The value of `--stretch` for limits that all images have in common."""


def propose_view(images: Sequence[FileInfo], stretch: str | None = None) -> dict[str, Any]:
    """Return the entries `bands` and `stretch` of a data set's file, as far as its images need them.

    Grey images and RGB need no `bands`: others have all that every image has, without transparency, up to 16. Images of
    8 bits need no `stretch`: of others it is the one asked for, that is measured for `MEASURED`, or the default. Raises
    InputError where an image cannot be measured.
    """
    least = min((info.bands - info.alpha for info in images), default=RGB)
    bands = None if least in (1, RGB) else tuple(range(1, min(least, MOST_BANDS) + 1))
    found: dict[str, Any] = {} if bands is None else {"bands": list(bands)}
    deep = [info for info in images if info.needs_stretch]
    if deep:
        found["stretch"] = str(measure_stretch(deep, bands)) if stretch == MEASURED else stretch or str(Stretch())
    return found


def measure_stretch(images: Sequence[FileInfo], bands: Bands | None) -> Stretch:
    """Return the stretch between the lowest 2nd and the highest 98th percentile of any band of any image."""
    limits = []
    for info in images:
        with open_image(info, View(bands)) as image:
            limits += image.limits
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if all(not info.dtype.startswith("float") for info in images):
        low, high = math.floor(low), math.ceil(high)
    return Stretch(low, high, per_cent=False)


SEEDS, FEW_SEEDS, MANY_IMAGES = 1000, 20, 100
"""How many seeds are tried to make the parts of a split by hash as large as asked for; few of more images than so many,
which come close with any seed."""


def class_records(census: Census, ignored: Sequence[Value], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the file's entry `classes`: a class for each value that is not `ignored`, in ascending order.

    Of two classes the second is taken for the foreground, which alone counts, unless options say otherwise.
    Raises InputError where the names do not fit.
    """
    values = sorted(value for value in census.pixels if value not in ignored)
    if len(values) < 2:
        only = f"only {values[0]}" if values else "no class"
        raise InputError(
            f"the labels hold {only} beside what is ignored, in all files; a data set has two classes at least: check "
            "that --labels names the masks and --ignore no class, or add images that show another class"
        )
    binary = len(values) == 2
    usual = ["background", "foreground"] if binary else [f"class {k}" for k in range(len(values))]
    names = options.names or usual
    if len(names) != len(values):
        raise InputError(
            f"--names gives {len(names)} names, but the labels hold {len(values)} classes: "
            f"{', '.join(map(str, values))}"
        )
    left_out = options.left_out if options.left_out is not None else names[:1] if binary else []
    foreground = options.foreground if options.foreground is not None else names[1:] if binary else []
    for option, chosen in (("left_out", left_out), ("foreground", foreground)):
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise InputError(f"--{option} {unknown[0]} is no class; there are {', '.join(names)}")
    records = []
    for name, value in zip(names, values, strict=True):
        record: dict[str, Any] = {"value": value} if isinstance(value, int) else {"color": list(value)}
        record |= {"color": list(census.colors[value])} if value in census.colors else {}
        records.append({"name": name, **record, "counts": name not in left_out, "foreground": name in foreground})
    return records


def split_record(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the entry `splits` of a file in `folder`, without a chosen seed."""
    if "{split}" in options.images:
        given = dict(pair.split("=", 1) for pair in options.folders) if options.folders else {}
        place = options.root / options.images.partition("{split}")[0]
        return {"folders": given or {name: name for name in SPLITS if (place / name).is_dir()}}
    if options.lists:
        return {"lists": {name: relative(path, folder) for name, path in lists_in(options.lists, SPLITS).items()}}
    return {"fractions": {name: part for name, part in ((VAL, options.val), (TEST, options.test)) if part}}


def relative(path: Path, folder: Path) -> str:
    """Return `path` relative to `folder` if it lies in it, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def best_seed(ids: Sequence[str], fractions: Mapping[str, float]) -> int:
    """Return the seed whose split by hash comes closest to `fractions` of `ids`, with an image in each split."""
    wanted = {name: max(1, round(part * len(ids))) for name, part in fractions.items()}

    def distance(seed: int) -> int:
        counts = Counter(hashed_split(id_, fractions, seed) for id_ in ids)
        return sum(abs(counts[name] - count) for name, count in wanted.items())

    return min(range(SEEDS if len(ids) <= MANY_IMAGES else FEW_SEEDS), key=distance)


def describe(options: argparse.Namespace) -> tuple[str, int]:
    """Write the file; return what was found, as lines of text, and how many files could not be read and were skipped.

    Raises InputError if images and labels do not fit together, the labels hold no classes, or no file can be read.
    """
    output = options.output or options.root / NAME
    if output.exists() and not options.overwrite:
        raise InputError(f"{output} exists; name another by --output, or add --overwrite")
    record = {
        "root": relative(options.root, output.parent),
        "images": options.images,
        "labels": options.labels,
        "classes": [{"name": "unknown"}, {"name": "yet"}],
        "splits": split_record(options, output.parent),
    }
    # what can be wrong with patterns and splits is told before all labels are read
    plan = FolderFile.from_record(record, output.parent)
    items = []
    for split in plan.splits.folders or ("",):
        images, labels = find_files(plan, split)
        items += paired(images, images, labels, f"{plan.labels} for each {plan.images}")
    census = Census(tqdm(items, desc="labels", unit="file", disable=options.quiet))
    if len(census.failures) == len(items):
        raise census.failures[0]
    if not options.names:
        census.refuse_smoothed()
    ignored = census.ignored() if options.ignore is None else options.ignore
    record |= {"classes": class_records(census, ignored, options), "ignored": ignored}
    binary = any(entry["foreground"] for entry in record["classes"])
    record["measures"] = options.measures or (["jaccard", "accuracy"] if binary else ["accuracy"])
    if "fractions" in record["splits"]:
        record["splits"]["seed"] = best_seed([item.id for item in items], record["splits"]["fractions"])
    infos = []
    for path in (pair.image for item in items for pair in item.pairs()):
        with suppress(InputError):  # training says what is wrong with it
            infos.append(probe(path))
    record |= propose_view(infos, options.stretch)
    file = FolderFile.from_record(record, output.parent)
    write_json(output, file.to_record())
    return report(file, census, len(items), output), len(census.failures)


def report(file: FolderFile, census: Census, images: int, output: Path) -> str:
    """Return the text that lists the values found, one a line, and the next command."""
    classes = file.classes
    kinds: dict[Value, str] = dict.fromkeys(classes.ignored, "(ignored)")
    kinds |= dict(zip(classes.palette, classes.names, strict=True))
    kinds |= dict(zip(classes.values, classes.names, strict=True))
    lines = [f"skipped: {error}" for error in census.failures]
    lines += [
        f"{images - len(census.failures)} images; the labels hold",
        f"{'value':>15}  {'pixels':>13}  {'share':>8}  {'files':>6}  class",
    ]
    rows = [(str(value), n, str(census.files[value]), kinds[value]) for value, n in sorted(census.pixels.items())]
    rows += [("no data", census.no_data, "", "(ignored)")] if census.no_data else []
    for value, count, files, kind in rows:
        share = f"{100 * count / (census.pixels.total() + census.no_data):.2f} %"
        lines.append(f"{value:>15}  {count:>13}  {share:>8}  {files:>6}  {kind}")
    lines += [f"Turned for display: {count} images, labels taken {fit}" for fit, count in sorted(census.turned.items())]
    lines += [] if file.bands is None else [f"Bands: {spell_bands(file.bands)}"]
    lines += [] if file.stretch is None else [f"Stretch of pixels of more than 8 bits: {file.stretch}"]
    lines += [f"Splits: {', '.join(file.splits.names())}", f"Written: {output}"]
    return "\n".join([*lines, f"Next: --dataset folder --data_path {output}"])


def _value(text: str) -> Value:
    """Parse the argument of --ignore: 255, or 224,224,192."""
    match [int(part) for part in text.split(",")]:
        case [grey]:
            return grey
        case [red, green, blue]:
            return red, green, blue
    raise argparse.ArgumentTypeError(f"{text} is neither a grey value nor a colour such as 224,224,192")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.describe",
        description="Writes the JSON file of a data set of one's own from looking at its labels.",
    )
    add = parser.add_argument
    add("root", type=Path, help="the folder that the patterns start from")
    add("--images", required=True, help="pattern such as 'images/{id}.jpg'; .* stands for any image's suffix")
    add("--labels", required=True, help="pattern such as 'masks/{id}_mask.png'")
    add("--output", type=Path, help=f"file to write (default: {NAME} in root)")
    add("--overwrite", action="store_true", help="replace the file where it exists")
    add("--names", nargs="+", help="names of the classes, by ascending grey value or colour")
    add("--ignore", nargs="*", type=_value, help="values that are no class: 255, or 224,224,192 (default: guessed)")
    add("--left_out", nargs="*", help="classes that the mIoU leaves out (default: of two classes the first)")
    add("--foreground", nargs="*", help="classes of objects, not background (default: of two classes the second)")
    add("--measures", nargs="*", choices=tuple(MEASURES), help="reported beside IoU (default: by the classes)")
    add(
        "--stretch",
        type=lambda text: text if text == MEASURED else stretch(text),
        metavar=f"LOW,HIGH|{MEASURED}",
        help="what becomes black and white in pixels of more than 8 bits: percentiles of each band, values, or\n"
        f"{MEASURED}: the values between which most pixels of all images lie (default: 2%%,98%%)",
    )
    add("--val", type=float, default=0.2, help="part of the images for validation (default: %(default)s)")
    add("--test", type=float, default=0.0, help="part of the images for testing (default: %(default)s)")
    add("--lists", type=Path, help=f"folder of {TRAIN}.txt, {VAL}.txt, {TEST}.txt that give the splits instead")
    add("--folders", nargs="+", metavar="SPLIT=FOLDER", help="what stands for {split} in the patterns")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 1 where files were skipped; 2 after one line that says what is wrong."""
    skipped = 0

    def work() -> None:
        nonlocal skipped
        text, skipped = describe(parse(arguments))
        print(text)

    code = exit_code(work)
    if skipped:
        print(f"error: {skipped} files could not be read; they are named above", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
