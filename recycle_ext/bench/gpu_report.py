"""python -m recycle_ext.bench --device cuda --report DIR: everything that needs a GPU, in one command without a network.

First the tests on the GPU, from what is simplest to what is fastest (CHECKS): kernels one after the other without a graph;
small ones of these tests under compute-sanitizer; with graphs; with kernels that overlap. Then interleaved runs of models of
known shapes with random weights, recycle_ext in all modes beside PyTorch eager, torch.compile and transformers. DIR gets a
.txt of each check, gpu.json, gpu.md and gpu.png, each as soon as it exists.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from recycle_ext.bench.plain_torch import StaticDecoder
from recycle_ext.bench.plot import plot
from recycle_ext.bench.random_model import SHAPES, ShapeOf, random_model
from recycle_ext.bench.runners import OURS
from recycle_ext.decoding.cuda_graph import GraphedStep
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.files import check_output, has_keys, make_directory, write_whole
from recycle_ext.measuring.bandwidth import read_bandwidth
from recycle_ext.measuring.extras import is_installed
from recycle_ext.measuring.interleave import rounds
from recycle_ext.measuring.machine import gpu_machine
from recycle_ext.measuring.tables import markdown_table, percent
from recycle_ext.ops.registration import check_device
from recycle_ext.weights.pack import PackedModel

CONTEXT = 128  # tokens in the cache before a step is timed
STEPS = 64  # of a measurement
ROUNDS = 7
PROMPT = 512  # tokens of the prefill that is timed
# Small tests, and what they leave out of a step (decoding/cuda_graph.py, csrc/cuda/device_info.cu).
SANITIZED = "attention_is_as_exact or head_takes or head_draws or without_a_graph"
_NO_OVERLAP = {"RECYCLE_CUDA_OVERLAP": "0"}
_NO_GRAPH = _NO_OVERLAP | {"RECYCLE_CUDA_GRAPH": "0"}
# Seconds. The first kernel of a process loads all of them, which takes minutes under a sanitizer.
TESTS_LIMIT, SANITIZER_LIMIT = 600, 900
TESTS = ("test_gpu.py", "test_cuda_ops.py")
_COLUMNS = (
    "model",
    "system",
    "mode",
    "dtype",
    "us a step",
    "tokens/s",
    "GB/s",
    "of bandwidth",
    "speed-up",
    "of limit",
    "prompt tokens/s",
)


Begin = Callable[[], None]


@dataclass
class GpuRunner:
    """One row of the table.

    start: prepares, calls its argument, starts STEPS steps and returns. tokens_per_step: None if the number depends on the
    module's quality. seconds: of a step, one value per round.
    """

    shape: str
    system: str
    mode: str
    dtype: str
    start: Callable[[Begin], None]
    tokens_per_step: float | None
    step_bytes: int
    standard_step_bytes: int
    seconds: list[float]
    prefill_tokens_per_second: float | None = None


def run(device_name: str, directory: str) -> int:
    """Writes the report; returns the exit status: 1 if a test failed or something could not be measured."""
    device = check_device(device_name)
    if device.type != "cuda":
        raise RecycleError(f"--report needs a GPU: --device is {device_name}")
    out = Path(directory)
    check_folder(out)
    make_directory(out)
    torch.cuda.set_device(device)
    report = {
        "machine": gpu_machine(device),
        "checks": {},
        "settings": {"context": CONTEXT, "steps": STEPS, "rounds": ROUNDS, "prompt": PROMPT},
        "results": [],
    }
    write_json(report, out)
    report["checks"] = run_checks(out)
    for shape in SHAPES:
        report["results"] += measure(shape, device)
        write(report, out)
    print(Path(out, "gpu.md").read_text("utf-8"))
    return int(any("failed" in status for status in report["checks"].values()))


def check_folder(out: Path) -> None:
    """Raises RecycleError where a file of the report would replace one that no earlier report made."""
    if (out / "gpu.json").exists():
        check_output("--report", out / "gpu.json", lambda content: has_keys(content, {"machine", "checks", "results"}))
        return
    names = [out / "gpu.md", out / "gpu.png", *(log_of(check, out) for check in CHECKS)]
    if found := [path.name for path in names if path.exists()]:
        raise RecycleError(f"--report {out}: {found[0]} is there already, without a gpu.json; give another directory")


def write_json(report: dict, out: Path) -> None:
    """Writes gpu.json, which shows that the folder is a report's."""
    write_whole(out / "gpu.json", json.dumps(report, indent=2) + "\n")


