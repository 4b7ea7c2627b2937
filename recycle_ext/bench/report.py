"""What a run comes to: medians, shares of what the machine allows, as JSON and as Markdown."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from recycle_ext import _C
from recycle_ext.decoding.decoder import AUTO
from recycle_ext.measuring.interleave import Entry

_MEDIANS = (
    "tokens_per_second",
    "gigabytes_per_second",
    "read_bandwidth_gigabytes_per_second",
    "roofline_fraction",
    "acceptance_rate",
    "first_token_seconds",
    "prefill_tokens_per_second",
)
_COLUMNS = (
    "system",
    "mode",
    "width",
    "threads",
    "batch",
    "tokens/s",
    "GB/s",
    "of bandwidth",
    "acceptance",
    "of limit",
    "first token",
    "prompt tokens/s",
    "peak MB",
)


def machine() -> dict:
    """What the figures depend on besides the model."""
    return {
        "cpu": _cpu_name(),
        "cores": _C.available_cores(),
        "isa": _C.isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recycle_ext": _C.build_info()["version"],
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()  # what ARM's cpuinfo does not say


def report(entries: Sequence[Entry], settings: dict) -> dict:
    """The object that --json writes, of the contenders that were measured at least once."""
    measured = [entry for entry in entries if entry.measurements and not entry.left_out]
    results = [summary(entry) for entry in measured]
    for result in results:
        result["limit_fraction"] = limit_fraction(result, results)
    probes = [m["read_bandwidth_gigabytes_per_second"] for e in measured for m in e.measurements]
    return {
        "machine": machine(),
        "settings": settings,
        "read_bandwidth_gigabytes_per_second": median(probes) if probes else None,
        "results": results,
    }


def summary(entry: Entry) -> dict:
    """Medians over the repeats of one contender, and what is known of its model."""
    contender = entry.job.contender

    def middle(name: str) -> float | None:
        values = [measurement[name] for measurement in entry.measurements]
        return None if None in values else median(values)

    result = {
        "system": contender.system,
        "mode": contender.mode,
        "width": contender.width,
        "threads": contender.threads,
        "batch": contender.batch,
        "drafts": contender.drafts,
    }
    result |= {name: middle(name) for name in _MEDIANS}
    result["peak_memory_bytes"] = entry.measurements[0]["peak_memory_bytes"]
    result |= entry.facts
    result["repeats"] = [measurement["tokens_per_second"] for measurement in entry.measurements]
    if entry.phases is not None:
        result["phases"] = entry.phases
    return result


def limit_fraction(result: dict, results: Sequence[dict]) -> float | None:
    """The speed-up over standard mode, as a share of what it would be if only bytes of weights counted.

    That limit is the tokens a step gives (drafts + 1 in alternate mode) times the bytes of a standard step
    over those of this one. None without drafts, where their number changes, or without a standard contender
    beside it.
    """
    if not result["drafts"] or result["drafts"] == AUTO:
        return None
    same = ("system", "width", "threads", "batch")
    for other in results:
        if other["mode"] == "standard" and all(other[name] == result[name] for name in same):
            tokens_a_step = 1 + result["drafts"] * result["acceptance_rate"]
            limit = tokens_a_step * result["standard_step_bytes"] / result["step_bytes"]
            return result["tokens_per_second"] / other["tokens_per_second"] / limit
    return None


def heading(report: dict) -> str:
    """Two lines above the table: the machine, and what was run on it."""
    here, settings = report["machine"], report["settings"]
    cores = f"{here['cores']} core" + ("s" if here["cores"] != 1 else "")
    # Fewer than were asked for where Ctrl-C ended it.
    repeats = min(len(result["repeats"]) for result in report["results"])
    return (
        f"{here['cpu']}, {cores}, {here['isa']}, "
        f"{report['read_bandwidth_gigabytes_per_second']:.1f} GB/s; torch {here['torch']}; "
        f"{here['date']}\n"
        f"{settings['model_name']}: {settings['new_tokens']} tokens after {settings['context']}, "
        f"a prompt of {settings['prompt_tokens']}, medians of {repeats}"
        + (f"; our cache in {settings['cache_dtype']}" if settings["cache_dtype"] else "")
    )


def table(report: dict) -> str:
    """The results in Markdown."""
    rows = [
        [
            result["system"],
            _mode(result),
            result["width"],
            str(result["threads"]),
            str(result["batch"]),
            f"{result['tokens_per_second']:.1f}",
            f"{result['gigabytes_per_second']:.1f}",
            _percent(result["roofline_fraction"]),
            _percent(result["acceptance_rate"]),
            _percent(result["limit_fraction"]),
            f"{result['first_token_seconds'] * 1e3:.0f} ms",
            f"{result['prefill_tokens_per_second']:.0f}",
            f"{result['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for result in report["results"]
    ]
    return markdown(
        _COLUMNS,
        rows,
        left=3,
    )


def phase_tables(report: dict) -> str:
    """A table for each contender whose phases were taken: where the time of a decode step goes."""
    tables = []
    for result in report["results"]:
        if "phases" not in result:
            continue
        rows = [
            [
                phase["part"],
                phase["phase"],
                f"{phase['times']:.0f}",
                f"{phase['work_microseconds']:.0f}",
                f"{phase['wait_microseconds']:.0f}",
                _percent(phase["share"]),
            ]
            for phase in result["phases"]
        ]
        title = (
            f"Phases of {_mode(result)} {result['width']}, "
            f"threads {result['threads']}, batch {result['batch']}:"
        )
        names = ["part", "phase", "times a step", "work us", "wait us", "of the step"]
        tables.append(f"{title}\n\n{markdown(names, rows, left=2)}")
    return "\n\n".join(tables)


def _mode(result: dict) -> str:
    """With the number of drafts where it is not the usual one."""
    return result["mode"] + (
        f" ({result['drafts']} drafts)" if result["drafts"] not in (0, 1) else ""
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table, padded so that it can be read as it is. left: columns of words; the others are figures."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(names), line(rule), *map(line, rows)])
