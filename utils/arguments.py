"""The common part of the command lines of training and prediction: parser, types with bounds, and options."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from utils.canvas import UPSAMPLES
from utils.errors import InputError
from utils.precision import PRECISION_CHOICES
from utils.selection import MOST_MARGIN
from utils.settings import CONTEXTS, LEAST_VIEW, NORMALIZATIONS, RECORDED, VIEW_PIXELS
from utils.stretch import MOST_BANDS, Stretch, parse_bands, spell_bands
from utils.tiling import BLENDS

AddOption = Callable[..., argparse.Action]
"""Adds an option to a group, as `add_argument` does."""

ANY = object()
"""In `REMOVED`: whatever the value, runs are the same."""

REMOVED: dict[str, tuple[str, Any]] = {
    "share_maps": ("is now --share own", None),
    "no-share_maps": ("is now --share none", None),
    "optimizer": ("was removed: the optimizer is Adam", "adam"),
    "weight_decay": ("was removed: it is 5e-4", 5e-4),
    "backbone_lr": ("was removed: encoders have the rate --lr, too", 1.0),
    "warmup": ("was removed: the rate falls from the first step on", 0),
    "clip_grad": ("was removed: gradients are not clipped", 0.0),
    "box_recall": ("was removed: it is 0.9", 0.9),
    "split_seed": ("was removed: give lists of ids by --split_lists", None),
    "max_bad_steps": ("was removed: a run stops after 10 such steps in a row", ANY),
    "tf32": ("was removed: float32 products are exact; --precision bf16 is faster", False),
    "cudnn_benchmark": ("was removed: convolutions are not searched for", ANY),
    "simplify": ("was removed: simplify the layer afterwards, such as with ogr2ogr -simplify", None),
}
"""Options of earlier versions: what to do instead, and the value with which a run is the same without them."""


class Parser(argparse.ArgumentParser):
    """A parser that keeps line breaks in help texts and raises InputError instead of ending the process."""

    def __init__(self, prog: str, description: str, **more: Any) -> None:
        more = {"formatter_class": argparse.RawTextHelpFormatter, "allow_abbrev": False, **more}
        super().__init__(prog=prog, description=description, **more)

    def group(self, title: str) -> AddOption:
        """Start a group of options and return the function that adds one to it."""
        return self.add_argument_group(title).add_argument

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message, such as `--lr -1 must be at least 0`."""
        if message.startswith("unrecognized arguments:"):
            for name in (word.split("=")[0] for word in message.split()):
                if name.removeprefix("--") in REMOVED:
                    raise InputError(f"{name} {REMOVED[name.removeprefix('--')][0]}")
        raise InputError(message.removeprefix("argument ").replace(": ", " ", 1))


def whole(low: int, high: int | None = None) -> Callable[[str], Any]:
    """Return a type for options: whole numbers from `low` to `high`."""
    return number(low, high, int)


