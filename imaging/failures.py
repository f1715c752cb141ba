"""Whatever a library raises while it reads one file becomes one line that names the file."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from PIL import UnidentifiedImageError

from utils.errors import InputError
from utils.files import final_path, space_left, write_fault


class _Quiet:
    """A context without warnings. Threads may be in it at once: Python's own would restore filters in a wrong order."""

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.close()


_quiet = _Quiet()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every exception of the body into an `InputError` about `path`; warnings of the decoders are dropped.

    Only calls that read the file belong into the body: an exception of other work would be blamed on the file.
    """
    try:
        with _quiet:
            yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} takes more memory to read than is free; cut it into smaller images, or copy it again from its "
            "source if it is not so large",
            "too large",
        ) from error
    except Exception as error:  # decoders raise what they like: AttributeError, ZeroDivisionError, struct.error, ...
        raise damaged(path, _reason(error)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every exception of the body, which writes `path`, into an `InputError`; see `not_written`."""
    try:
        with _quiet:
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise not_written(path, _reason(error), "file name" if isinstance(error, UnicodeError) else "") from error


def not_written(path: Path, reason: str, kind: str = "") -> InputError:
    """Return the error for a result, or the file beside that becomes it, which could not be written.

    It concerns its image alone, and has no kind if nothing can be written to the folder any more. `kind` is of the
    fault, if it is none of the disk.
    """
    text = f"{final_path(path)} cannot be written"
    if kind:
        return InputError(f"{text}: {reason}", kind)
    if fault := write_fault(path.parent):
        return InputError(f"{text}: {fault}")
    return InputError(f"{text}: {reason}; {space_left(path.parent)}", "not written")


def damaged(path: Path, reason: str) -> InputError:
    """Return the error for a file that is missing, cut short or broken."""
    return InputError(f"{path} cannot be read: {reason}; copy it again from its source or leave it out", "unreadable")


def unsupported(path: Path, reason: str, mend: str) -> InputError:
    """Return the error for an intact file that is of a kind that cannot be read here."""
    return InputError(f"{path} cannot be used: {reason}; {mend}", "not supported")


def too_large(path: object, pixels: int, most: int) -> InputError:
    """Return the error for a file, or the scene `path`, of `pixels` where at most `most` are allowed."""
    return InputError(
        f"{path} has {pixels} pixels, more than the {most} allowed; cut it into smaller images", "too large"
    )


def _reason(error: Exception) -> str:
    """Return why reading failed, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
