"""Compiles the CUDA kernels and prints their registers and spilled bytes; fails if a kernel spills.

usage: cuda_resources.py NVCC [ARCHITECTURE ...]     architectures: sm_80 sm_90a unless given
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-cubin", "--resource-usage"]


def compile_report(nvcc: str, source: Path, architecture: str) -> list[tuple[str, str, int, int]]:
    """(architecture, mangled name, registers, spilled bytes) of each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.cubin")
        includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
        command = [nvcc, *FLAGS, f"-arch={architecture}", *includes, str(source), "-o", str(out)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    entries = []
    for part in run.stderr.split("Compiling entry function '")[1:]:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        entries.append((architecture, part.split("'")[0], int(re.search(r"Used (\d+) reg", part)[1]), spilled))
    return entries


def main() -> int:
    """Returns the exit status."""
    nvcc, *architectures = sys.argv[1:]
    jobs = [
        (nvcc, source, architecture)
        for architecture in architectures or ("sm_80", "sm_90a")
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    ]
    with ThreadPoolExecutor() as pool:
        entries = [entry for report in pool.map(lambda job: compile_report(*job), jobs) for entry in report]
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for _, name, _, _ in entries), capture_output=True, text=True
    ).stdout.splitlines()
    print(f"{'':8} {'registers':>9} {'spilled':>8}  kernel")
    for (architecture, _, registers, spilled), name in zip(entries, names, strict=True):
        name = re.sub(r"recycle::cuda::|\(anonymous namespace\)::", "", name)
        name = name.removeprefix("void ").split("(")[0]
        print(f"{architecture:8} {registers:9} {spilled:8}  {name}")
    if spilling := sum(spilled > 0 for *_, spilled in entries):
        print(f"{spilling} kernels spill registers to memory", file=sys.stderr)
    return int(spilling > 0 or not entries)


if __name__ == "__main__":
    sys.exit(main())
