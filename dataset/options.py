"""Types of the options that say how files become 8-bit RGB, for the parsers of training and prediction."""

import argparse

from utils.errors import InputError
from utils.stretch import Stretch, parse_bands


def bands(text: str) -> str:
    """Return `--bands` as three numbers, `3,2,1`, if it names bands."""
    try:
        return ",".join(map(str, parse_bands(text)))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--bands ")) from None


def stretch(text: str) -> str:
    """Return `--stretch` as it is recorded, `2%,98%` or `0,10000`, if it is one."""
    try:
        return str(Stretch.parse(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--stretch ")) from None
