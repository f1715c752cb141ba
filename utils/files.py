"""Writing files so that a reader never meets half of one, and reading torch's without running what is in them."""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is renamed to `path`, on failure it is removed.

    The data are on the disk before the name is, so that not even a power failure leaves half a file under `path`.
    Missing folders are made. Raises InputError, naming `path`, when the file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # where its folder is none, there is nothing to remove
            beside.unlink(missing_ok=True)


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write `record` as indented JSON. Raises InputError, naming `path`, when the file cannot be written."""
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Raise InputError, naming `folder`, where no file can be written into it: now, not after an epoch's hours."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror or error}") from error


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of their attempts to write `path`."""
    for left in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        with suppress(OSError):
            left.unlink()


def save_torch(path: Path, content: Any) -> None:
    """`torch.save` beside and renamed. Raises InputError, naming `path`, when the file cannot be written."""
    with replacing(path) as beside:
        try:
            torch.save(content, beside)
        except RuntimeError as error:  # torch's file writer tells a full disk so, without the system's reason
            free = os.statvfs(beside.parent).f_bavail * os.statvfs(beside.parent).f_frsize
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{reason}; the disk has {free / 2**20:.0f} MB free, or a limit on file sizes is met"
            ) from error


def load_torch(path: str | Path, what: str = "checkpoint") -> Any:
    """What `torch.save` wrote: tensors and plain values, on the CPU. No code in the file is executed.

    Raises InputError, naming `path`, when it is missing, damaged, cut short, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such {what}")
    try:
        _refuse_swelling(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load raises many kinds; each means that the file cannot be used
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is not a readable {what}, or holds more than tensors: {reason}") from error


def _refuse_swelling(path: Path) -> None:
    """InputError where a zip file would unpack to more than its own size: torch never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise InputError(
                f"{path} would unpack to {unpacked} bytes, more than its own size; torch writes no such file"
            )
