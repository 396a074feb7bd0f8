"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import Any, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """While it is entered, SIGTERM and SIGINT are kept in ``signal`` for the next step.

    So is a second one: torchrun passes on what a terminal or a scheduler has already sent to all.
    """

    def __init__(self, message: str = "") -> None:
        self.signal = 0
        self._message = message.encode()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame: Any) -> None:
        if not self.signal:
            os.write(2, self._message)  # sys.stderr may be writing just now
        self.signal = number


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that start meanwhile never see the signals, which may reach all of a terminal or a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
