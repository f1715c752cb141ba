"""Measures GLNet: python -m benchmarks NAME [OPTION ...]; NAME --help lists the options.

Every benchmark prints a Markdown table, row by row, and with `--json FILE` writes its rows with the command, commit and
device that made them.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.arguments import Parser, whole
from utils.distributed import pick_device
from utils.errors import exit_code
from utils.files import write_json
from utils.memory import keep_freed_memory
from utils.results import command_of
from utils.run_record import device_name, git_commit, now
from utils.tables import as_markdown

BENCHMARKS = {
    "speed": "time evaluation and training steps beside the released implementation",
    "memory": "count live tensors of inference and of training steps beside the released implementation",
    "peers": "time and count GLNet beside U-Net, DeepLabV3+, FPN and DeepLabV3",
    "cost": "compute the operations and the hours of a training, and what encoders cost",
    "data": "time the reading of images: each step of a sample, and what a worker delivers",
    "large_images": "time predict.py on images of 0.01 to 1 gigapixel",
    "first_image": "time predict.py on one picture, by part",
    "cuts": "measure how much a result depends on the cut of the image: GLNet with both contexts, and U-Net",
}
"""By name, which is that of its module too, what a benchmark does.

A module has `COLUMNS`, titles of the table's columns by their keys in the rows; `add_options`, which adds the options
beside `--device`, `--threads` and `--json`; and `rows`, which yields the rows as they are measured.
"""


def cell(value: Any) -> str:
    """Return a value as text: three digits of a number, all of one from 100 on, and `-` for None."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
    return "-" if value is None else str(value)


def run(options: argparse.Namespace) -> None:
    """Print the table of a benchmark, and write its rows if that is requested."""
    benchmark: Any = importlib.import_module(f"benchmarks.{options.benchmark}")
    options.device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    keep_freed_memory()
    print(as_markdown([*benchmark.COLUMNS.values()]), end="", flush=True)
    found = []
    for row in benchmark.rows(options):
        found.append(row)
        print(f"| {' | '.join(cell(row.get(key)) for key in benchmark.COLUMNS)} |", flush=True)
    if options.json:
        about = {
            "command": command_of("benchmarks"),
            "date": now(),
            "commit": git_commit(),
            "device": device_name(options.device),
        }
        write_json(options.json, {**about, "rows": found})


def build_parser() -> Parser:
    """Return the command line, with a subcommand for each benchmark."""
    parser = Parser(prog="python -m benchmarks", description=__doc__ or "")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, what in BENCHMARKS.items():
        module: Any = importlib.import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=what, description=module.__doc__)
        add = command.group("common options")
        add("--device", help="that times are taken on (default: cuda where there is one, else cpu)")
        add("--threads", type=whole(1), metavar="N", help="of torch (default: all cores)")
        add("--json", type=Path, metavar="FILE", help="write the rows to FILE, too")
        module.add_options(command.group("options"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