def write(report: dict, out: Path) -> None:
    """Writes gpu.json, gpu.md and gpu.png with the results so far."""
    results = report["results"]
    write_json(report, out)
    write_whole(out / "gpu.md", f"{heading(report)}\n\n{table(results)}\n")
    if is_installed("matplotlib"):
        plot(bars(results), heading(report), str(out / "gpu.png"), group="shape")


# ---- checks ---------------------------------------------------------------------------------------------


def run_checks(out: Path) -> dict[str, str]:
    """Runs CHECKS in their order; returns "passed", "failed" or why it was not run, by the name of the check.

    A check that fails does not end the list: what fails in the simplest of them is where to look.
    """
    if not Path("python_tests").is_dir():
        return {"tests": "not run: there is no folder python_tests; start the command in a clone"}
    return {name: check(log_of(name, out)) for name, check in CHECKS.items()}


def log_of(check: str, out: Path) -> Path:
    """Where the output of a check goes."""
    return out / f"{check.replace(' ', '_')}.txt"


def _tests(environment: dict[str, str]) -> Callable[[Path], str]:
    """All tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", *(f"python_tests/{name}" for name in TESTS)]
    return lambda log: _logged(command, log, TESTS_LIMIT, environment)


def _sanitizer(tool: str) -> Callable[[Path], str]:
    """Small tests under a tool of compute-sanitizer."""

    def check(log: Path) -> str:
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None:
            return "not run: compute-sanitizer was not found"
        # Kernels of recycle_ext alone, and no API errors: torch makes CUDA calls that it expects to fail.
        flags = ["--kernel-regex", "kns=recycle", "--report-api-errors", "no", "--error-exitcode", "9"]
        tests = [sys.executable, "-m", "pytest", "-q", "-k", SANITIZED, "python_tests/test_gpu.py"]
        # Each tensor has an allocation of its own, whose ends the sanitizer knows.
        environment = _NO_GRAPH | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return _logged([program, "--tool", tool, *flags, *tests], log, SANITIZER_LIMIT, environment)

    return check


CHECKS = {
    "tests without graph and overlap": _tests(_NO_GRAPH),
    "memcheck": _sanitizer("memcheck"),
    "synccheck": _sanitizer("synccheck"),
    "racecheck": _sanitizer("racecheck"),
    "tests with graph": _tests(_NO_OVERLAP),
    "tests with graph and overlap": _tests({}),
}


def _logged(command: list[str], log: Path, seconds: int, environment: dict[str, str]) -> str:
    """Runs a command with its output in `log`; environment: in addition to this process's."""
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                env=os.environ | environment,
            )
        except subprocess.TimeoutExpired:
            return f"failed: more than {seconds} s"
    return "passed" if done.returncode == 0 else "failed"


# ---- figures --------------------------------------------------------------------------------------------


def measure(shape: ShapeOf, device: torch.device) -> list[dict]:
    """Interleaved runs of all runners of a shape."""
    runners = ours(shape, device)
    runners += peers(shape, runners[0].standard_step_bytes, device)
    for order in rounds(runners, ROUNDS):
        for runner in order:
            runner.seconds.append(seconds_per_step(runner))
    bandwidth = read_bandwidth(device, 1 << 30)
    return [figures(runner, bandwidth) for runner in runners]


