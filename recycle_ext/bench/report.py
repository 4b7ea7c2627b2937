"""The results of a run: medians and shares of the machine's limits, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median

from recycle_ext.bench.interleaved_runs import RunnerRecord
from recycle_ext.bench.runners import PEERS
from recycle_ext.decoding.decoder import AUTO
from recycle_ext.measuring.machine import machine, plural
from recycle_ext.measuring.tables import markdown_table, percent

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
    "dtype",
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


def report(records: Sequence[RunnerRecord], settings: dict) -> dict:
    """The object that --json writes, of the runners that were measured at least once."""
    measured = [record for record in records if record.measurements and not record.failed]
    results = [summary(record) for record in measured]
    for result in results:
        result["limit_fraction"] = limit_fraction(result, results)
    probes = [m["read_bandwidth_gigabytes_per_second"] for r in measured for m in r.measurements]
    return {
        "machine": machine(),
        "peer_versions": peer_versions({result["system"] for result in results}),
        "settings": settings,
        "read_bandwidth_gigabytes_per_second": median(probes) if probes else None,
        "results": results,
    }


def peer_versions(systems: set[str]) -> dict[str, str]:
    """Versions of the packages behind the measured peers, by the packages' names."""
    found = {}
    for system, (_, pip_names) in PEERS.items():
        if system in systems:
            package = pip_names.split()[0]
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "unknown"
    return found


def summary(record: RunnerRecord) -> dict:
    """Medians over the repeats of one runner, every repeat, and the facts of its model."""
    runner = record.job.runner

    def median_of(name: str) -> float | None:
        values = [measurement[name] for measurement in record.measurements]
        return None if None in values else median(values)

    result = {
        "system": runner.system,
        "mode": runner.mode,
        "dtype": runner.dtype,
        "threads": runner.threads,
        "batch": runner.batch,
        "drafts": runner.drafts,
    }
    result |= {name: median_of(name) for name in _MEDIANS}
    # Of the first repeat: the later ones have seen the probe's buffer, which is as large as the model.
    result["peak_memory_bytes"] = record.measurements[0]["peak_memory_bytes"]
    result |= record.facts
    result["repeats"] = [{name: measurement[name] for name in _MEDIANS} for measurement in record.measurements]
    if record.phases is not None:
        result["phases"] = record.phases
    return result


def limit_fraction(result: dict, results: Sequence[dict]) -> float | None:
    """The speed-up over standard mode, as a share of the speed-up that the bytes of the weights allow.

    That limit is (1 + drafts * acceptance) * (bytes of a standard step) / (bytes of this runner's step). None without draft
    tokens, where their number changes, or without a standard runner of the same dtype, threads and batch.
    """
    if not result["drafts"] or result["drafts"] == AUTO:
        return None
    same = ("system", "dtype", "threads", "batch")
    for other in results:
        if other["mode"] == "standard" and all(other[name] == result[name] for name in same):
            tokens_per_step = 1 + result["drafts"] * result["acceptance_rate"]
            limit = tokens_per_step * result["standard_step_bytes"] / result["step_bytes"]
            return result["tokens_per_second"] / other["tokens_per_second"] / limit
    return None


def heading(report: dict) -> str:
    """Two lines above the table: the machine, and the settings."""
    here, settings = report["machine"], report["settings"]
    # Fewer than requested if Ctrl-C ended the run.
    repeats = min(len(result["repeats"]) for result in report["results"])
    return (
        f"{here['cpu']}, {plural(here['cores'], 'core')}, {here['isa']}, "
        f"{report['read_bandwidth_gigabytes_per_second']:.1f} GB/s; torch {here['torch']}; "
        f"{here['date']}\n"
        f"{settings['model_name']}: {settings['new_tokens']} tokens after {settings['context']}, "
        f"a prompt of {settings['prompt_tokens']}, medians of {repeats}"
        + (f"; cache of recycle_ext in {settings['cache_dtype']}" if settings["cache_dtype"] else "")
    )


def table(report: dict) -> str:
    """The results in Markdown."""
    rows = [
        [
            result["system"],
            mode_label(result),
            result["dtype"],
            str(result["threads"]),
            str(result["batch"]),
            f"{result['tokens_per_second']:.1f}",
            f"{result['gigabytes_per_second']:.1f}",
            percent(result["roofline_fraction"]),
            percent(result["acceptance_rate"]),
            percent(result["limit_fraction"]),
            f"{result['first_token_seconds'] * 1e3:.0f} ms",
            f"{result['prefill_tokens_per_second']:.0f}",
            f"{result['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for result in report["results"]
    ]
    return markdown_table(_COLUMNS, rows, left=3)


def phase_tables(report: dict) -> str:
    """A table for each runner whose phases were measured: where the time of a decode step goes."""
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
                percent(phase["share"]),
            ]
            for phase in result["phases"]
        ]
        title = (
            f"Phases of {mode_label(result)} {result['dtype']}, threads {result['threads']}, batch {result['batch']}:"
        )
        names = ["part", "phase", "times a step", "work us", "wait us", "of the step"]
        tables.append(f"{title}\n\n{markdown_table(names, rows, left=2)}")
    return "\n\n".join(tables)


def mode_label(result: dict) -> str:
    """The mode, with the number of draft tokens where it is not 1."""
    drafts = result["drafts"]
    return result["mode"] + (f" (drafts {drafts})" if drafts not in (0, 1) else "")
