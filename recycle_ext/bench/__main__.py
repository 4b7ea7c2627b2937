"""The command line of python -m recycle_ext.bench."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from recycle_ext import _C
from recycle_ext.bench import gpu_report
from recycle_ext.bench.interleaved_runs import RunnerRecord, run_interleaved
from recycle_ext.bench.plot import plot
from recycle_ext.bench.report import heading, phase_tables, report, table
from recycle_ext.bench.rows import MAX_ROWS, measure_rows, results, row_table
from recycle_ext.bench.runners import PEERS, ROW_SYSTEMS, Request, check_context, jobs
from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.checkpoint.module import default_module, open_module
from recycle_ext.command_line import INTERRUPTED, exit_status, names, numbers
from recycle_ext.decoding.decoder import AUTO, MODES
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.errors import RecycleError
from recycle_ext.files import write_whole
from recycle_ext.generate.options import number_of_drafts
from recycle_ext.measuring.extras import require
from recycle_ext.measuring.machine import machine, plural
from recycle_ext.measuring.plots import check_outputs

_DTYPES = ("native", *DTYPES)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.bench",
        description="Measures the modes and dtypes of a model, and other engines, in interleaved runs.",
    )
    _add_runner_options(parser)
    _add_measurement_options(parser)
    _add_output_options(parser)
    return parser.parse_args(arguments)


def _add_runner_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=".gguf file, Hugging Face directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--module", help="directory of a module, or none (default: the one shipped for the model)")
    parser.add_argument(
        "--dtypes",
        default="bf16,q8,q4",
        metavar="LIST",
        help=f"weights: of {', '.join(_DTYPES)}; native: a GGUF's own (default: bf16,q8,q4)",
    )
    parser.add_argument(
        "--module-dtype",
        choices=DTYPES,
        help="the module's weights (default: f32 for a float32 model, else as the module was trained, else q8)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="keys and values of recycle_ext (default: f32 for a float32 model, else bf16)",
    )
    parser.add_argument(
        "--modes", metavar="LIST", help=f"of {', '.join(MODES)} (default: all; only standard without a module)"
    )
    parser.add_argument(
        "--drafts",
        type=number_of_drafts,
        default=1,
        metavar="K",
        help="draft tokens per step (default: 1), or auto: in verify mode 0 to 4, chosen by measured speed",
    )
    parser.add_argument("--threads", metavar="LIST", help="of the kernels (default: as generate chooses)")
    parser.add_argument("--batch", default="1", metavar="LIST", help="sequences decoded together (default: 1)")
    parser.add_argument("--peers", default="", metavar="LIST", help=f"other engines: {', '.join(PEERS)}")


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=int,
        default=16,
        metavar="N",
        help="tokens in the cache before decoding is timed (default: 16)",
    )
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="length of the prompt whose prefill is timed (default: 512)",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="medians are shown (default: 5)")
    parser.add_argument(
        "--rows",
        metavar="LIST",
        help="measure the price of a row instead: the time of steps of 1, 2, ... rows (such as 1,2,3,4,5,8)",
    )
    parser.add_argument(
        "--phases", action="store_true", help="also measure where the time of recycle_ext's decode steps goes"
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all figures, every repeat too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a bar chart (needs matplotlib)")
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), or cuda (needs --report): models of known shapes on a GPU"
    )
    parser.add_argument(
        "--report", metavar="DIR", help="with --device cuda: tests, compute-sanitizer and figures, written to DIR"
    )


def check_request(options: argparse.Namespace) -> Request:
    """The options, checked. Raises RecycleError that names the wrong option."""
    for name in ("context", "new_tokens", "prompt_tokens", "repeats"):
        if (value := getattr(options, name)) < 1:
            flag = "--" + name.replace("_", "-")
            raise RecycleError(f"{flag} is {value}; it must be at least 1")
    if options.drafts != AUTO and not 1 <= options.drafts <= _C.MAX_DRAFTS:
        raise RecycleError(f"--drafts is {options.drafts}; it must be 1 to {_C.MAX_DRAFTS}, or {AUTO}")
    require("tabulate", "python -m recycle_ext.bench")
    modes = list(MODES) if options.modes is None else names("--modes", options.modes, list(MODES))
    dtypes = names("--dtypes", options.dtypes, _DTYPES)
    for flag, found in (("--modes", modes), ("--dtypes", dtypes)):
        if not found:
            raise RecycleError(f"{flag} is empty")
    check_outputs(options.json, options.plot, {"machine", "settings", "results"})
    return Request(
        dtypes=dtypes,
        modes=modes,
        cache_dtype=options.cache_dtype,
        module_dtype=options.module_dtype,
        drafts=options.drafts,
        threads=numbers("--threads", options.threads or str(_C.n_threads()), 256),
        batches=numbers("--batch", options.batch),
        context=options.context,
        new_tokens=options.new_tokens,
        prompt_tokens=options.prompt_tokens,
        peers=names("--peers", options.peers, list(PEERS)),
    )


def module_path(given: str | None, base: Checkpoint) -> Path | None:
    """Directory of the module, opened once so that this process refuses a wrong one before any worker starts."""
    if given == "none":
        return None
    path = default_module(base) if given is None else Path(given)
    if path is not None:
        open_module(path, base)
    return path


def note(text: str) -> None:
    """Tells the user on standard error which rows the table will not have."""
    print(text, file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    if options.report is not None:
        require("tabulate", "--report")
        return gpu_report.run(options.device, options.report)
    if options.device != "cpu":
        raise RecycleError(f"--device {options.device} needs --report DIR, the folder for the figures")
    request = check_request(options)
    checkpoint = open_checkpoint(options.model)
    module = module_path(options.module, checkpoint)
    if module is None and request.modes != ["standard"]:
        if options.modes is not None:
            raise RecycleError(f"--modes is {options.modes}, which needs a module; there is none")
        request = request.only_standard()
    check_context(request, checkpoint.config)
    if module is None and options.modes is None and options.rows is None:
        note("verify and alternate are left out: there is no module for this model")
    if options.rows is not None:
        return run_rows(request, checkpoint, options)
    with tempfile.TemporaryDirectory(prefix="recycle_bench_") as scratch:
        found = jobs(request, checkpoint, module, Path(scratch), note)
        records = [RunnerRecord(job) for job in found]
        finished = run_interleaved(records, options.repeats, options.phases)
    settings = {
        "model": Path(checkpoint.path).name,
        "model_name": checkpoint.config.name,
        "module": None if module is None else module.name,
        "context": request.context,
        "new_tokens": request.new_tokens,
        "prompt_tokens": request.prompt_tokens,
        "repeats": options.repeats,
        "cache_dtype": options.cache_dtype,
        "module_dtype": options.module_dtype,
    }
    results = report(records, settings)
    if results["results"]:
        show(results, options)
    if not finished:
        return INTERRUPTED
    return 0 if results["results"] else 1


def run_rows(request: Request, checkpoint: Checkpoint, options: argparse.Namespace) -> int:
    """Measures what a row costs and prints the table; returns the exit status."""
    rows = numbers("--rows", options.rows, MAX_ROWS)
    if 1 not in rows:
        raise RecycleError(f"--rows is {options.rows}; it must have 1, which the others are compared with")
    request = dataclasses.replace(request, modes=["standard"], batches=[1], sequences=max(rows))
    with tempfile.TemporaryDirectory(prefix="recycle_bench_") as scratch:
        found = [
            job for job in jobs(request, checkpoint, None, Path(scratch), note) if job.runner.system in ROW_SYSTEMS
        ]
        times = measure_rows([RunnerRecord(job) for job in found], rows, options.repeats)
    measured = results(times)
    if not measured:
        return 1
    here = machine()
    print(f"{here['cpu']}, {plural(here['cores'], 'core')}, {here['isa']}; {here['date']}")
    print(f"{checkpoint.config.name}: steps after {request.context} tokens\n\n{row_table(measured)}")
    if options.json is not None:
        settings = {"model_name": checkpoint.config.name, "context": request.context, "steps": request.new_tokens}
        write_whole(
            options.json, json.dumps({"machine": here, "settings": settings, "rows": measured}, indent=2) + "\n"
        )
    return 0


def show(results: dict, options: argparse.Namespace) -> None:
    """Prints the tables, writes the files."""
    print(f"{heading(results)}\n\n{table(results)}", flush=True)
    if options.phases:
        print(f"\n{phase_tables(results)}", flush=True)
    if options.json is not None:
        write_whole(options.json, json.dumps(results, indent=2) + "\n")
    if options.plot is not None:
        plot(results["results"], heading(results), options.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return exit_status(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
