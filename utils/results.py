"""Results of experiments and benchmarks: their files, which command made them, what a process took."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from utils.files import replacing, write_json
from utils.run_record import ROOT

RESULTS = ROOT / "experiments" / "results"
"""The folder of results that are kept in the repository."""


def command_of(module: str) -> str:
    """Return the command line of this process, whose main module is `module`."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_results(path: Path, record: Mapping[str, Any], page: str) -> None:
    """Write a record to `path`, a JSON file, and its table to the Markdown file beside it.

    Raises InputError, naming the file, if one cannot be written.
    """
    write_json(path, record)
    with replacing(path.with_suffix(".md")) as part:
        part.write_text(page, encoding="utf-8")


class Usage(NamedTuple):
    """What a process took: seconds, CPU seconds of all its threads, and its peak memory in MB of 2**20 bytes."""

    seconds: float
    cpu_seconds: float
    memory_mb: float


def run_measured(
    command: Sequence[str], output: IO[str] | int, errors: IO[str] | None = None, **environment: str
) -> tuple[int, Usage]:
    """Run a process in the repository; return its exit code and what it took."""
    start = time.perf_counter()
    given = {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, env=given)
    _, status, usage = os.wait4(process.pid, 0)  # which alone returns the peak of this one process
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return process.returncode, Usage(time.perf_counter() - start, cpu_seconds, usage.ru_maxrss / 1024)