def ours(shape: ShapeOf, device: torch.device) -> list[GpuRunner]:
    """All modes in bf16 with each module; in the other dtypes with the first module."""
    found = []
    for dtype in ("bf16", "q8", "q4"):
        for index, (name, config) in enumerate(shape.modules.items()):
            if dtype != "bf16" and index > 0:
                continue
            packed = random_model(shape.base, config, dtype, device)
            for mode in ("standard", "verify", "alternate"):
                if mode == "standard" and index > 0:
                    continue
                label = mode if mode == "standard" or len(shape.modules) == 1 else f"{mode}, {name}"
                found.append(_ours(shape.name, packed, mode, label, dtype))
    return found


def _ours(shape: str, packed: PackedModel, mode: str, label: str, dtype: str) -> GpuRunner:
    capacity = max(CONTEXT + 2 * STEPS, PROMPT) + 16
    decoder = Decoder(packed, mode, capacity=capacity)
    prompt = [i % 1000 for i in range(PROMPT)]
    decoder.prefill(prompt)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decoder.prefill(prompt)  # returns a token, so the GPU has finished
    prefill_seconds = time.perf_counter() - begin
    graph = GraphedStep(decoder.arguments())

    def start(begin: Begin) -> None:
        decoder.lengths.fill_(CONTEXT)
        decoder.pending.fill_(7)
        begin()
        for _ in range(STEPS):
            graph.replay()

    start(lambda: None)
    if (grown := int(decoder.lengths[0, 0]) - CONTEXT) < STEPS:
        raise RecycleError(f"{shape} {label} {dtype}: {grown} tokens in {STEPS} steps")
    return GpuRunner(
        shape,
        OURS,
        label,
        dtype,
        start,
        {"standard": 1.0, "verify": None, "alternate": 2.0}[mode],
        packed.step_bytes(decoder.num_draft_tokens),
        packed.step_bytes(0),
        [],
        PROMPT / prefill_seconds,
    )


def peers(shape: ShapeOf, step_bytes: int, device: torch.device) -> list[GpuRunner]:
    """PyTorch eager, torch.compile and transformers, in bf16. step_bytes: weights that a standard step reads."""
    found = []

    def add(system: str, make: Callable[[], Callable[[Begin], None]]) -> None:
        try:
            start = make()
            for _ in range(2):  # torch.compile records its graph in the second
                start(lambda: None)
            torch.cuda.synchronize()
        except Exception as error:
            # A failure of another engine costs its row, not the report.
            print(f"{shape.name}: {system} is left out: {error}", file=sys.stderr)
            return
        found.append(GpuRunner(shape.name, system, "standard", "bf16", start, 1.0, step_bytes, step_bytes, []))

    add("PyTorch eager", lambda: _plain(shape, device))
    add("torch.compile", lambda: _compiled(shape, device))
    if not is_installed("transformers"):
        print("transformers is left out: it is not installed", file=sys.stderr)
    else:
        add("transformers", lambda: _transformers(shape, device))
    return found


def _plain(shape: ShapeOf, device: torch.device, compiled: bool = False) -> Callable[[Begin], None]:
    step = StaticDecoder(shape.base, CONTEXT + STEPS, device)
    if compiled:
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    token = torch.full((1,), 7, device=device)

    def start(begin: Begin) -> None:
        position = torch.full((1,), CONTEXT, device=device)
        begin()
        for _ in range(STEPS):
            step(token, position)
            position += 1

    return start


def _compiled(shape: ShapeOf, device: torch.device) -> Callable[[Begin], None]:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["inductor"]
    before = counters["cudagraph_skips"]
    start = _plain(shape, device, compiled=True)
    start(lambda: None)
    if counters["cudagraph_skips"] > before:
        raise RuntimeError("torch.compile made no CUDA graph, so its figure would be too low")
    return start


