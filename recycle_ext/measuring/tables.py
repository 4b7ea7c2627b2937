"""Markdown tables, aligned so that a terminal shows them well too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table of strings. left: the first columns, which hold words; the other columns hold right-aligned figures."""
    from tabulate import tabulate

    align = ["left" if index < left else "right" for index in range(len(names))]
    return tabulate(rows, names, tablefmt="pipe", colalign=align, disable_numparse=True)


def percent(share: float | None, digits: int = 0) -> str:
    """0.256 -> "26%"; None -> ""."""
    return "" if share is None else f"{share:.{digits}%}"
