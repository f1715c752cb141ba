"""Names, defaults and help of `predict.py`'s command line; no classes."""

import argparse
from pathlib import Path

from utils.errors import InputError
from utils.options import FROM_CHECKPOINT, add_coarse_to_fine, check_margin, check_sizes
from utils.scenes import OVERLAPS_PER_SCENE, SCENE_SIZE
from utils.turns import TURNS

SMALLEST_SCENE = 2 * OVERLAPS_PER_SCENE


def build_parser(backbones: tuple[str, ...], normalizations: tuple[str, ...], precisions: tuple[str, ...]):
    """The parser; what other floors name (backbones, ...) is passed in."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Segment images of any kind and size with trained weights.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    _add_files(parser)
    _add_results(parser)
    _add_reading(parser)
    _add_network(parser, backbones, normalizations, precisions)
    add_coarse_to_fine(parser)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of this project, or released")
    group.add_argument(
        "--path_g", type=Path, metavar="FILE", help="stage 1's file, which a released file of mode 3 needs beside it"
    )
    group.add_argument("--input", nargs="+", required=True, metavar="IMAGE|FOLDER|GLOB", help="what to segment")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="make results anew that are there; without it they are left, and a stopped run goes on",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--overlay", action="store_true", help="also the colours over the image, with a legend")
    group.add_argument(
        "--probabilities", action="store_true", help="also the classes' probabilities, as float16 in .npz or .tif"
    )
    group.add_argument("--colors", action="store_true", help="masks in RGB instead of class ids")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--bands",
        metavar="R,G,B",
        help="which bands, from 1, are red, green and blue (default: 1,2,3, or the only one)",
    )
    group.add_argument(
        "--stretch",
        default="2%,98%",
        metavar="LOW,HIGH",
        help="what becomes black and white where pixels have more than 8 bits: percentiles of each\n"
        "band, or values, as in 0,10000 (default: 2%%,98%%)",
    )


def _add_network(
    parser: argparse.ArgumentParser,
    backbones: tuple[str, ...],
    normalizations: tuple[str, ...],
    precisions: tuple[str, ...],
) -> None:
    group = parser.add_argument_group("network and geometry")
    group.add_argument(
        "--mode", type=int, choices=(1, 2, 3), help="(default: the checkpoint's stage; a released file needs it)"
    )
    for name, text in (("size_g", "side of the shrunk image, in pixels"), ("size_p", "side of a patch, in pixels")):
        group.add_argument(
            f"--{name}", type=int, help=f"{text} (default: the checkpoint's, else {FROM_CHECKPOINT[name]})"
        )
    group.add_argument("--min_overlap", type=int, help="pixels that neighbouring patches share at least")
    group.add_argument("--sub_batch_size", type=int, default=6, help="patches at a time (default: %(default)s)")
    group.add_argument(
        "--scene_size",
        type=int,
        default=SCENE_SIZE,
        help="images with a longer side are segmented as overlapping scenes of at most this side, each with\n"
        "a global context of its own (default: %(default)s)",
    )
    group.add_argument(
        "--tta",
        choices=tuple(TURNS),
        default="none",
        help="average over mirrored, or all turned, images (default: none)",
    )
    group.add_argument("--backbone", choices=backbones, help="of a released file (default: resnet50)")
    group.add_argument("--normalize", choices=normalizations, help="of pixel values (default: the checkpoint's)")
    group.add_argument("--precision", choices=precisions, default=precisions[0], help="(default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")


def check(options: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work; `bands` becomes a tuple, or stays None."""
    if options.sub_batch_size < 1:
        raise InputError(f"--sub_batch_size {options.sub_batch_size} is not positive")
    if options.scene_size < SMALLEST_SCENE:
        raise InputError(f"--scene_size {options.scene_size} is less than {SMALLEST_SCENE} pixels")
    if options.bands is not None:
        options.bands = parse_bands(options.bands)


def parse_bands(text: str) -> tuple[int, ...]:
    """`3,2,1` as (3, 2, 1), one number as three times the same; InputError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (1, 3):
        raise InputError(f"--bands {text}: give three band numbers from 1, as in 3,2,1, or a single one")
    bands = tuple(map(int, parts))
    return bands if len(bands) == 3 else bands * 3


def check_geometry(size_g: int, size_p: int, min_overlap: int, box_margin: float) -> None:
    """Raise InputError for sizes that do not fit together."""
    if min_overlap < 0:
        raise InputError(f"--min_overlap {min_overlap} is negative")
    check_margin(box_margin)
    check_sizes(argparse.Namespace(size_g=size_g, size_p=size_p, min_overlap=min_overlap))
