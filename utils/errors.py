"""The exceptions that end a run with one line instead of a stack trace."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: a file, an option or a combination of them.

    The message names the file or option, the rule that it breaks and how to mend it. Entry points print
    it as one line and exit with code 2; it never shows as a stack trace. `kind` says in two or three words what is
    wrong, for summaries of many.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        # names of files are bytes; those that are no text are spelt so that any stream takes them
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.kind = kind


class RunError(RuntimeError):
    """A run that cannot go on, though its input is right. One line, exit code 1."""


class Interrupted(Exception):
    """A run that stopped because signal `number` asked it to, and has saved. One line, exit code 128 + `number`."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def exit_code(work: Callable[[], object]) -> int:
    """The exit code of a small command that does `work`: 0, or 2 after one line that says what is wrong."""
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
