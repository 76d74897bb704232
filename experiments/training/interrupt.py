"""Signals that stop a run, turned into a flag that the training loop reads between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP


class Interrupt:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP sets `signal`, a second one terminates.

    A closed terminal sends SIGHUP.

    Attributes:
      signal: number of the received signal, or None.
    """

    def __init__(self, message: str = "") -> None:
        """Print `message` on stderr as soon as a signal arrives."""
        self.signal: int | None = None
        self._message = message
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self._message:
            # Not `print`: the signal may have interrupted a write to the same buffer.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: {self._message}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def exit_code(self) -> int:
        """Return 128 plus the number of the signal, the convention of shells."""
        return 128 + (self.signal or 0)
