"""Segments any image, of any size, with trained weights: `python predict.py --help`.

As a library:

    from predict import Segmenter
    segmenter = Segmenter.from_checkpoint("saved_models/fpn_deepglobe_local2global.pth")
    ids = segmenter.segment("picture.jpg")  # (H, W) uint8
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.pictures import open_source, picture
from dataset.stretch import Stretch
from helper import prepare
from models.backbone import BACKBONES
from models.checkpoint import Header
from predicting import Choice, Prediction, find_images
from restoring import restore
from segmenting import Method, segment_any
from utils import distributed, prediction_options
from utils.classes import Classes
from utils.errors import InputError
from utils.faults import explain
from utils.patches import STATISTICS
from utils.precision import PRECISIONS
from utils.scenes import SCENE_SIZE, Rows
from utils.sources import Source
from utils.stages import STAGES
from utils.turns import TURNS

LOWER_MEMORY = ("sub_batch_size", "scene_size", "size_p")
"""Options that lower what segmenting needs, the most useful first."""


class Segmenter:
    """A trained network that segments images: `segment`. `classes` tells what the ids mean, and their colours."""

    def __init__(self, method: Method, header: Header) -> None:
        self.method = method
        self.header = header

    @property
    def classes(self) -> Classes:
        return self.header.classes

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        path_g: str | Path | None = None,
        mode: int | None = None,
        precision: str = "fp32",
        tta: str = "none",
        sub_batch_size: int = 6,
        scene_size: int = SCENE_SIZE,
        size_g: int | None = None,
        size_p: int | None = None,
        min_overlap: int | None = None,
        normalize: str | None = None,
        backbone: str | None = None,
        coarse_to_fine: bool | None = None,
        box_margin: float | None = None,
    ) -> "Segmenter":
        """The network in the file `path`, on `device` (by default the best there is).

        `mode` is by default the file's stage; what else is None is as the file records. A released file needs `mode`,
        and in mode 3 `path_g`, stage 1's. Raises InputError for files that cannot be used or do not fit.
        """
        given = {"size_g": size_g, "size_p": size_p, "min_overlap": min_overlap}
        given |= {"normalize": normalize, "backbone": backbone}
        given |= {"coarse_to_fine": coarse_to_fine, "box_margin": box_margin}
        model, header = restore(Path(path), mode, None if path_g is None else Path(path_g), given)
        prediction_options.check_geometry(header.size_g, header.size_p, header.min_overlap, header.box_margin)
        place = distributed.pick_device(device if device is None else str(device))
        stage = STAGES[header.stage]
        settings = header.settings(sub_batch_size=sub_batch_size, device=place, precision=precision)
        network = prepare(model, stage, settings)
        return cls(Method(network, stage, settings, header.size_g, scene_size, TURNS[tta]), header)

    def segment(
        self,
        image: str | Path | Image.Image | np.ndarray,
        bands: tuple[int, ...] | None = None,
        stretch: Stretch | None = None,
    ) -> np.ndarray:
        """(H, W) uint8 class ids of an image: a file, a Pillow image, or (H, W, 3) or (H, W) uint8, 0..255.

        `bands`, from 1, are red, green and blue; `stretch` is for files of more than 8 bits. Raises InputError where
        the file cannot be read.
        """
        if isinstance(image, str | Path):
            with open_source(image, bands, stretch) as source:
                return self._segment(source)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise InputError(f"an array must be (H, W, 3) or (H, W) uint8, not {image.shape} {image.dtype}")
            image = Image.fromarray(image)
        return self._segment(picture(image, stretch, bands or (1, 2, 3)))

    def _segment(self, source: Source) -> np.ndarray:
        ids = np.empty(source.size, np.uint8)

        def emit(top: int, rows: Rows) -> None:
            ids[top : top + len(rows.ids)] = rows.ids.numpy()

        segment_any(self.method, source, emit)
        return ids


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: all images are segmented; 1: some could not be, or the run failed; 2: the input is at fault.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = prediction_options.build_parser(tuple(BACKBONES), tuple(STATISTICS), tuple(PRECISIONS)).parse_args(
        arguments
    )
    try:
        prediction_options.check(options)
        failures = run(options)
    except InputError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on", 130)
    except (RuntimeError, MemoryError) as error:
        message = explain(error, options, int(os.environ.get("WORLD_SIZE", 1)), LOWER_MEMORY)
        if message is None:
            raise
        return complain(message, 1)
    if failures:
        return complain(f"{len(failures)} images could not be segmented; they are named above", 1)
    return 0


def complain(message: object, code: int) -> int:
    """Print `message` as the one line that a failure gives; the main process's, where all have the same."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> list[str]:
    """Do what the options say; returns the messages of images that could not be segmented."""
    choice = Choice(
        folder=options.output,
        overwrite=options.overwrite,
        overlay=options.overlay,
        probabilities=options.probabilities,
        colors=options.colors,
        bands=options.bands,
        stretch=Stretch.parse(options.stretch),
    )
    images = find_images(options.input)
    ranks = distributed.start(options.device)
    names = ("path_g", "mode", "precision", "tta", "sub_batch_size", "scene_size", "size_g", "size_p", "min_overlap")
    names += "normalize", "backbone", "coarse_to_fine", "box_margin"
    more = {name: getattr(options, name) for name in names}
    segmenter = Segmenter.from_checkpoint(options.checkpoint, device=ranks.device, **more)
    prediction = Prediction(segmenter.method, segmenter.classes, choice, ranks)
    about = {"checkpoint": str(options.checkpoint), "mode": segmenter.header.stage, "tta": options.tta}
    about |= {"coarse_to_fine": segmenter.method.looks}
    prediction.run(images, about)
    distributed.stop()
    return prediction.failures


if __name__ == "__main__":
    sys.exit(main())
