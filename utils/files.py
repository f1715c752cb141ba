"""Writing files whole or not at all, and reading torch's files without running code in them."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError, reason_of


@contextmanager
def naming(path: str | Path, what: str) -> Iterator[None]:
    """A context that turns an OSError into an InputError: `path` cannot be `what`, such as "read"."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be {what}: {error.strerror or error}") from error


def writing(path: Path) -> AbstractContextManager[None]:
    """Return a context that turns an OSError into an InputError that names `path`."""
    return naming(path, "written")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. On success that file is renamed to `path`, on failure it is removed.

    The data reach the disk before the name, so that not even a power failure leaves half a file under `path`. Missing
    folders are made. Raises InputError, naming `path`, if the file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            beside.replace(path)
    finally:
        with suppress(OSError):  # its folder may not exist
            beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside `path` to write to. On success it is renamed to `path`, on failure removed with its files.

    What a killed process left there is removed first. Raises InputError, naming `path`, if it exists and is not an
    empty folder, or cannot be written.
    """
    path = Path(path)
    beside = path.resolve().with_name(f".{path.resolve().name}.part")
    try:
        with writing(path):
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise InputError(f"{path} exists already; remove it, or name another folder")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write `record` as indented JSON. Raises InputError, naming `path`, if the file cannot be written."""
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises InputError, naming it, if it cannot be read or is something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits. Raises InputError, naming it, if it cannot be read."""
    found = hashlib.sha256()
    with naming(path, "read"), Path(path).open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def check_writable(folder: Path) -> None:
    """Make `folder` if it is missing. Raises InputError, naming it, if no file can be written into it."""
    probe = folder / f".{os.getpid()}.probe"
    with naming(folder, "written to"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


# libraries add suffixes of their own to the names of temporary files
_PART = re.compile(r"\.(?P<stem>.+)\.\d+\.part(?P<suffix>\.[^.]+|)(\..*)?")


def final_path(path: Path) -> Path:
    """Return the path that a file beside it gets, for messages; see `replacing`. Other paths stay as they are."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match['stem']}{match['suffix']}") if match else path


def write_fault(folder: Path) -> str:
    """Return why nothing more can be written into `folder`, "" if a megabyte can."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def space_left(folder: Path) -> str:
    """Return, for messages, what may have kept a library from writing into `folder`."""
    found = os.statvfs(folder)
    return f"the disk has {found.f_bavail * found.f_frsize / 2**20:.0f} MB free, or a limit on file sizes is met"


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files that killed processes left beside `path`; see `replacing`."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.\d+\.part{re.escape(path.suffix)}.*")
    for left in path.parent.glob(".*.part*"):
        if pattern.fullmatch(left.name):
            with suppress(OSError):
                left.unlink()


def save_torch(path: Path, content: Any) -> None:
    """Save `content` by `torch.save` through `replacing`. Raises InputError, naming `path`, if that fails."""
    with replacing(path) as beside:
        try:
            torch.save(content, beside)
        except RuntimeError as error:  # of torch's file writer on a full disk; it lacks the system's reason
            raise OSError(f"{str(error).splitlines()[0]}; {space_left(beside.parent)}") from error


def load_torch(path: str | Path, what: str = "checkpoint") -> Any:
    """Load a file of `torch.save`: tensors, on the CPU, and plain values. No code in the file is executed.

    Raises InputError if the file is missing, damaged, cut short, or holds anything else; it is called `what`.
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
        raise InputError(f"{path} is not a readable {what}, or holds more than tensors: {reason_of(error)}") from error


def check_version(path: Path, content: Mapping[str, Any], version: int) -> None:
    """Raise InputError if the `version` that a file records is not the one that this code reads."""
    found = content.get("version")
    if found != version:
        mend = "; update the code" if isinstance(found, int) and found > version else ""
        raise InputError(f"{path} has format version {found}; this code reads {version}{mend}")


def unreadable_record(path: Path, error: Exception, reason: str) -> InputError:
    """Return the error for a file whose record no dataclass takes: because of entries of a newer version, or damage.

    `error` was raised when the record was read; `reason` says what is wrong with a damaged file.
    """
    name = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    if name is not None:
        return InputError(f"{path} was written by a newer version of this code, which records {name[1]}; update it")
    return InputError(f"{path} is damaged{reason}")


def _refuse_swelling(path: Path) -> None:
    """Raise InputError if a zip file would unpack to more than its own size: torch does not compress."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise InputError(
                f"{path} would unpack to {unpacked} bytes, more than its own size; torch writes no such file"
            )
