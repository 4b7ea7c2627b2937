"""Ctrl-C and SIGTERM between the steps of a run, so that no step is half done when the state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from recycle_ext.command_line import TERMINATED

_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM is a request, and the second one ends the run at once.

    tell: called at the request. Where a signal does not have Python's default handler (in another thread than the main
    one, or ignored by the caller), nothing changes for that signal. A KeyboardInterrupt after SIGTERM leaves the context
    as the SystemExit with the status of SIGTERM.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._requested: int | None = None
        is_main = threading.current_thread() is threading.main_thread()
        self._signals = [n for n, default in _DEFAULTS.items() if is_main and signal.getsignal(n) == default]

    def is_requested(self) -> bool:
        """Whether Ctrl-C or SIGTERM came."""
        return self._requested is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = number
        self._restore()
        self._tell()

    def _restore(self) -> None:
        for number in self._signals:
            signal.signal(number, _DEFAULTS[number])

    def __enter__(self) -> Interruption:
        for number in self._signals:
            signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is KeyboardInterrupt and self._requested == signal.SIGTERM:
            raise SystemExit(TERMINATED)
