"""Signals that ask a run to stop, heard where it is ready for them."""

import os
import signal
import sys
import time
from types import FrameType, TracebackType

REPEAT_SECONDS = 1.0
"""A second SIGINT within this time is the first one's echo: torchrun passes on what the terminal sent already."""


class StopSignals:
    """While entered, SIGINT and SIGTERM do nothing but set `received`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
            line = (
                f"{signal.Signals(number).name}: finishing the step, then saving; Ctrl-C again stops without saving\n"
            )
            os.write(sys.__stderr__.fileno(), line.encode())  # print() may itself be at work when the signal comes
        elif number == signal.SIGINT and now - self._at > REPEAT_SECONDS:
            raise KeyboardInterrupt
