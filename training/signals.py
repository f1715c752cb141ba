"""Signals that stop a run at a point where its state can be saved."""

import os
import signal
import sys
import time
from types import FrameType
from typing import Any


class StopSignals:
    """A context in which SIGINT and SIGTERM only set `received`, the first one's number; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
            line = (
                f"{signal.Signals(number).name}: finishing the step, then saving; Ctrl-C again stops without saving\n"
            )
            if sys.__stderr__ is not None:
                os.write(sys.__stderr__.fileno(), line.encode())  # the signal may interrupt a print(), which is locked
        # torchrun forwards the SIGINT that the terminal sends: within a second it is the same one
        elif number == signal.SIGINT and now - self._at > 1:
            raise KeyboardInterrupt
