"""Races, bounds, uninitialised shared memory and shuffles of the CUDA kernels, without a GPU.

    python python_tests/cuda_emulation/race.py           # the smoke cases
    python python_tests/cuda_emulation/race.py --all     # all modes, formats, 1 to 8 rows, lengths around all chunks

Each case runs under three builds of the emulated kernels: ThreadSanitizer (ordering.h says what is ordered),
AddressSanitizer, and the emulation's own checks (checks.h). A report names the case and the place in the source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_emulation.builds import RACES, SANITIZED, Variant, link, objects
from cuda_emulation.cases import Case, all_cases, sampled_cases, smoke_cases

_OPTIONS = {
    "TSAN_OPTIONS": "exitcode=66 history_size=0 halt_on_error=1",
    "ASAN_OPTIONS": "exitcode=66 detect_leaks=0 detect_stack_use_after_return=0",
}


@dataclass(frozen=True)
class Outcome:
    """What a program said of its cases: the report is empty if all passed; results: tokens and counts, a line a case."""

    report: str
    results: list[str]


def replay(program: Path, cases: list[Case], seeds: range) -> Outcome:
    """Runs the cases, each in the orders of `seeds`, until the first fault."""
    command = [str(program)]
    # Where addresses are more random than an old ThreadSanitizer allows.
    if shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
        command = ["setarch", "-R", *command]
    data = b"".join(case.encoded(seed) for case in cases for seed in seeds)
    done = subprocess.run(command, input=data, capture_output=True, env=os.environ | _OPTIONS)
    said = done.stderr.decode(errors="replace")
    if done.returncode == 0:
        return Outcome("", done.stdout.decode().splitlines())
    case = re.findall(r"^CASE (.*)$", said, re.MULTILINE)[-1:]
    report = re.sub(r"^CASE .*\n", "", said, flags=re.MULTILINE)
    return Outcome("\n".join([*case, f"exit status {done.returncode}", report + _place(program, report)]), [])


def _place(program: Path, report: str) -> str:
    """The place in the source of the code that one of the emulation's own reports names."""
    found = re.search(r"code (0x[0-9a-f]+)", report)
    if found is None:
        return ""
    return subprocess.run(
        ["addr2line", "-fCi", "-e", str(program), found[1]], capture_output=True, text=True, check=True
    ).stdout


def programs(variants: tuple[Variant, ...], folder: Path) -> dict[str, Path]:
    """replay.cpp of each variant, linked in `folder`."""
    parts = objects(variants, "replay.cpp")
    return {variant.name: link(variant, parts[variant.name], folder / variant.name) for variant in variants}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all cases, not only the smoke cases")
    names = [variant.name for variant in SANITIZED]
    parser.add_argument("--tool", choices=names, help="one of the three builds (default: each in turn)")
    parser.add_argument("--orders", type=int, default=2, help="shuffled orders of blocks and threads (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the first order")
    given = parser.parse_args(arguments)
    cases = list(all_cases()) if given.all else smoke_cases() + sampled_cases()
    seeds = range(given.seed, given.seed + given.orders)
    faults = 0
    variants = tuple(variant for variant in SANITIZED if given.tool in (None, variant.name))
    with tempfile.TemporaryDirectory() as folder:
        for name, program in programs(variants, Path(folder)).items():
            begin = time.monotonic()
            # Small batches: a process begins with fresh fibers, and all processors have work to the end.
            size = 20 if name == RACES.name else 50
            batches = [cases[i : i + size] for i in range(0, len(cases), size)]
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                for i, outcome in enumerate(pool.map(lambda batch, p=program: replay(p, batch, seeds), batches)):
                    if outcome.report:
                        faults += 1
                        print(outcome.report, flush=True)
                    print(f"{name}: {i + 1} of {len(batches)} batches", end="\r", file=sys.stderr, flush=True)
            print(f"{name}: {len(cases)} cases in {len(seeds)} orders, {time.monotonic() - begin:.0f} s", flush=True)
    print("no fault" if not faults else f"{faults} batches with a fault")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
