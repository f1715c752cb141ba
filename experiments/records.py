"""Result files of the experiments: where they lie, which command made them, and how they are written."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.files import replacing, write_json

RESULTS = Path(__file__).parent / "results"
"""The folder of results that are kept in the repository."""


def command_of(module: str) -> str:
    """Return the command line of this process, whose main module is `experiments.MODULE`."""
    return shlex.join(["python", "-m", f"experiments.{module}", *sys.argv[1:]])


def write_results(path: Path, record: Mapping[str, Any], page: str) -> None:
    """Write a record to `path`, a JSON file, and its table to the Markdown file beside it.

    Raises InputError, naming the file, if one cannot be written.
    """
    write_json(path, record)
    with replacing(path.with_suffix(".md")) as part:
        part.write_text(page, encoding="utf-8")
