"""What the command lines share: how they end, and lists of names and numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from recycle_ext.decoder import AUTO
from recycle_ext.errors import RecycleError

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


def exit_status(run: Callable[[], int]) -> int:
    """Runs a command; errors of the user's become one line and exit status 2."""
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


def number_of_drafts(text: str) -> int | str:
    """What --drafts may be, for argparse; whether there can be so many is the decoder's to say."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def names(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    """A list with commas, each of its names an allowed one, none twice."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in found:
        if name not in allowed:
            raise RecycleError(f"{flag} has {name!r}; it must be of {', '.join(allowed)}")
    return found


def numbers(flag: str, text: str, most: int | None = None) -> list[int]:
    """A list with commas of whole numbers from 1 on, none twice."""
    bounds = "at least 1" if most is None else f"1 to {most}"
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise RecycleError(f"{flag} is {text!r}; it must be whole numbers with commas between")
        number = int(part)
        if number < 1 or (most is not None and number > most):
            raise RecycleError(f"{flag} has {number}; it must be {bounds}")
        found.append(number)
    return list(dict.fromkeys(found))
