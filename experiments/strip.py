"""Draws an image, its label and its predictions side by side: python -m experiments.strip --help

The columns are the image, its label if it has one, and the global, local and ensemble prediction of a checkpoint of
stage 2 or 3. The first row shows the whole image; the second a square of it, which the first row marks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dataset.base import SegmentationDataset
from dataset.deep_globe import DEEP_GLOBE
from dataset.synthetic import MIN_SIZE, draw_scene
from engine.predictor import Predictor
from imaging.sources import MemorySource
from prediction.segmenter import Segmenter
from training.options import add_data
from training.setup import described_by
from utils.arguments import Parser, add_smoothing, whole
from utils.canvas import ArgmaxSink
from utils.errors import InputError, exit_code, shortened
from utils.files import replacing
from utils.tiling import Box, map_size
from utils.visualize import colorize

IMAGE, LABEL = "image", "label"
"""Titles of the first columns; the others are the names of the predictions."""

GAP = 8
"""Pixels between columns and rows, and around all of them."""

ZOOM = 4
"""How many times the square of the second row fits into the image's shorter side, unless `--zoom` names another."""

JPEG, PNG = (".jpg", ".jpeg"), (".png",)


def read_scene(options: argparse.Namespace, segmenter: Segmenter) -> tuple[Tensor, Tensor | None]:
    """Return the image and its label: (3, H, W) uint8 RGB, and (H, W) uint8 ids or None.

    Raises:
        InputError: there is no such image, or the data set has another number of classes than the network.
    """
    if options.generate:
        seed, size = options.generate
        if seed < 0 or size < MIN_SIZE:
            raise InputError(f"--generate {seed} {size}: SEED must be at least 0, SIZE at least {MIN_SIZE}")
        check_classes(options, segmenter, len(DEEP_GLOBE), "generated scenes have")
        image, label = draw_scene(seed, 0, size)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label)
    data = open_split(options, segmenter)
    ids = [item.id for item in data.items]
    if options.image not in (None, *ids):
        raise InputError(f"--image {options.image} is not in the split, which has {shortened(ids)}")
    return data.read(ids.index(options.image) if options.image else 0)


def open_split(options: argparse.Namespace, segmenter: Segmenter) -> SegmentationDataset:
    """Return the split `--split` of a data set, by default its validation, as a network reads it.

    Raises:
        InputError: there is no such split, or the data set has another number of classes than the network.
    """
    described = described_by(options)
    check_classes(options, segmenter, len(described.classes), f"{described.title} has")
    data = described.open(options.split or described.validation, segmenter.header.size_g, segmenter.classes)
    data.view = segmenter.view
    return data


def check_classes(options: argparse.Namespace, segmenter: Segmenter, needed: int, whose: str) -> None:
    """Raise InputError if a checkpoint has another number of classes than the data."""
    found = len(segmenter.classes)
    if found != needed:
        raise InputError(
            f"{options.checkpoint} was made with {found} classes, but {whose} {needed}: give data of its classes"
        )


def open_both_branches(options: argparse.Namespace) -> Segmenter:
    """Load the network that the options of `add_data_and_network` name.

    Raises InputError if the file cannot be used, or is of stage 1.
    """
    names = ("device", "path_g", "mode", "sub_batch_size", "bands", "stretch", "min_overlap", "blend", "upsample")
    segmenter = Segmenter.from_checkpoint(options.checkpoint, **{name: getattr(options, name) for name in names})
    if segmenter.header.stage == 1:
        raise InputError(f"{options.checkpoint} is of stage 1, which predicts nothing local: give one of stage 2 or 3")
    return segmenter


def predict(predictor: Predictor, image: Tensor) -> dict[str, np.ndarray]:
    """Return all predictions of an image (3, H, W) uint8, by name: (H, W) uint8 ids."""
    source = MemorySource(image)
    found = {name: ArgmaxSink(source.size, predictor.settings.device) for name in predictor.stage.predictions}
    predictor.segment(source, found)
    return {name: sink.ids.cpu().numpy() for name, sink in found.items()}


def most_different(a: np.ndarray, b: np.ndarray, side: int) -> Box:
    """Return the square in which two maps of ids differ in the most pixels, the first of equal ones.

    Args:
        a, b: (H, W) uint8.
        side: of the square, in pixels, not longer than the maps.
    """
    sums = cv2.integral((a != b).astype(np.uint8))  # (H + 1, W + 1), of all pixels above and to the left
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(counts.argmax(), counts.shape)
    return Box(int(top), int(left), side, side)


