"""Compares a finished evaluation with published numbers: python -m evaluation.compare RUN.json --published deep_globe

RUN.json is what `train_deep_globe.py --evaluation` writes. Of the run the main prediction's mIoU counts: the global one
in mode 1, the ensemble in modes 2 and 3.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.published import PUBLISHED, PublishedSet
from utils.errors import InputError, exit_code
from utils.files import read_json
from utils.stages import STAGES
from utils.tables import as_markdown

NEEDED = {"mode": int, "classes": list, "images": int, "peak_memory_mb": float | int}
"""Entries that every evaluation's JSON has, with their types."""

COUNTERS = {"cuda": "peak of tensors (torch.cuda.max_memory_allocated)", "cpu": "largest resident size of the process"}
"""How `peak_memory_mb` is counted, by the entry `device`."""


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the JSON of an evaluation.

    Raises InputError, naming `path`, when it cannot be read or is something else.
    """
    record = read_json(path)
    known = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in NEEDED.items())
    scores = record.get(STAGES[record["mode"]].headline) if known and record["mode"] in STAGES else None
    if not isinstance(scores, dict) or not isinstance(scores.get("mIoU"), float | int):
        raise InputError(
            f"{path} is no evaluation's JSON: give the file that train_deep_globe.py --evaluation writes, "
            "LOG_PATH/TASK_NAME.json"
        )
    return dict(record)


def comparison(record: Mapping[str, Any], published: PublishedSet) -> str:
    """Return the table of a run beside published results, as Markdown: GLNet in the run's mode first."""
    stage = STAGES[record["mode"]]
    score, memory_mb, split = 100 * record[stage.headline]["mIoU"], record["peak_memory_mb"], record.get("split")
    order = sorted(published.results, key=lambda one: (one.mode != stage.number, one.mode is None))
    counter = COUNTERS.get(record.get("device", ""), "by a counter that the file does not name")
    titles = ["published", "split", "score", "MB", "this run, points", "source"]
    rows = []
    for one in order:
        points, memory = f"{score - one.score:+.2f}", "-" if one.memory_mb is None else str(one.memory_mb)
        shown = points if one.split is not None and one.split == split else f"({points})"
        rows.append([one.name, one.split or "-", f"{one.score:.1f}", memory, shown, one.source])
    return (
        f"This run: mode {stage.number}, {stage.headline}, {record['images']} images of split {split or 'unknown'}: "
        f"mIoU {score:.2f} %, {memory_mb:.0f} MB.\n"
        f"Score: {published.measure}, per cent. Memory, MB: published by {published.memory}; this run: {counter}. "
        f"The two counters are not the same quantity.\n\n{as_markdown(titles, rows)}\n"
        "(points): of another split than this run's, or of an unknown one, and so no measure of it."
    )


def run(options: argparse.Namespace) -> None:
    """Print the table. Raises InputError if the run has another number of classes than the published results."""
    record, published = read_evaluation(options.run), PUBLISHED[options.published]
    if len(record["classes"]) != published.n_class:
        raise InputError(
            f"{options.run} has {len(record['classes'])} classes, {published.title} {published.n_class}: "
            "name the data set that it was evaluated on with --published"
        )
    if record.get("dataset", options.published) != options.published:
        print(f"note: {options.run} is of --dataset {record['dataset']}")
    print(comparison(record, published))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare", description="Compare an evaluation with published numbers."
    )
    parser.add_argument("run", type=Path, metavar="RUN.json", help="file that an evaluation wrote")
    parser.add_argument(
        "--published", choices=tuple(PUBLISHED), default="deep_globe", help="data set (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
