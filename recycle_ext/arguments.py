"""Checks of the values that a caller gives: each returns the plain Python value, or raises RecycleError with the argument's name."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection
from typing import Any

from recycle_ext.errors import RecycleError

_LONGEST_SHOWN = 80


def shown(value: Any) -> str:
    """``repr(value)`` on one line, cut where it is long; "bytes of length 5" and the like where it fails."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class that is not ours; and Python writes no integer of over 4,300 digits
        text = type(value).__name__
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def integer(name: str, value: Any, low: int | None = None, high: int | None = None, needed: str | None = None) -> int:
    """An int, or what stands for one: a number of NumPy, a tensor of one integer. A bool and a float are refused.

    needed: the words of the error; None: the bounds, both included.
    """
    found = _index(value)
    if found is None or (low is not None and found < low) or (high is not None and found > high):
        if needed is None:
            bounds = {(True, True): "an integer", (False, True): f"at least {low}", (True, False): f"at most {high}"}
            needed = bounds.get((low is None, high is None), f"{low} to {high}")
        raise RecycleError(f"{name} is {shown(value)}; it must be {needed}")
    return found


def _index(value: Any) -> int | None:
    """The integer that ``value`` stands for; None: it stands for none."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)
    except Exception:  # TypeError, or what a tensor of another kind raises
        return None


def number(name: str, value: Any, needed: str) -> float:
    """A float of an int, a float, or what stands for one; NaN, bool and text are refused. needed: the words of the error."""
    try:
        if isinstance(value, (bool, str, bytes, bytearray)) or math.isnan(found := float(value)):
            raise ValueError
    except Exception:  # ValueError, TypeError, OverflowError, or what a tensor of several numbers raises
        raise RecycleError(f"{name} is {shown(value)}; it must be {needed}") from None
    return found


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise RecycleError(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in choices:
        raise RecycleError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}")
    return value


def path(name: str, value: Any) -> str:
    """Text, or a path object."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise RecycleError(f"{name} is {shown(value)}; it must be a path, as text or pathlib.Path")
    return value


def integers(name: str, value: Any, needed: str) -> list[int]:
    """A list, tuple, range, tensor or array of integers, [n] or a batch of one, [1, n]. needed: the words of the error."""
    try:
        if isinstance(value, (str, bytes, bytearray, memoryview, dict, set, frozenset)):
            raise TypeError
        items = list(value.tolist() if hasattr(value, "tolist") else value)
        if len(items) == 1 and isinstance(items[0], (list, tuple, range)):
            items = list(items[0])
    except Exception:  # TypeError, or what a tensor without values raises
        raise RecycleError(f"{name} is {shown(value)}; it must be {needed}") from None
    found = []
    for index, item in enumerate(items):
        if (number := _index(item)) is None:
            raise RecycleError(f"{name}: item {index} is {shown(item)}; there must be {needed}")
        found.append(number)
    return found


def token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """Token ids of a prompt, at least one: see ``integers``."""
    if isinstance(value, (bytes, bytearray)):
        raise RecycleError(f"{name} is {type(value).__name__}; decode it to text, or give token ids")
    ids = integers(name, value, "token ids: integers in a list or tensor [n] or [1, n]")
    if not ids:
        raise RecycleError(f"{name} is empty; it needs at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        index = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise RecycleError(f"{name}: item {index} is {shown(ids[index])}; token ids are 0 to {vocab_size - 1}")
    return ids