def number(low: float, high: float | None = None, kind: type = float) -> Callable[[str], Any]:
    """Return a type for options: finite numbers of a `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' if kind is int else ''}number") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if value < low or (high is not None and value > high):
            rule = f"must be at least {low:g}" if high is None else f"must be from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} {rule}")
        return value

    return parse


def recorded_default(name: str, of_data_set: str = "") -> str:
    """Return a help text that says where the default of a recorded option comes from.

    `of_data_set` are the defaults of data sets that have their own, in words.
    """
    own = f"the data set's: {of_data_set}" if of_data_set else ""
    return f"(default: the checkpoint's, else {own}{RECORDED[name]})"


def add_geometry(add: AddOption, size_p_of_data_set: str = "") -> None:
    """Add the sizes of images and patches. Their bounds depend on each other: see `utils.settings.check_sizes`."""
    add("--size_g", type=whole(1), help=f"side of the shrunk image, in pixels {recorded_default('size_g')}")
    add("--size_p", type=whole(1), help=f"side of a patch, in pixels {recorded_default('size_p', size_p_of_data_set)}")
    add(
        "--min_overlap",
        type=whole(0),
        help=f"pixels that neighbouring patches share at least {recorded_default('min_overlap')}",
    )
    add("--sub_batch_size", type=whole(1), default=6, help="patches at a time (default: %(default)s)")


def add_context(add: AddOption) -> None:
    """Add the options that say how images are shrunk for the global branch."""
    add(
        "--context",
        choices=CONTEXTS,
        help="square: the whole image is shrunk to size_g x size_g, as released; scale: every image is shrunk by the\n"
        f"factor of training and keeps its aspect {recorded_default('context')}",
    )
    add(
        "--view_pixels",
        type=whole(LEAST_VIEW),
        metavar="N",
        help="with --context scale: pixels of a shrunk image at most; of a larger one prediction makes overlapping\n"
        f"scenes, and evaluation refuses it (default: {VIEW_PIXELS})",
    )


def add_normalize(add: AddOption) -> None:
    """Add the option that says how pixel values are normalised."""
    add(
        "--normalize",
        choices=NORMALIZATIONS,
        help="mean and deviation that normalise pixel values in [0, 1]: none, 0.5/0.5, ImageNet's, or those of each\n"
        f"band of the training images, which mode 1 records {recorded_default('normalize')}",
    )


def add_precision(add: AddOption) -> None:
    """Add the option that says in which type convolutions compute; see `utils.precision.resolve_precision`."""
    add(
        "--precision",
        choices=PRECISION_CHOICES,
        default="fp32",
        help="type of convolutions and their maps; fp32 as released; auto: bf16 where the device has instructions for\n"
        "it, else fp32 (default: %(default)s)",
    )


def spelling(option: str, spell: Callable[[str], str]) -> Callable[[str], str]:
    """Return a type for an option whose value is recorded as `spell` spells it; its InputError names the option."""

    def parse(text: str) -> str:
        try:
            return spell(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{option} ")) from None

    return parse


stretch = spelling("--stretch", lambda text: str(Stretch.parse(text)))
"""The type of `--stretch`."""


def add_view(add: AddOption) -> None:
    """Add the options that say how files become the 8-bit bands that a network reads."""
    add(
        "--bands",
        type=spelling("--bands", lambda text: spell_bands(parse_bands(text))),
        metavar="N,...",
        help=f"bands that the network reads, counted from 1, at most {MOST_BANDS}; mode 1 fixes how many\n"
        "(default: the checkpoint's, else the data set's, else 1,2,3, or the only one as grey)",
    )
    add(
        "--stretch",
        type=stretch,
        metavar="LOW,HIGH",
        help="what becomes black and white in pixels of more than 8 bits: percentiles of each\n"
        "band, or values, as in 0,10000 (default: the checkpoint's, else the data set's, else 2%%,98%%)",
    )


def add_coarse_to_fine(add: AddOption) -> None:
    """Add the options of coarse to fine that training, evaluation and prediction share."""
    add(
        "--coarse_to_fine",
        action=argparse.BooleanOptionalAction,
        help="binary sets, modes 2 and 3: the local branch computes only boxes around the foreground that the global\n"
        "branch predicts (default: the checkpoint's, else off)",
    )
    add(
        "--box_margin",
        type=number(0, MOST_MARGIN),
        metavar="PART",
        help=f"enlarge boxes by this part of their sides, in each direction {recorded_default('box_margin')}",
    )


def add_refine_share(add: AddOption) -> None:
    """Add the option that selects uncertain patches, in evaluation and prediction."""
    add(
        "--refine_share",
        type=number(0, 1),
        default=1.0,
        metavar="SHARE",
        help="modes 2 and 3: the local branch computes only this part of the patches, those in which the\n"
        "global prediction is least certain (default: 1, all)",
    )


def add_smoothing(add: AddOption) -> None:
    """Add the options that say how scores become pixels, in evaluation and prediction."""
    add(
        "--blend",
        choices=tuple(BLENDS),
        default="none",
        help="modes 2 and 3: weigh the scores of a patch by the distance to its borders\n(default: none, as released)",
    )
    add(
        "--upsample",
        choices=UPSAMPLES,
        default="nearest",
        help="enlarge logits, a cell of 4 pixels or more each, in blocks or smoothly (default: nearest, as released)",
    )