def _transformers(shape: ShapeOf, device: torch.device) -> Callable[[Begin], None]:
    import transformers

    base = shape.base
    config = transformers.LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.n_layers,
        num_attention_heads=base.n_heads,
        num_key_value_heads=base.n_kv_heads,
        head_dim=base.head_dim,
        max_position_embeddings=base.max_position_embeddings,
        tie_word_embeddings=base.tie_word_embeddings,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    prompt = torch.full((1, CONTEXT), 7, device=device)
    token = torch.full((1, 1), 7, device=device)

    @torch.no_grad()
    def start(begin: Begin) -> None:
        cache = transformers.DynamicCache()
        model(prompt, past_key_values=cache)
        begin()
        for _ in range(STEPS):
            model(token, past_key_values=cache)

    return start


def seconds_per_step(runner: GpuRunner) -> float:
    """By the GPU's clock, from the start of the first of STEPS steps to the end of the last."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    runner.start(first.record)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / STEPS


def figures(runner: GpuRunner, bandwidth: float) -> dict:
    """A row of the report, with the keys of the CPU's report."""
    seconds = median(runner.seconds)
    rate = runner.step_bytes / seconds
    tokens = runner.tokens_per_step
    return {
        "shape": runner.shape,
        "system": runner.system,
        "mode": runner.mode,
        "dtype": runner.dtype,
        "batch": 1,
        "threads": None,
        "step_microseconds": seconds * 1e6,
        "tokens_per_second": None if tokens is None else tokens / seconds,
        "gigabytes_per_second": rate / 1e9,
        "read_bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "roofline_fraction": rate / bandwidth,
        "speedup_limit": 2 * runner.standard_step_bytes / runner.step_bytes if tokens == 2 else None,
        "prefill_tokens_per_second": runner.prefill_tokens_per_second,
        "repeats": [s * 1e6 for s in runner.seconds],
    }


# ---- output ---------------------------------------------------------------------------------------------


def heading(report: dict) -> str:
    """One line above the table."""
    here = report["machine"]
    checks = "; ".join(f"{name} {status}" for name, status in report["checks"].items())
    return (
        f"{here['gpu']}, driver {here['driver']}, torch {here['torch']}, CUDA {here['cuda']}; {here['date']}; "
        f"{CONTEXT} tokens in the cache, batch 1, medians of {ROUNDS}; bandwidth is what copies reach, bytes read and "
        f"written added up; {checks}"
    )


def table(results: Sequence[dict]) -> str:
    """Markdown. The speed-up of alternate is over recycle_ext's standard of the same shape and dtype."""
    standard = {
        (r["shape"], r["dtype"]): r["step_microseconds"]
        for r in results
        if r["system"] == OURS and r["mode"] == "standard"
    }
    rows = []
    for r in results:
        speedup = limit = ""
        if r["speedup_limit"] is not None:
            ratio = 2 * standard[r["shape"], r["dtype"]] / r["step_microseconds"]
            speedup, limit = f"{ratio:.2f}x", percent(ratio / r["speedup_limit"])
        rate, prefill = r["tokens_per_second"], r["prefill_tokens_per_second"]
        rows.append(
            [
                r["shape"],
                r["system"],
                r["mode"],
                r["dtype"],
                f"{r['step_microseconds']:.0f}",
                "" if rate is None else f"{rate:.0f}",
                f"{r['gigabytes_per_second']:.0f}",
                percent(r["roofline_fraction"]),
                speedup,
                limit,
                "" if prefill is None else f"{prefill:.0f}",
            ]
        )
    return markdown_table(_COLUMNS, rows, left=4)


def bars(results: Sequence[dict]) -> list[dict]:
    """The results that the plot shows: tokens per second in bf16; not verify, which depends on the module."""
    return [
        r | {"mode": r["mode"].split(",")[0]}
        for r in results
        if r["dtype"] == "bf16" and r["tokens_per_second"] is not None and "6 full" not in r["mode"]
    ]
