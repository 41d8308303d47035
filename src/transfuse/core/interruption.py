"""Ctrl-C and termination requests, answered after the update at work."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message says where the checkpoint is and how to go on."""


class Interruption:
    """While it is entered, the first request to stop sets `asked`, a second one ends the process at once.

    Outside the main thread signals cannot be handled, and nothing is. Inside another one, that of an outer trainer,
    the outer one answers: it has the checkpoint.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        outer = isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Interruption)
        if threading.current_thread() is threading.main_thread() and not outer:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
