"""Tries the released weights under each normalisation: python -m evaluation.released_weights DIR --data_path DATA

DIR holds the authors' files under their own names. Modes 1, 2 and 3 are evaluated, each under the normalisations that
the history of the released code has, and shown beside the published numbers. Which one the weights expect is the one
whose scores come close.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset import registry
from dataset.deep_globe import DEEP_GLOBE
from dataset.loader import SampleLoader
from engine.predictor import Predictor
from evaluation.published import USER, released_scores
from evaluation.report import scores
from evaluation.run import evaluate_images
from models import checkpoint
from models.backbone import BACKBONES
from models.restore import header_for, restore
from utils.arguments import Parser, add_geometry, add_precision, whole
from utils.distributed import pick_device
from utils.errors import InputError, exit_code
from utils.files import check_writable, write_json
from utils.metrics import StageMetrics
from utils.precision import resolve_precision
from utils.settings import STATISTICS
from utils.stages import STAGES

FILES = {1: "fpn_deepglobe_global.pth", 2: "fpn_deepglobe_global2local.pth", 3: "fpn_deepglobe_local2global.pth"}
"""The released files by mode. Mode 3 needs mode 1's too."""

NEEDED = {1: (1,), 2: (2,), 3: (3, 1)}
"""Modes whose files a mode needs, its own first."""

NORMALIZATIONS = tuple(STATISTICS)


def evaluate(
    options: argparse.Namespace, mode: int, normalize: str, described: registry.Description, split: str, precision: str
) -> dict[str, dict[str, Any]]:
    """Return the scores of each prediction of `mode` under a normalisation, as in an evaluation's JSON.

    Raises InputError if a file cannot be used.
    """
    stage = STAGES[mode]
    file = checkpoint.read(options.folder / FILES[mode])
    context = checkpoint.read_context(file, mode, options.folder / FILES[1])
    given = {name: getattr(options, name) for name in ("backbone", "size_g", "size_p", "min_overlap")}
    header = header_for(file, mode, {**given, "normalize": normalize}, released=DEEP_GLOBE)
    data, device = described.open(split, header.size_g, header.classes), pick_device(options.device)
    settings = header.settings(sub_batch_size=options.sub_batch_size, device=device, precision=precision)
    predictor = Predictor.prepare(restore(file, header, context), stage, settings, header.size_g)
    count = min(len(data), options.limit or len(data))
    result = evaluate_images(
        predictor,
        SampleLoader(data, sampler=range(count), num_workers=options.num_workers, pin=device.type == "cuda"),
        StageMetrics(stage, header.classes),
        title=f"mode {mode}, {normalize}",
    )
    return scores(header.classes, result.metrics.matrices)


def run(options: argparse.Namespace) -> None:
    """Evaluate what there is and print the table, a line as soon as it is known.

    Raises InputError if the folder has no file that a mode could be evaluated with.
    """
    described = registry.describe("deep_globe", options.data_path)
    split = described.labelled_split(options.split)
    lacking = {
        mode: names
        for mode, needed in NEEDED.items()
        if (names := [FILES[one] for one in needed if not (options.folder / FILES[one]).is_file()])
    }
    if len(lacking) == len(STAGES):
        raise InputError(f"{options.folder} has none of the released files {', '.join(FILES.values())}")
    if options.json:
        check_writable(options.json.parent)
    images = len(described.find(split))
    count = min(images, options.limit or images)
    print(f"mIoU in per cent of the main prediction, class 0 left out; {count} of {images} images of {split}")
    if count < images:
        print("Scores of a part of a split are not comparable with published ones.")
    print(f"mode  {'':9}{''.join(f'{name:>9}' for name in NORMALIZATIONS)}   published")
    precision = resolve_precision(options.precision, pick_device(options.device))
    found: dict[str, dict[str, Any]] = {}
    for mode, stage in STAGES.items():
        if mode in lacking:
            print(f"{mode:4}  not evaluated: {', '.join(lacking[mode])} missing", flush=True)
            continue
        found[str(mode)] = {name: evaluate(options, mode, name, described, split, precision) for name in NORMALIZATIONS}
        values = [f"{100 * one[stage.headline]['mIoU']:9.2f}" for one in found[str(mode)].values()]
        published = ", ".join(
            f"{one.score} ({one.split}, {'a user' if one.source == USER else 'paper'})" for one in released_scores(mode)
        )
        print(f"{mode:4}  {stage.headline:9}{''.join(values)}   {published}", flush=True)
    if options.json:
        write_json(options.json, {"split": split, "images": count, "modes": found})


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m evaluation.released_weights",
        description="Evaluate the released weights on DeepGlobe under each normalisation, beside published numbers.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the authors' three files")
    add = parser.group("data")
    add("--data_path", type=Path, default=Path("data"), help="DeepGlobe's folder (default: data)")
    add("--split", help="which images (default: crossvali)")
    add("--limit", type=whole(1), metavar="N", help="the first N images of the split only (default: all)")
    add("--num_workers", type=whole(0), default=2, help="processes that decode images (default: %(default)s)")
    add = parser.group("network and computing")
    add_geometry(add)
    add("--backbone", choices=BACKBONES, help="encoder of the files (default: resnet50, as released)")
    add_precision(add)
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores to FILE, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
