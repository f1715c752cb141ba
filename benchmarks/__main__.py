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

BENCHMARKS = ("speed", "memory", "peers", "cost", "data", "large_images", "first_image", "cuts")
"""Names of all benchmarks, which are those of their modules.

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
    for name in BENCHMARKS:
        module: Any = importlib.import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
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
