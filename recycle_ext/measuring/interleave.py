"""Interleaved runs: all runners run once per round, so that noise and drift hit all runners alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Runner = TypeVar("Runner")


def rounds(runners: Sequence[Runner], count: int) -> Iterator[list[Runner]]:
    """The order of the runners in each of ``count`` rounds: A B C, then C B A, then A B C, ...

    The alternating direction gives a slow drift over time the same weight in the first runner as in the last.
    """
    for index in range(count):
        yield list(runners) if index % 2 == 0 else list(runners)[::-1]
