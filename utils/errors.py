"""The exceptions that end a run with one line instead of a stack trace."""

import io
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
    """Bad input: a file, an option or a combination of them. Entry points print one line and exit with code 2."""

    def __init__(self, message: str, kind: str = "") -> None:
        """`message` names the file or option, the rule that it breaks and a remedy; `kind` is the fault in short."""
        # names of files are bytes; those that are not text are spelt so that any stream takes them
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.kind = kind


class RunError(RuntimeError):
    """A run that cannot continue, though its input is right. Entry points print one line and exit with code 1."""


class Interrupted(Exception):
    """A run that signal `number` stopped and that has saved. Entry points print one line; exit code 128 + `number`."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def allow_all_names() -> None:
    """Let the output spell letters with backslashes that its encoding lacks, as in names of files, and go on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_code(work: Callable[[], object]) -> int:
    """Call `work`, the body of a small command. Return 0, or 2 after the line of an InputError."""
    allow_all_names()
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def required(value: Value | None, name: str) -> Value:
    """Return `value`, which cannot be None where this is called. Raises ValueError, with `name`, if it is."""
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Return the first few of `names`, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
