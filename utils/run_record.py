"""What repeats a run: its options, command, device, commit and versions, as values that JSON can hold."""

import argparse
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "tensorboardX", "tqdm", "timm")
ROOT = Path(__file__).resolve().parent.parent


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages; None for one not installed under its usual name."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """Return a description of `device`: a GPU's product name, or the processor and its threads."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def run_record(
    options: Mapping[str, Any], device: torch.device, processes: int, started: str, resumed: list[str]
) -> dict[str, Any]:
    """Return the record of a run, as values that JSON can hold, from plain options and times in UTC."""
    return {
        "started": started,
        "resumed": resumed,
        "command": sys.argv,
        "options": dict(options),
        "seed": options["seed"],
        "device": device_name(device),
        "processes": processes,
        "machine": platform.node(),
        "system": platform.platform(),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def options_record(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return options, and `more` values that identify the experiment, as plain values by name."""
    record = {**vars(options), **more}
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in sorted(record.items())}
