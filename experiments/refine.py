"""Measures what uncertain patches cost and gain: python -m experiments.refine --help

Evaluates checkpoints of stage 2 or 3 as `train_deep_globe.py --evaluation` does, with several values of
`--refine_share`: mIoU of every prediction, the share of pixels that no patch covers, and seconds per image. Seconds are
those of segmenting and counting an image, without decoding, after an image that warms up; those of the processor are of
all threads together.

The figures go to refine_NAME.json and refine_NAME.md; `python -m experiments.figures` draws them.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataset.loader import SampleLoader
from dataset.registry import Description
from evaluation.run import Evaluation, evaluate_images
from training import options as command_line
from training.setup import described_by, plan_evaluation
from utils.arguments import Parser, add_geometry, add_precision, number, whole
from utils.distributed import pick_device
from utils.errors import InputError, exit_code
from utils.files import check_writable
from utils.memory import keep_freed_memory
from utils.metrics import StageMetrics
from utils.results import RESULTS, command_of, write_results
from utils.run_record import device_name, git_commit, now
from utils.selection import UncertainPatches
from utils.stages import PREDICTIONS, STAGES
from utils.tables import as_markdown

SHARES = tuple(k / 10 for k in range(11))

COLUMNS = {
    **{name: (f"{name}, mIoU %", 100, 1) for name in PREDICTIONS},
    "not_looked_at": ("pixels not looked at, %", 100, 1),
    "not_computed": ("patches not computed, %", 100, 1),
    "seconds_per_image": ("seconds per image", 1, 3),
    "process_seconds_per_image": ("of the processor", 1, 3),
}
"""What is measured, with the title of its column in the table, the factor of its values there, and their decimals."""


def evaluation_options(options: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Return the options of the evaluation of a checkpoint: those of this command, and the defaults of all others."""
    defaults = command_line.build_parser().parse_args(["--evaluation"])
    files = {"model_path": Path(), STAGES[options.mode].reads: str(checkpoint)}
    return argparse.Namespace(**{**vars(defaults), **vars(options), **files})


def measure(
    checkpoint: Path, options: argparse.Namespace, described: Description, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield, for every share, the record of an evaluation; see `evaluation.report.evaluation_record`.

    Raises:
        InputError: the checkpoint cannot be used, or is coarse to fine.
    """
    own = evaluation_options(options, checkpoint)
    plan = plan_evaluation(own, described, device)
    predictor, header, data = plan.predictor, plan.header, plan.data
    if header.coarse_to_fine:
        raise InputError(f"{checkpoint} is coarse to fine, which selects patches already: give one that is not")

    def evaluate(share: float, images: int) -> Evaluation:
        settings = replace(predictor.settings, selection=UncertainPatches(share) if share < 1 else None)
        loader = SampleLoader(data, sampler=range(images), num_workers=options.num_workers, pin=device.type == "cuda")
        metrics = StageMetrics(predictor.stage, header.classes)
        return evaluate_images(
            replace(predictor, settings=settings), loader, metrics, title=f"{checkpoint.name}, share {share:g}"
        )

    evaluate(1.0, images=1)
    for share in options.shares:
        found = evaluate(share, len(data))
        own_time = {"process_seconds_per_image": found.process_seconds_per_image}
        record = found.record(predictor, header.classes, covered=True)
        yield {"checkpoint": str(checkpoint), "refine_share": share, **own_time, **record}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each share: under `mean` and `spread` the mean and the standard deviation over checkpoints.

    The entries are the keys of `COLUMNS`; mIoU and shares are 0..1. The spread of one checkpoint is None.
    """
    rows = []
    for share in dict.fromkeys(run["refine_share"] for run in runs):
        own = [run for run in runs if run["refine_share"] == share]
        values = {key: [run[key]["mIoU"] if key in PREDICTIONS else run[key] for run in own] for key in COLUMNS}
        mean = {key: statistics.mean(found) for key, found in values.items()}
        spread = {key: statistics.stdev(found) if len(own) > 1 else None for key, found in values.items()}
        rows.append({"refine_share": share, "mean": mean, "spread": spread})
    return rows


def page(record: dict[str, Any]) -> str:
    """Return the table of a record, with the command that made it."""
    count = len(record["checkpoints"])
    about = (
        f"Made by `{record['command']}` on {record['date']}, commit {record['commit']}, on {record['device']}: mode "
        f"{record['mode']}, {record['dataset']}, split {record['split']} (images: {record['images']}); "
        f"{'one checkpoint' if count == 1 else f'mean over {count} checkpoints, ± their standard deviation'}."
    )
    rows = []
    for row in record["rows"]:
        cells = [f"{row['refine_share']:g}"]
        for key, (_, scale, decimals) in COLUMNS.items():
            found = [row[part][key] for part in ("mean", "spread") if row[part][key] is not None]
            cells.append(" ± ".join(f"{scale * value:.{decimals}f}" for value in found))
        rows.append(cells)
    table = as_markdown(["share of patches", *(title for title, _, _ in COLUMNS.values())], rows)
    return f"# Share of patches that are computed, and what it gains\n\n{about}\n\n{table}"


def run(options: argparse.Namespace) -> None:
    """Measure all checkpoints and write the results."""
    described = described_by(options)
    options.split = described.labelled_split(options.split)
    options.shares = sorted(set(options.shares))
    check_writable(options.output)
    device = pick_device(options.device)
    keep_freed_memory()
    runs = [found for file in options.checkpoints for found in measure(file, options, described, device)]
    record = {
        "command": command_of("experiments.refine"),
        "date": now(),
        "commit": git_commit(),
        "device": device_name(device),
        "dataset": options.dataset,
        "split": options.split,
        "mode": options.mode,
        "images": runs[0]["images"],
        "checkpoints": [str(file) for file in options.checkpoints],
        "rows": summary(runs),
        "runs": runs,
    }
    write_results(options.output / f"refine_{options.name or options.dataset}.json", record, page(record))
    print(page(record))


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m experiments.refine",
        description="Evaluate checkpoints of stage 2 or 3 with several values of --refine_share.",
    )
    add = parser.group("curve")
    add(
        "--checkpoints",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="of one stage and network, of several seeds for instance",
    )
    add("--mode", type=int, choices=(2, 3), default=3, help="their stage (default: %(default)s)")
    add("--path_g", default="", metavar="FILE", help="stage 1's file, beside a released one of stage 3")
    add("--shares", type=number(0, 1), nargs="+", default=SHARES, metavar="SHARE", help="(default: 0, 0.1, ... 1)")
    add("--name", type=command_line.task_name, help="of the results, refine_NAME.json (default: the data set's)")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="of the results (default: experiments/results)")
    command_line.add_data(parser)
    add = parser.group("evaluation")
    add("--split", help="(default: the data set's validation: crossvali, else val)")
    add_geometry(add, "inria 536, others ")
    add_precision(add)
    add("--device", help="(default: cuda where there is one, else cpu)")
    add(
        "--num_workers",
        type=whole(0),
        default=0,
        help="processes that decode images, and take processors from those that are timed (default: none)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
