"""What all command lines share: how they end, and lists of names and numbers in one option."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from recycle_ext.errors import RecycleError, RecycleWarning

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


def exit_status(run: Callable[[], int]) -> int:
    """Runs a command; errors of the user's become one line and exit status 2, warnings one line."""
    warnings.formatwarning = _format_warning
    try:
        return run()
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough; keep Python from complaining once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
        if not part.strip().isdecimal():
            raise RecycleError(f"{flag} is {text!r}; it must be whole numbers with commas between")
        number = int(part)
        if number < 1 or (max_value is not None and number > max_value):
            raise RecycleError(f"{flag} has {number}; it must be {bounds}")
        found.append(number)
    return list(dict.fromkeys(found))
