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
from concurrent.futures import ThreadPoolExecutor

from imaging.sources import Source
from prediction import options as command_line
from prediction.outputs import OutputOptions
from prediction.polygon_options import PolygonOptions
from prediction.run import PredictionRun, find_images
from prediction.scenes import Rows
from prediction.segmenter import Cancelled, Segmenter
from utils import distributed
from utils.diagnosis import diagnose
from utils.errors import InputError, allow_all_names
from utils.files import sha256
from utils.settings import RECORDED, ViewScale
from utils.tiling import Box

__all__ = ["Box", "Cancelled", "Rows", "Segmenter", "Source", "main"]

RESULTS = ("overwrite", "overlay", "probabilities", "colors", "cog", "uncertainty", "stability")
"""Options that `OutputOptions` takes as they are."""

NETWORK = ("path_g", "mode", "precision", "tta", "sub_batch_size", "scene_size", "view_pixels")
SMOOTHING = ("refine_share", "blend", "upsample")
"""Options that `Segmenter.from_checkpoint` takes as they are, as it does those of `RECORDED`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: all images are segmented; 1: some could not be, or the run failed; 2: the input is at fault.
    """
    allow_all_names()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = argparse.Namespace()
    try:
        options = command_line.build_parser().parse_args(arguments)
        failures = run(options)
    except InputError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on", 130)
    except (RuntimeError, MemoryError) as error:
        lower = ("sub_batch_size", "scene_size", "view_pixels", "size_p")  # the most useful first
        message = diagnose(error, vars(options), distributed.world_size(), lower)
        if message is None:
            raise
        return complain(message, 1)
    if failures:
        return complain(f"{len(failures)} images could not be segmented; they are named above", 1)
    return 0


def complain(message: object, code: int) -> int:
    """Print the one line of a failure in the main process; return `code`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> list[str]:
    """Segment the images that the options name; return a message for each that could not be segmented."""
    given = vars(options)
    results = OutputOptions(
        folder=options.output,
        polygons=PolygonOptions(options.polygons, options.min_area),
        **{name: given[name] for name in RESULTS},
    )
    images = find_images(options.input)
    ranks = distributed.start(options.device)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(sha256, options.checkpoint)
        network = {name: given[name] for name in (*NETWORK, *SMOOTHING, *RECORDED) if name in given}
        segmenter = Segmenter.from_checkpoint(options.checkpoint, device=ranks.device, **network)
    context = segmenter.predictor.context
    if context is not None and ranks.main:
        logging.info(f"{options.checkpoint}: {context}")
    if options.uncertainty and segmenter.header.stage == 1 and ranks.main:
        logging.info("--uncertainty: mode 1 has no local prediction to disagree with; entropy alone is written")
    prediction = PredictionRun(segmenter, results, ranks)
    about = {
        "checkpoint": str(options.checkpoint),
        "checkpoint_sha256": digest.result(),
        "path_g_sha256": None if options.path_g is None else sha256(options.path_g),
        "mode": segmenter.header.stage,
        "tta": options.tta,
        "precision": segmenter.predictor.settings.precision,
        "scene_size": segmenter.scene_size,
        **{name: getattr(segmenter.header, name) for name in RECORDED},
        "coarse_to_fine": segmenter.header.coarse_to_fine and segmenter.header.stage > 1,
        **{name: given[name] for name in SMOOTHING},
    }
    if isinstance(context, ViewScale):
        about["view_pixels"] = context.most
    else:
        del about["context"]  # results of versions without this option are such, too
    prediction.run(images, about)
    distributed.stop()
    return prediction.failures


if __name__ == "__main__":
    sys.exit(main())
