"""--rows: what a further row of a step costs. Speculation and batches stand or fall with this price.

A step of n rows reads every weight once and computes n tokens. With t(n) its time, the price of a row is
c = (t(n) / t(1) - 1) / (n - 1): 0 for rows that are free, 1 for rows that cost as much as a step of their own. Rows of
recycle_ext are those of n sequences, each one token further; llama.cpp's are n tokens of one sequence, with the logits of
each. No drafts are made: what a module costs is not in these figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from tqdm import tqdm

from recycle_ext.bench.interleaved_runs import RunnerRecord, ask, close, load
from recycle_ext.measuring.interleave import rounds
from recycle_ext.measuring.tables import markdown_table

MAX_ROWS = 64


@dataclass
class RowTimes:
    """Seconds of a step of one runner, a list of repeats for each number of rows."""

    record: RunnerRecord
    seconds: dict[int, list[float]] = field(default_factory=dict)


def measure_rows(records: Sequence[RunnerRecord], rows: Sequence[int], repeats: int) -> list[RowTimes]:
    """Times each number of rows of each runner, interleaved; fewer repeats if Ctrl-C ends the run early."""
    times = [RowTimes(record, {n: [] for n in rows}) for record in records]
    cases = [(runner, n) for runner in times for n in rows]
    try:
        with tqdm(total=len(records) + repeats * len(cases), unit=" runs", leave=False) as bar:
            load(records, bar)
            for order in rounds(cases, repeats):
                for runner, n in order:
                    if answer := ask(runner.record, bar, f"{n} rows of", {"rows": n}):
                        runner.seconds[n].append(answer["seconds"])
    except KeyboardInterrupt:
        print("interrupted: the table has the repeats so far", file=sys.stderr)
    finally:
        close(records)
    return [runner for runner in times if not runner.record.failed and all(runner.seconds.values())]


def price(seconds: dict[int, list[float]], n: int) -> tuple[float, float, float] | None:
    """Median, least and largest c over the repeats, each against one row of the same repeat; None for one row."""
    if n == 1 or 1 not in seconds:
        return None
    prices = [(many / one - 1) / (n - 1) for many, one in zip(seconds[n], seconds[1], strict=False)]
    return median(prices), min(prices), max(prices)


def results(times: Sequence[RowTimes]) -> list[dict]:
    """What --json writes: an object for each runner and number of rows."""
    found = []
    for runner in times:
        system = runner.record.job.runner
        for n, seconds in runner.seconds.items():
            c = price(runner.seconds, n)
            found.append(
                {
                    "system": system.system,
                    "dtype": system.dtype,
                    "formats": runner.record.facts["formats"],
                    "threads": system.threads,
                    "rows": n,
                    "seconds": median(seconds),
                    "price": None if c is None else c[0],
                    "price_range": None if c is None else c[1:],
                    "repeats": seconds,
                }
            )
    return found


def row_table(results: Sequence[dict]) -> str:
    """The results in Markdown. A price of which the repeats do not agree on the sign is no price: it says "none seen"."""

    def price_text(result: dict) -> str:
        if result["price"] is None:
            return ""
        low, high = result["price_range"]
        text = "none seen" if low <= 0 <= high else f"{result['price']:.2f}"
        return f"{text} ({low:.2f} to {high:.2f})"

    rows = [
        [
            result["system"],
            result["dtype"],
            result["formats"],
            str(result["threads"]),
            str(result["rows"]),
            f"{result['seconds'] * 1e3:.2f} ({min(result['repeats']) * 1e3:.2f} to {max(result['repeats']) * 1e3:.2f})",
            price_text(result),
        ]
        for result in results
    ]
    columns = ("system", "dtype", "formats", "threads", "rows", "ms a step", "price of a row")
    return markdown_table(columns, rows, left=3)
