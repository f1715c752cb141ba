"""What a run was: options, versions, commit, machine; and what an epoch found, as one line of JSON."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python", "tensorboardX", "tqdm")
ROOT = Path(__file__).resolve().parent.parent


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str | None]:
    """Of Python and of the packages; None for one that is not installed under its usual name."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """What `device` is: a GPU's product name, or the processor and its threads."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def run_record(
    options: Mapping[str, Any], device: torch.device, processes: int, started: str, resumed: list[str]
) -> dict[str, Any]:
    """Everything that it takes to repeat a run, in types that JSON knows."""
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


def as_markdown(record: Mapping[str, Any]) -> str:
    """`record` as a table for TensorBoard; nested entries get a row each."""
    rows = []
    for name, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [f"| {name} {key} | {entry} |".replace("  ", " ") for key, entry in inner]
    return "\n".join(["| what | value |", "|---|---|", *rows])
