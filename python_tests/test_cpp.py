"""The C++ code without torch, tested in C++ under sanitizers: python_tests/cpp.

AddressSanitizer and UndefinedBehaviorSanitizer see every test; ThreadSanitizer the thread pool and whole decode steps.
On a processor that lacks AVX-VNNI or AVX-512 a third program runs the AVX-VNNI and AVX-512 kernels, their instructions emulated by loops.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recycle_ext import _C

ROOT = Path(__file__).resolve().parent.parent
CSRC, TESTS = ROOT / "csrc", ROOT / "python_tests" / "cpp"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++20 -g1 -ffp-contract=off -fno-sanitize-recover=all"
# -O0: optimizing the kernels under AddressSanitizer takes minutes.
SANITIZERS = {"address": "-O0 -fsanitize=address,undefined", "thread": "-O1 -Wno-tsan -fsanitize=thread"}
# Before csrc/include: an arena with bytes behind each array that nothing may touch.
REDZONES = TESTS.parent / "cuda_emulation" / "redzones"
# The emulated AVX-VNNI and AVX-512 kernels and the others, told that the processor has all.
EMULATED = f"-O1 -Wno-psabi -Wno-ignored-attributes -isystem {TESTS / 'emulated_avx'} -D__builtin_cpu_supports(x)=1"
TESTS_OF = {
    "address": sorted(TESTS.glob("*.cpp")),
    "thread": [TESTS / "main.cpp", TESTS / "test_steps.cpp", TESTS / "test_threads.cpp"],
    "emulated": [TESTS / "main.cpp", TESTS / "test_kernels.cpp", TESTS / "test_steps.cpp"],
}
_AVX2 = "-mavx2 -mfma -mf16c"
ISA_FLAGS = {
    "generic": "",
    "avx2": _AVX2,
    "avxvnni": f"{_AVX2} -mavxvnni",
    "avx512": f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni",
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def sources(program: str) -> dict[Path, str]:
    """Each source file of the program, the kernels (which take longest) first, and its own flags."""
    flags = ISA_FLAGS | {"avxvnni": _AVX2, "avx512": _AVX2} if program == "emulated" else ISA_FLAGS
    isas = ISA_FLAGS if program == "emulated" else _C.runnable_isas()
    kernels = {CSRC / "cpu" / "kernels" / f"kernels_{isa}.cpp": flags[isa] for isa in isas}
    have = " ".join(f"-DRECYCLE_HAVE_{isa.upper()}" for isa in isas if isa != "generic")
    others = [CSRC / "common" / "plan.cpp", *sorted((CSRC / "cpu").glob("*.cpp")), *TESTS_OF[program]]
    return kernels | dict.fromkeys(others, have)


def state_of_sources() -> str:
    """A name for what the programs depend on."""
    digest = hashlib.sha256(f"{COMPILER} {FLAGS} {SANITIZERS} {EMULATED} {_C.runnable_isas()}".encode())
    for file in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp"), *TESTS.rglob("*.[ch]*"), *REDZONES.rglob("*.h")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the programs of the present sources are kept."""
    folder = ROOT / "build" / "cpp_tests" / state_of_sources()
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def run_compiler(*arguments: object) -> None:
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(name: str, folder: Path) -> Path:
    """The program of one sanitizer, or with emulated instructions, unless it is there already."""
    program, flags = folder / name, {**SANITIZERS, "emulated": EMULATED}[name].split()
    if program.exists():
        return program

    def compiled(item: tuple[Path, str]) -> Path:
        source, own = item
        out = folder / f"{name}.{source.stem}.o"
        headers = [f"-I{REDZONES}"] * (name == "address") + [f"-I{CSRC / 'include'}"]
        run_compiler(*FLAGS.split(), *flags, *own.split(), *headers, "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources(name).items()))
    run_compiler(*flags, *objects, "-lpthread", "-ldl", "-o", folder / "new")
    return (folder / "new").rename(program)


def names_of(files: list[Path]) -> list[str]:
    """The tests in these files, sorted."""
    return sorted(name for file in files for name in re.findall(r"^TEST\((\w+)\)", file.read_text(), re.MULTILINE))


def assert_passes(name: str, folder: Path) -> None:
    program = build(name, folder)
    # ThreadSanitizer may refuse the addresses that the system chooses at random.
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([*fixed, program], env=os.environ | options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-8000:]
    assert sorted(done.stdout.split()) == names_of(TESTS_OF[name])


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_cpp_tests_pass_under_the_sanitizer(sanitizer, folder):
    assert_passes(sanitizer, folder)


@pytest.mark.skipif("avx2" not in _C.runnable_isas(), reason="the emulation needs AVX2")
@pytest.mark.skipif(set(ISA_FLAGS) <= set(_C.runnable_isas()), reason="this processor has all: they are tested above")
def test_emulated_vector_kernels_pass(folder):
    assert_passes("emulated", folder)
