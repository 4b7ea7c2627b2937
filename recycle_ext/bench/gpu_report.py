"""python -m recycle_ext.bench --device cuda --report DIR: all that a GPU is needed for, in one go.

Tests on the GPU; figures: models of known shapes with random weights, ours in all modes beside PyTorch eager,
torch.compile and transformers, taking turns; then small tests under compute-sanitizer. Needs no network. Leaves in DIR
tests.txt, gpu.json, gpu.md, gpu.png, memcheck.txt and racecheck.txt; what there is so far, if it is cut off.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from recycle_ext import _C
from recycle_ext.bench.contenders import OURS
from recycle_ext.bench.plain_torch import StaticDecoder
from recycle_ext.bench.plot import plot
from recycle_ext.bench.random_model import SHAPES, ShapeOf, random_model
from recycle_ext.decoding.cuda_graph import GraphedStep
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.measuring.bandwidth import read_bandwidth
from recycle_ext.measuring.interleave import rounds
from recycle_ext.ops.registration import check_device
from recycle_ext.weights.pack import PackedModel

CONTEXT = 128  # tokens in the cache before a step is timed
STEPS = 64  # that a measurement takes
ROUNDS = 7
PROMPT = 512
# Small tests that capture no graph: every tensor is then in memory of its own, and the sanitizer sees its ends.
SANITIZED = "attention_is_as_exact or head_takes or head_draws or without_a_graph"
TESTS = ("test_gpu.py", "test_cuda_ops.py")


Begin = Callable[[], None]


@dataclass
class Contender:
    """One line of the table: how its step is started, and what a step is."""

    shape: str
    system: str
    mode: str
    width: str
    start: Callable[
        [Begin], None
    ]  # gets ready, calls what it is given, starts STEPS steps and returns
    tokens_a_step: float | None  # None: depends on how good the module is
    step_bytes: int
    standard_step_bytes: int
    seconds: list[float]  # of a step, one a round
    prefill_tokens_per_second: float | None = None


def run(device_name: str, directory: str) -> int:
    """Writes the report; returns the exit status: 1 if a test failed or something could not be measured."""
    device = check_device(device_name)
    if device.type != "cuda":
        raise RecycleError(f"--report needs a GPU: --device is {device_name}")
    out = Path(directory)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecycleError(f"--report {directory}: {error.strerror}") from None
    torch.cuda.set_device(device)
    report = {
        "machine": machine(device),
        "checks": {"tests": run_tests(out)},
        "settings": {"context": CONTEXT, "steps": STEPS, "rounds": ROUNDS, "prompt": PROMPT},
        "results": [],
    }
    for shape in SHAPES:
        report["results"] += measure(shape, device)
        write(report, out)
    report["checks"]["compute-sanitizer"] = run_sanitizer(out)
    write(report, out)
    print(Path(out, "gpu.md").read_text("utf-8"))
    return int(any("failed" in status for status in report["checks"].values()))


def write(report: dict, out: Path) -> None:
    """gpu.json, gpu.md and gpu.png, anew."""
    results = report["results"]
    Path(out, "gpu.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    Path(out, "gpu.md").write_text(f"{heading(report)}\n\n{table(results)}\n", "utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        plot({"results": bars(results)}, heading(report), str(out / "gpu.png"))


# ---- checks ---------------------------------------------------------------------------------------------


def run_tests(out: Path) -> str:
    """The tests that need a GPU, with pytest; "passed", "failed" or why they were not run."""
    folder = Path("python_tests")
    if not folder.is_dir():
        return "not run: no python_tests here, it is not a clone"
    command = [sys.executable, "-m", "pytest", "-q", *(str(folder / name) for name in TESTS)]
    return _logged(command, out / "tests.txt")


def run_sanitizer(out: Path) -> str:
    """Memory and race checks of the small tests; as run_tests()."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return "not run: compute-sanitizer was not found"
    if not Path("python_tests").is_dir():
        return "not run: no python_tests here, it is not a clone"
    tests = [sys.executable, "-m", "pytest", "-q", "-k", SANITIZED, "python_tests/test_gpu.py"]
    # Our kernels alone; torch asks CUDA for things that may be refused, and means it.
    flags = ["--kernel-regex", "kns=recycle", "--report-api-errors", "no", "--error-exitcode", "9"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    statuses = {
        kind: _logged([tool, "--tool", kind, *flags, *tests], out / f"{kind}.txt", 150, environment)
        for kind in ("memcheck", "racecheck")
    }
    return ", ".join(f"{kind} {status}" for kind, status in statuses.items())


def _logged(
    command: list[str], log: Path, seconds: int = 240, environment: dict | None = None
) -> str:
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return f"failed: more than {seconds} s"
    return "passed" if done.returncode == 0 else "failed"


# ---- figures --------------------------------------------------------------------------------------------


def measure(shape: ShapeOf, device: torch.device) -> list[dict]:
    """The contenders of a shape, taking turns."""
    contenders = ours(shape, device)
    contenders += peers(shape, contenders[0].standard_step_bytes, device)
    for order in rounds(contenders, ROUNDS):
        for contender in order:
            contender.seconds.append(seconds_a_step(contender))
    bandwidth = read_bandwidth(device, 1 << 30)
    return [figures(contender, bandwidth) for contender in contenders]


def ours(shape: ShapeOf, device: torch.device) -> list[Contender]:
    """All modes in bf16 with each module; the other widths with the first one."""
    found = []
    for width in ("bf16", "q8", "q4"):
        for index, (name, config) in enumerate(shape.modules.items()):
            if width != "bf16" and index > 0:
                continue
            packed = random_model(shape.base, config, width, device)
            for mode in ("standard", "verify", "alternate"):
                if mode == "standard" and index > 0:
                    continue
                label = mode if mode == "standard" or len(shape.modules) == 1 else f"{mode}, {name}"
                found.append(_ours(shape.name, packed, mode, label, width))
    return found


def _ours(shape: str, packed: PackedModel, mode: str, label: str, width: str) -> Contender:
    capacity = max(CONTEXT + 2 * STEPS, PROMPT) + 16
    decoder = Decoder(packed, mode, capacity=capacity)
    prompt = [i % 1000 for i in range(PROMPT)]
    decoder.prefill(prompt)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decoder.prefill(prompt)  # waits for its token
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
        raise RecycleError(f"{shape} {label} {width}: {grown} tokens in {STEPS} steps")
    return Contender(
        shape,
        OURS,
        label,
        width,
        start,
        {"standard": 1.0, "verify": None, "alternate": 2.0}[mode],
        packed.step_bytes(decoder.num_draft_tokens),
        packed.step_bytes(0),
        [],
        PROMPT / prefill_seconds,
    )


def peers(shape: ShapeOf, step_bytes: int, device: torch.device) -> list[Contender]:
    """PyTorch eager, torch.compile and transformers, in bf16. step_bytes: what a step of the model reads."""
    found = []

    def add(system: str, make: Callable[[], Callable[[Begin], None]]) -> None:
        try:
            start = make()
            for _ in range(2):  # torch.compile records its graph in the second one
                start(lambda: None)
            torch.cuda.synchronize()
        except Exception as error:
            # Someone else's code: a line less in the table, with the reason, and the others go on.
            print(f"{shape.name}: {system} is left out: {error}", file=sys.stderr)
            return
        found.append(
            Contender(
                shape.name, system, "standard", "bf16", start, 1.0, step_bytes, step_bytes, []
            )
        )

    add("PyTorch eager", lambda: _plain(shape, device))
    add("torch.compile", lambda: _compiled(shape, device))
    if importlib.util.find_spec("transformers") is None:
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
        raise RuntimeError("it made no CUDA graph, and would be slower than it can be")
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


def seconds_a_step(contender: Contender) -> float:
    """By the GPU's clock, from before the first of STEPS steps to after the last."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    contender.start(first.record)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / STEPS


def figures(contender: Contender, bandwidth: float) -> dict:
    """A line of the report, with the names that the CPU's report has."""
    seconds = median(contender.seconds)
    rate = contender.step_bytes / seconds
    tokens = contender.tokens_a_step
    return {
        "shape": contender.shape,
        "system": contender.system,
        "mode": contender.mode,
        "width": contender.width,
        "batch": 1,
        "threads": None,
        "step_microseconds": seconds * 1e6,
        "tokens_per_second": None if tokens is None else tokens / seconds,
        "gigabytes_per_second": rate / 1e9,
        "read_bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "roofline_fraction": rate / bandwidth,
        "speedup_limit": 2 * contender.standard_step_bytes / contender.step_bytes
        if tokens == 2
        else None,
        "prefill_tokens_per_second": contender.prefill_tokens_per_second,
        "repeats": [s * 1e6 for s in contender.seconds],
    }


# ---- what is written ------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict:
    """What the figures depend on besides the model."""
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split("\n")[0]
    except FileNotFoundError:
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.strip(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "recycle_ext": _C.build_info()["version"],
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def heading(report: dict) -> str:
    """One line above the table."""
    m = report["machine"]
    checks = "; ".join(f"{name} {status}" for name, status in report["checks"].items())
    return (
        f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, CUDA {m['cuda']}; {m['date']}; {CONTEXT} tokens "
        f"in the cache, batch 1, medians of {ROUNDS}; bandwidth is what copies reach, read and written together; {checks}"
    )


def table(results: list[dict]) -> str:
    """Markdown. The speed-up of alternate is over our own standard of the same width."""
    standard = {
        (r["shape"], r["width"]): r["step_microseconds"]
        for r in results
        if r["system"] == OURS and r["mode"] == "standard"
    }
    lines = [
        "| model | system | mode | width | us a step | tokens/s | GB/s | of bandwidth | speed-up | of limit | prompt tokens/s |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        speedup = limit = ""
        if r["speedup_limit"] is not None:
            ratio = 2 * standard[r["shape"], r["width"]] / r["step_microseconds"]
            speedup, limit = f"{ratio:.2f}x", f"{ratio / r['speedup_limit']:.0%}"
        rate = "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}"
        prefill = r["prefill_tokens_per_second"]
        cells = [
            r["shape"],
            r["system"],
            r["mode"],
            r["width"],
            f"{r['step_microseconds']:.0f}",
            rate,
            f"{r['gigabytes_per_second']:.0f}",
            f"{r['roofline_fraction']:.0%}",
            speedup,
            limit,
            "" if prefill is None else f"{prefill:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(results: list[dict]) -> list[dict]:
    """What plot() draws: tokens a second in bf16, a group a model; verify depends on the module, and is left out."""
    return [
        r | {"width": r["shape"], "mode": r["mode"].split(",")[0]}
        for r in results
        if r["width"] == "bf16" and r["tokens_per_second"] is not None and "6 full" not in r["mode"]
    ]