def draw_strip(columns: Mapping[str, np.ndarray], box: Box, width: int) -> Image.Image:
    """Draw pictures of the same size side by side, below them the part in `box`, and below that their titles.

    Args:
        columns: (H, W, 3) uint8 RGB by title. The one named `IMAGE` is resized smoothly; others show class colours,
            which must not mix.
        box: a square of the pictures; a frame of black, white and black, which is seen on any colour, is around it.
        width: of the strip, in pixels.
    """
    height, across = next(iter(columns.values())).shape[:2]
    side = (width - GAP * (len(columns) + 1)) // len(columns)
    scale = side / across
    rows = max(1, round(height * scale))
    letters = max(10, width // 70)
    font = ImageFont.load_default(size=letters)
    second, third = rows + 2 * GAP, rows + side + 3 * GAP  # their tops
    canvas = Image.new("RGB", (width, third + 3 * letters // 2), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, picture) in enumerate(columns.items()):
        left = GAP + k * (side + GAP)
        how = Image.Resampling.BICUBIC if title == IMAGE else Image.Resampling.NEAREST
        part = picture[box.top : box.top + box.height, box.left : box.left + box.width]
        canvas.paste(Image.fromarray(picture).resize((side, rows), how), (left, GAP))
        canvas.paste(Image.fromarray(part).resize((side, side), how), (left, second))
        x, y = left + round(scale * box.left), GAP + round(scale * box.top)
        right, bottom = x + round(scale * box.width) - 1, y + round(scale * box.height) - 1
        for outset, color in ((2, "black"), (4, "white"), (6, "black")):
            draw.rectangle((x - outset, y - outset, right + outset, bottom + outset), outline=color, width=2)
        draw.text((left + side // 2, third), title, fill="black", font=font, anchor="ma")
    return canvas


def run(options: argparse.Namespace) -> None:
    """Segment the image and write the strip."""
    segmenter = open_both_branches(options)
    image, label = read_scene(options, segmenter)
    height, width = map_size(image)
    box = options.zoom
    if box is not None and (box.top + box.height > height or box.left + box.width > width):
        raise InputError(f"--zoom {box.top},{box.left},{box.height} is not inside the image of {height} x {width}")
    found = predict(segmenter.predictor, image)
    box = box or most_different(found["global"], found["ensemble"], max(1, min(height, width) // ZOOM))
    ids = found if label is None else {LABEL: label.numpy(), **found}
    colored = {name: colorize(values, segmenter.classes.palette) for name, values in ids.items()}
    strip = draw_strip({IMAGE: image.permute(1, 2, 0).numpy(), **colored}, box, options.width)
    # class colours must not bleed
    how = {"quality": 90, "subsampling": 0} if options.output.suffix.lower() in JPEG else {"optimize": True}
    with replacing(options.output) as beside:
        strip.save(beside, **how)
    print(f"{options.output}: the second row is --zoom {box.top},{box.left},{box.height}")


def zoom(text: str) -> Box:
    """Parse `--zoom`."""
    try:
        top, left, side = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be TOP,LEFT,SIDE, three whole numbers") from None
    if min(top, left) < 0 or side < 1:
        raise argparse.ArgumentTypeError(f"{text} must be TOP,LEFT,SIDE, at least 0,0,1")
    return Box(top, left, side, side)


def picture_file(text: str) -> Path:
    """Parse `--output`."""
    if Path(text).suffix.lower() not in (*JPEG, *PNG):
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join((*JPEG, *PNG))}")
    return Path(text)


def add_data_and_network(parser: Parser) -> None:
    """Add the options of `open_split` and of `open_both_branches`."""
    add = parser.group("split")
    add("--split", help="(default: the data set's validation: crossvali, else val)")
    add_data(parser)
    add = parser.group("network")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="of stage 2 or 3")
    add("--mode", type=int, choices=(2, 3), help="(default: the file's; a released file needs it)")
    add("--path_g", type=Path, metavar="FILE", help="stage 1's file, beside a released one of stage 3")
    add("--min_overlap", type=whole(0), help="pixels that neighbouring patches share at least (default: the file's)")
    add_smoothing(add)
    add("--sub_batch_size", type=whole(1), default=6, help="patches at a time (default: %(default)s)")
    add("--device", help="(default: cuda where there is one, else cpu)")


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m experiments.strip",
        description="Draw an image, its label and the predictions of a checkpoint side by side, with a part enlarged.",
    )
    add = parser.group("picture")
    add("--output", type=picture_file, required=True, metavar="FILE", help="JPEG or PNG, by its suffix")
    add("--width", type=whole(200), default=1600, help="of the picture, in pixels (default: %(default)s)")
    square = "square of the second row, in pixels of the image (default: a quarter of the shorter side, where\n"
    add("--zoom", type=zoom, metavar="TOP,LEFT,SIDE", help=f"{square}global and ensemble differ most)")
    add = parser.group("image")
    add("--generate", type=int, nargs=2, metavar=("SEED", "SIZE"), help="a generated scene, in place of a data set")
    add("--image", metavar="ID", help="of the split (default: its first)")
    add_data_and_network(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
