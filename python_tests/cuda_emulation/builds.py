"""Builds of the emulated kernels: as a library for values, and as the program replay.cpp under each sanitizer.

Objects are kept in build/emulation/ until their sources change, and compiled on all cores.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
INCLUDE = ROOT / "csrc" / "include"
HERE = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "emulation"
PLAN = ROOT / "csrc" / "common" / "plan.cpp"
KERNELS = sorted(set(CUDA.glob("*.cu")) - {CUDA / "device_info.cu"})
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
_COMMON = "-std=c++20 -g1 -fPIC -ffp-contract=off -Wno-unknown-pragmas -DRECYCLE_EMULATE_CUDA"
_UNSANITIZED = "-O2 -fno-omit-frame-pointer -fno-tree-loop-distribute-patterns"


@dataclass(frozen=True)
class Variant:
    """How the kernels are compiled and linked. emulator: flags of the emulator, which no sanitizer sees."""

    name: str
    kernels: str
    emulator: str = ""
    link: str = ""
    headers: Path | None = None  # a folder that is searched before csrc/include


VALUES = Variant("values", "-O1")
# Without the functions' entries and ends: a thread's identity may change in the midst of a function.
RACES = Variant(
    "races",
    "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0",
    "-DRECYCLE_EMULATE_RACES",
    "-fsanitize=thread",
)
# Alignment too: a GPU faults at a vector that does not begin at a multiple of its size.
BOUNDS = Variant(
    "bounds",
    "-O0 -fsanitize=address,alignment -fno-sanitize-recover=alignment",
    "",
    "-fsanitize=address,alignment",
    HERE / "redzones",
)
CHECKS = Variant(
    "checks",
    "-O0 -fno-omit-frame-pointer -fsanitize=kernel-address --param asan-stack=0 --param asan-globals=0 "
    "--param asan-instrumentation-with-call-threshold=0 --param asan-instrument-allocas=0",
    "-DRECYCLE_EMULATE_CHECKS",
)
SANITIZED = (RACES, BOUNDS, CHECKS)


def _digest(variant: Variant, source: Path) -> str:
    """A name for what an object depends on: compiler, flags, the source and all headers."""
    digest = hashlib.sha256(f"{COMPILER} {_COMMON} {_UNSANITIZED} {variant}".encode())
    headers = [path for folder in (CUDA, INCLUDE, HERE) for path in folder.rglob("*.*h") if path.is_file()]
    for path in (source, *sorted(headers)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _kept_object(variant: Variant, source: Path) -> Path:
    """The object of a source, compiled if there is none; objects of former states of the source are removed."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    stem = f"{variant.name}.{source.name}"
    out = OBJECTS / f"{stem}.{_digest(variant, source)}.o"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        compile_object(variant, source, part)
        for former in OBJECTS.glob(f"{stem}.*.o"):
            former.unlink(missing_ok=True)
        part.rename(out)
    return out


def _command(variant: Variant, source: Path, cuda: Path, out: Path) -> list[str]:
    flags = f"{_COMMON} {_UNSANITIZED if source.parent == HERE else variant.kernels} {variant.emulator}"
    headers = [path for path in (variant.headers, INCLUDE, cuda, HERE) if path is not None]
    return [
        COMPILER,
        *flags.split(),
        *(f"-I{path}" for path in headers),
        "-x",
        "c++",
        "-c",
        str(source),
        "-o",
        str(out),
    ]


def compile_object(variant: Variant, source: Path, out: Path, cuda: Path = CUDA) -> Path:
    """Compiles `source` to `out`. cuda: the folder of the kernels' headers."""
    subprocess.run(_command(variant, source, cuda, out), check=True)
    return out


def objects(variants: tuple[Variant, ...], entry: str) -> dict[str, dict[str, Path]]:
    """The objects of each variant by the name of their source; entry: replay.cpp or entry.cpp."""
    sources = [*KERNELS, PLAN, HERE / "emulator.cpp", HERE / "checks.cpp", HERE / entry]
    work = [(variant, source) for variant in variants for source in sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(lambda item: _kept_object(*item), work))
    found: dict[str, dict[str, Path]] = {variant.name: {} for variant in variants}
    for (variant, source), path in zip(work, done, strict=True):
        found[variant.name][source.name] = path
    return found


def link(variant: Variant, parts: dict[str, Path], out: Path, shared: bool = False) -> Path:
    """Links the objects `parts` to a program, or to a library."""
    kind = ["-shared"] if shared else ["-no-pie"]
    subprocess.run([COMPILER, *kind, *map(str, parts.values()), *variant.link.split(), "-o", str(out)], check=True)
    return out
