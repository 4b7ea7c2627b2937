"""What all command lines share: how they end, and lists of names and numbers in one option.

Exit statuses: 0; 1: the command found something wrong, or its output cannot be written; 2: what the user gave cannot be
used (options, files, models, too little memory for them); 130: Ctrl-C; 141: the reader of a pipe has left; 143: SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from recycle_ext.arguments import shown
from recycle_ext.errors import RecycleError, RecycleWarning, first_line, is_out_of_memory

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
TERMINATED = 143  # and of a program that SIGTERM ended
_PIPE_CLOSED = 141  # and of a program that SIGPIPE ended, as cat
# The opposite of what a stream is for, so that its use is an error. What is written to standard error is lost.
_CLOSED = {"stdin": (os.O_WRONLY, "r"), "stdout": (os.O_RDONLY, "w"), "stderr": (os.O_WRONLY, "w")}


def exit_status(run: Callable[[], int]) -> int:
    """Runs a command, the parsing of its arguments included; a failure becomes one line on standard error, a warning too.

    The caller ends the process with the status that is returned: all output is written then.
    """
    warnings.formatwarning = _format_warning
    for name, (access, mode) in _CLOSED.items():
        if getattr(sys, name) is None:
            # The lowest free descriptor: the stream's own, which else a model's file would take.
            setattr(sys, name, os.fdopen(os.open(os.devnull, access), mode))
    if getattr(sys.stdout, "errors", "") in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no text ends a command
    status = _status_of(run)
    if (error := _flush()) is not None and status == 0:
        status = _status_of_output(error)
    return status


def _status_of(run: Callable[[], int]) -> int:
    try:
        return run()
    except RecycleError as error:
        return _failed(2, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _failed(2, f"not enough memory ({first_line(error)})")
        if not isinstance(error, OSError):
            raise
        if isinstance(error, BrokenPipeError) or _flush() is not None:
            return _status_of_output(error)
        return _failed(1, f"{error.filename}: {error.strerror}" if error.filename else first_line(error))


def _status_of_output(error: OSError) -> int:
    """The status where standard output cannot be written."""
    if isinstance(error, BrokenPipeError):
        return _PIPE_CLOSED  # the reader has seen enough
    return _failed(1, f"standard output cannot be written: {error.strerror}")


def _failed(status: int, message: str) -> int:
    with contextlib.suppress(OSError):  # of standard error: there is nobody to tell
        print(f"error: {message}", file=sys.stderr)
    return status


def _flush() -> OSError | None:
    """Writes what is left of standard output. What cannot be written is dropped: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


_format_with_code = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *place) -> str:
    """What is wrong with a user's file, without the place in the code that found it."""
    if issubclass(category, RecycleWarning):
        return f"warning: {message}\n"
    return _format_with_code(message, category, *place)


def names(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    """A list with commas, each of its names an allowed one, none twice."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in found:
        if name not in allowed:
            raise RecycleError(f"{flag} has {name!r}; it must be of {', '.join(allowed)}")
    return found


def numbers(flag: str, text: str, max_value: int | None = None) -> list[int]:
    """A list with commas of whole numbers from 1 on, none twice."""
    bounds = "at least 1" if max_value is None else f"1 to {max_value}"
    found = []
    for part in text.split(","):
        try:
            number = int(part)
        except ValueError:
            raise RecycleError(f"{flag} is {shown(text)}; it must be whole numbers with commas between") from None
        if number < 1 or (max_value is not None and number > max_value):
            raise RecycleError(f"{flag} has {number}; it must be {bounds}")
        found.append(number)
    return list(dict.fromkeys(found))
