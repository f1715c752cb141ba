"""What made the results in a folder: a record of each file, in `summary.json` and, until a run ends, in its log.

A file's record is on the disk before the file gets its name, so that a stopped run leaves none without. A file without
a record is no result: an older version made it, or something else.
"""

import fcntl
import json
import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prediction.areas import Areas
from utils.arguments import REMOVED
from utils.errors import InputError
from utils.files import write_json

SUMMARY = "summary.json"

_LOGS = ".results.*.jsonl"


@dataclass(frozen=True)
class Record:
    """What is known of one file of results.

    Attributes:
        file: its name.
        size: of the file, in bytes.
        time: of its last change, in nanoseconds.
        checksum: CRC-32 of its bytes, which a copy of the file has, too.
        made_by: the image, the checkpoint and the settings that it depends on, in plain values.
        areas: of a mask: what it holds.
        features: of a layer: the number of its polygons.
        changed: of a map of stability: the part of the pixels whose class changes.
    """

    file: str
    size: int
    time: int
    checksum: int
    made_by: dict[str, Any]
    areas: Areas | None = None
    features: int | None = None
    changed: float | None = None

    @classmethod
    def of(cls, part: Path, file: str, made_by: Mapping[str, Any], **more: Any) -> "Record":
        """Return the record of a complete file at `part` that will be called `file`."""
        status = part.stat()
        return cls(file, status.st_size, status.st_mtime_ns, _checksum(part), plain(made_by), **more)

    @classmethod
    def parse(cls, values: Any) -> "Record | None":
        """Return the record of which `asdict` gave `values`; None if they are none."""
        with suppress(TypeError, KeyError, AttributeError):
            if isinstance(values["made_by"], dict):
                areas = values.get("areas")
                return cls(**{**values, "areas": None if areas is None else Areas(**areas)})
        return None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as they are read back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between what made a file and what would make it now."""
    found: dict[str, None] = {}
    for name in [*now, *(before.keys() - now.keys())]:
        old, new = before.get(name), now.get(name)
        if old == new and (name in REMOVED or (name in before and name in now)):
            continue
        if name in ("image_size", "image_time", "georeference"):
            found["the image was changed" if before.get("image") == now.get("image") else "another image"] = None
        elif name == "image":
            found["another image"] = None
        elif name.endswith("sha256"):
            found["another checkpoint"] = None
        else:
            found[f"{name} {old}, now {new}"] = None
    return list(found)


class Records:
    """The records of the files in a folder, those of other runs that go on in it included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / f".results.{socket.gethostname()}.{os.getpid()}.jsonl"
        self._known = _read(folder)

    def of(self, path: Path) -> Record | None:
        """Return the record of the file at `path` in the folder; None if there is none of that very file."""
        status = path.stat()
        known = [one for one in self._known.get(path.name, ()) if one.size == status.st_size]
        # equal bytes may have been made twice, by different causes: only a copy is known by them
        found = [one for one in known if one.time == status.st_mtime_ns]
        if known and not found:
            checksum = _checksum(path)
            found = [one for one in known if one.checksum == checksum]
        return found[-1] if found else None

    def add(self, records: Iterable[Record]) -> None:
        """Record files that are complete, before they get their names. Raises InputError if that fails."""
        records = list(records)
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in records)
        try:
            with _locked(self.folder), self._log.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            names = ", ".join(str(self.folder / one.file) for one in records)
            raise InputError(f"{names} cannot be written: its record cannot: {error.strerror or error}") from error

    def check_summary(self) -> None:
        """Raise InputError if another program's file lies under the summary's name."""
        path = self.folder / SUMMARY
        if path.exists() and not _load(path).keys() >= {"classes", "images"}:
            raise InputError(
                f"{path} is no summary of predict.py; move it away, give --overwrite, or name another --output"
            )

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write `summary` with the records of all files that are in the folder; the logs are then needed no more."""
        with _locked(self.folder):
            self._known = _read(self.folder)
            paths = [self.folder / name for name in sorted(self._known)]
            found = [self.of(path) for path in paths if path.is_file()]
            results = {
                one.file: {name: value for name, value in asdict(one).items() if name != "file" and value is not None}
                for one in found
                if one is not None
            }
            write_json(self.folder / SUMMARY, {**summary, "results": results})
            for left in self.folder.glob(_LOGS):
                left.unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, list[Record]]:
    """Return the records in a folder by the names of files; a name may have several, of files before and after."""
    results = _load(folder / SUMMARY).get("results")
    values: list[Any] = []
    if isinstance(results, dict):
        values = [{**one, "file": name} for name, one in results.items() if isinstance(one, dict)]
    for log in sorted(folder.glob(_LOGS)):
        with suppress(OSError, ValueError):  # the last line of a killed run may be cut short
            for line in log.read_text(encoding="utf-8").splitlines():
                values.append(json.loads(line))
    found: dict[str, list[Record]] = {}
    for one in map(Record.parse, values):
        if one is not None:
            found.setdefault(one.file, []).append(one)
    return found


def _load(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if it is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            found = zlib.crc32(part, found)
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs from the logs and the summary in `folder`, on file systems that have locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
