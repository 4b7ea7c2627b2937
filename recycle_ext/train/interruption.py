"""Ctrl-C between the steps of a run, so that no step is half done when the state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Interruption:
    """A context in which the first Ctrl-C is a request, and the second one interrupts at once.

    tell: called at the request. Where Ctrl-C does not interrupt Python (in another thread than the main one, or ignored
    by the caller), nothing changes.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._requested = False
        is_main = threading.current_thread() is threading.main_thread()
        self._is_active = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def is_requested(self) -> bool:
        """Whether Ctrl-C came."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._tell()

    def __enter__(self) -> Interruption:
        if self._is_active:
            signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
