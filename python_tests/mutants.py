"""Mutants: whether the tests notice a small fault in the code.

    python python_tests/mutants.py --count 200 --seed 0 --report mutants.json

A mutant is the source with one operator, index, constant or term changed. Mutants are drawn with a seed over csrc/cpu,
csrc/cuda and recycle_ext, in proportion to what can be changed there. Each is put into a copy of the sources, built,
and tried by the tests of its folder (TESTS, in their order), until a test fails; that test must pass without the mutant.
The report names each mutant and the test that failed; a mutant that no test noticed is printed as a diff. Drawn anew
are mutants that do not compile, or that compile to the code of the unchanged source.

Needed: an environment with the extra `dev`, torch, and `strip` (binutils).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc/cpu", "csrc/cuda", "recycle_ext")
SECONDS = 60  # for one quick test, five times what the slowest takes; a mutant that hangs is noticed
QUICK_SECONDS = 75  # for the quick tests that import the file, and for the others

# By the beginning of the mutant's path, the longest that fits: the tests that run, quick and near ones first.
KERNELS = "attention_decode recycle_head weights_layout loading sampling decode_step failed_sequences parallel lossless"
CONVERT = "convert convert_eagle convert_refused"
OPEN = "huggingface transformers_config gguf module_directory not_a_model damaged_files fingerprint end_tokens"
TEXT = "stream tokenizer gguf_vocabulary special_tokens end_tokens chat_template"
COMMANDS = "command_ends generate_input generate"
TRAIN = (
    "train_losses train_chain train_log train_options train_text rounding train train_trainer train_resume"
    " train_draft_vocab train_command train_workers"
)
BENCH = "bench_page bench_requantize bench_workers gpu_report bench_runners measuring bench_command"
EVAL = "eval_figures eval measuring"
TESTS = {
    "csrc/cpu": f"{KERNELS} op_arguments guard_pages default_threads measuring info instruction_sets cpp",
    "csrc/cuda": "cuda_emulated cuda_races gpu_report",
    "recycle_ext": f"arguments files former_names info torch_defaults op_arguments readme {TRAIN} {COMMANDS}",
    "recycle_ext/checkpoint": f"{OPEN} gguf_vocabulary special_tokens default_model hub {CONVERT} memory fuzz {COMMANDS}",
    "recycle_ext/text": f"{TEXT} huggingface gguf damaged_files fuzz {COMMANDS} smollm2",
    "recycle_ext/weights": f"weights_layout plan rounding decode_step op_arguments gguf huggingface {CONVERT} memory smollm2",
    "recycle_ext/ops": "opcheck op_arguments gpu_prefill reference decode_step torch_defaults",
    "recycle_ext/decoding": (
        "draft_policy step_records auto_drafts arguments decode_step failed_sequences op_arguments torch_defaults"
        " sampling gpu_prefill cuda_emulated lossless generate"
    ),
    "recycle_ext/generate": f"arguments step_records end_tokens chat_template stream torch_defaults readme {COMMANDS} smollm2",
    "recycle_ext/reference": "reference attention_decode recycle_head decode_step train_chain train eval_figures",
    "recycle_ext/measuring": f"measuring info {EVAL} {BENCH}",
    "recycle_ext/train": TRAIN,
    "recycle_ext/eval": EVAL,
    "recycle_ext/bench": f"{BENCH} cuda_emulated",
    "recycle_ext/convert": CONVERT,
    "recycle_ext/info": "info",
}
# Slow tests: they run at the end, with what quick tests had no time, for the mutants that nothing has noticed.
SLOW = [
    f"python_tests/test_{name}"
    for name in (
        "smollm2.py",
        "cpp.py",
        "memory.py",
        "fuzz.py",
        "bench_command.py",
        "cuda_emulated.py::test_gemv_of_odd_sizes_equals_cpu",
        "cuda_emulated.py::test_verify_greedy_equals_standard_bit_for_bit",
        "cuda_races.py::test_kernels_without_a_fault_pass",
        "lossless.py::test_verify_greedy_equals_standard",
        "sampling.py::test_sampled_verify_has_the_base_distribution",
        "sampling.py::test_sampled_verify_with_changing_num_draft_tokens_has_the_base_distribution",
    )
]
# These say nothing of a mutant: they plant faults of their own by the text of the source.
LEFT_OUT = ["python_tests/test_cuda_races.py::test_planted_fault_is_reported_by_its_tool"]
# What cannot be compiled or run without a GPU.
NOT_MUTATED = ["csrc/cuda/device_info.cu", "csrc/cuda/device_info.h"]
# What each test process has imported when it begins.
PRELOADED = [
    *("pytest", "torch", "torch._dynamo", "hypothesis", "gguf", "scipy.stats"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
]

# What is replaced by what. The formatters put spaces around binary operators, so templates and pointers never match.
REPLACEMENTS = [
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" // ", " * "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" and ", " or "),
    (r" or ", " and "),
    (r" \+= ", " -= "),
    (r"(?<=\[)(?!int\b|str\b|float\b)(\w+)(?=\])", r"\1 + 1"),  # an index one too far
    (r" [+-] \w+(?=[;,)\]])", ""),  # a term dropped
    (r"\b(\w+) - (\w+)\b", r"\2 - \1"),  # operands swapped
    (r"\bstd::min\b", "std::max"),
    (r"\bstd::max\b", "std::min"),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"(?<=[ (,\[])(\d+)(?=[;,) \]])", r"\1 + 1"),  # a constant
    (r"\bnot (?!in\b)", ""),
    (r"\bif \(!", "if ("),
]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: `old` at `offset` of the file becomes `new`."""

    path: str
    offset: int
    old: str
    new: str

    def text(self, source: str) -> str:
        return source[: self.offset] + self.new + source[self.offset + len(self.old) :]

    def describe(self) -> str:
        source = (ROOT / self.path).read_text()
        begin = source.rfind("\n", 0, self.offset) + 1
        end = source.find("\n", self.offset)
        changed = self.text(source)
        line = source.count("\n", 0, self.offset) + 1
        return f"{self.path}:{line}\n- {source[begin:end].strip()}\n+ {changed[begin : changed.find(chr(10), begin)].strip()}"


def blank(text: str) -> str:
    """As long as the text, with nothing in it that can be changed."""
    return re.sub(r"[^\n]", "\0", text)


def code_of(path: Path) -> str:
    """The source, with comments, strings, preprocessor lines and what is checked at compile time blanked."""
    source = path.read_text()
    if path.suffix != ".py":
        skipped = r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|static_assert\([^;]*;"
        return re.sub(skipped, lambda match: blank(match[0]), source, flags=re.M)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    code = source
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) or token.string in ("import", "from"):
            begin = starts[token.start[0] - 1] + token.start[1]
            end = starts[token.end[0] - 1] + token.end[1]
            code = code[:begin] + blank(code[begin:end]) + code[end:]
    return code


def mutants_of(path: Path) -> list[Mutant]:
    code = code_of(path)
    name = str(path.relative_to(ROOT))
    found = {}
    for pattern, replacement in REPLACEMENTS:
        for match in re.finditer(pattern, code):
            mutant = Mutant(name, match.start(), match[0], match.expand(replacement))
            found.setdefault((mutant.offset, mutant.old, mutant.new), mutant)
    return list(found.values())


def all_mutants() -> list[Mutant]:
    """Of the files that this machine can run."""
    from recycle_ext import _C  # not above: a test process imports this file, and recycle_ext from the changed copy

    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh"}
    others = {"avx2", "avx512"} - set(_C.runnable_isas())
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [
        ROOT / name
        for name in tracked.stdout.splitlines()
        if Path(name).suffix in suffixes
        and name not in NOT_MUTATED
        and not any(Path(name).stem.endswith(isa) for isa in others)
    ]
    return [mutant for path in paths for mutant in mutants_of(path)]


def tests_of(path: str) -> tuple[list[str], list[list[str]], list[str]]:
    """The tests of a file, as pytest's arguments: all; the quick ones, those that import the file apart; the slow ones."""
    prefix = max((prefix for prefix in TESTS if path.startswith(prefix)), key=len)
    tests = [f"python_tests/test_{name}.py" for name in TESTS[prefix].split()]
    assert all((ROOT / test).exists() for test in tests), tests
    package, _, name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".").rpartition(".")
    imports = re.compile(rf"\b{package}(\.{name}| import ([\w, ]+, )?{name})\b")
    near = [test for test in tests if path.endswith(".py") and imports.search((ROOT / test).read_text())] or tests[:3]
    left_out = [f"--deselect={test}" for test in LEFT_OUT]
    not_quick = [*left_out, *(f"--deselect={test}" for test in SLOW)]
    quick = [[*part, *not_quick] for part in (near, [test for test in tests if test not in near]) if part]
    return [*tests, *left_out], quick, [test for test in SLOW if test.partition("::")[0] in tests]


class Shuffled:
    """A plugin of pytest: the tests of each file in a shuffled order, so that those of one kind do not all run first."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest."""
        files = list(dict.fromkeys(item.path for item in items))
        random.Random(0).shuffle(items)
        items.sort(key=lambda item: files.index(item.path))


def run_pytest(source: Path, log: Path, arguments: list[str]) -> None:
    """In a process of its own: tests of a copy of the sources."""
    os.setpgid(0, 0)
    os.chdir(source)
    os.environ |= {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(source), *(entry for entry in sys.path if not Path(entry).is_relative_to(ROOT))]
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.exit(int(pytest.main(arguments, [Shuffled()])))


class Copy:
    """A copy of the sources with what is built of them, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.source, self.log, self.unchanged = folder / "source", folder / "log", folder / "unchanged"
        self.good: set[str] = set()  # tests that are known to pass without a mutant
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.source)], check=True)
        # Half the time to compile, and another rounding nowhere.
        isa = self.source / "cmake" / "CpuIsa.cmake"
        isa.write_text(isa.read_text().replace("RECYCLE_EXACT_FLAGS -O3", "RECYCLE_EXACT_FLAGS -O1"))
        configure = ["cmake", "-S", self.source, "-B", self.source / "build" / "cpu", "-G", "Ninja"]
        pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DSKBUILD_PROJECT_VERSION=0",
            "-DSKBUILD_PROJECT_NAME=recycle_ext",
            "-DRECYCLE_CUDA=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRECYCLE_TORCH_DIR={Path(torch.__file__).parent}",
            f"-Dpybind11_DIR={pybind.stdout.strip()}",
        ]
        from recycle_ext import _C

        configure += [
            f"-DRECYCLE_COMPILER_HAS_{isa.upper()}=OFF" for isa in {"avx2", "avx512"} - set(_C.runnable_isas())
        ]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        assert self.compile("csrc/cpu") and self.compile("csrc/cuda"), "the unchanged sources do not compile"
        self.code = {folder: self.compiled(folder) for folder in ("csrc/cpu", "csrc/cuda")}
        shutil.copytree(self.source, self.unchanged)

    def compile(self, folder: str) -> bool:
        """Whether the extension, or the emulation of the CUDA kernels, builds; nothing is to build for Python."""
        if not folder.startswith("csrc/"):
            return True
        command = ["cmake", "--build", "build/cpu"]
        if folder == "csrc/cuda":
            program = "from cuda_emulation.builds import *; objects((VALUES,), 'entry.cpp')"
            command = [sys.executable, "-Bc", f"import sys; sys.path.insert(0, 'python_tests'); {program}"]
        done = subprocess.run(command, cwd=self.source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for library in (self.source / "build" / "cpu").glob("_C.*.so"):
            shutil.copy2(library, self.source / "recycle_ext")
        return done.returncode == 0

    def compiled(self, folder: str) -> list[bytes]:
        """The code that was built, without lines and columns of the source."""
        patterns = {"csrc/cpu": "recycle_ext/_C.*.so", "csrc/cuda": "build/emulation/values.*.o"}
        stripped = self.source.parent / "stripped"

        def code(file: Path) -> bytes:
            subprocess.run(["strip", "--strip-debug", file, "-o", stripped], check=True)
            return stripped.read_bytes()

        return [code(file) for file in sorted(self.source.glob(patterns[folder]))]

    def restore(self) -> None:
        """Sources and builds without a mutant, with the times that ninja knows."""
        for folder in ("recycle_ext", "csrc", "build"):
            shutil.rmtree(self.source / folder)
            shutil.copytree(self.unchanged / folder, self.source / folder)

    def pytest(self, tests: list[str], seconds: int, all_seconds: int | None = None) -> tuple[str | None, bool]:
        """The first of the tests that fails, None where all pass, and whether all have run.

        seconds: the limit of one test. all_seconds: that of all, after which no more are tried.
        """
        arguments = ["-qx", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={seconds}"]
        arguments += ["-o", "faulthandler_exit_on_timeout=true", "--durations=20", *tests]
        process = self.processes.Process(target=run_pytest, args=(self.source, self.log, arguments))
        process.start()
        process.join(all_seconds)
        is_done = process.exitcode is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what a test has started
        process.join()
        if not is_done or process.exitcode in (0, 5):  # 5: there is none of the tests
            return None, is_done
        said = self.log.read_text(errors="replace")
        if found := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M):
            return found[1], True
        if found := re.search(r'File "[^"]*/(python_tests/test_\w+\.py)", line \d+ in (test_\w+)', said):
            return f"{found[1]}::{found[2]}", True  # a crash, or too long
        return f"{tests[0]} (or another: exit status {process.exitcode})", True

    def try_mutant(self, mutant: Mutant, tests: list[str]) -> dict | None:
        """What became of the mutant by the tests; without tests, by its quick ones.

        None where it does not compile, or to the same code.
        """
        begin = time.perf_counter()
        folder = mutant.path.rpartition("/kernels")[0] or mutant.path.rpartition("/")[0]
        path = self.source / mutant.path
        path.write_text(mutant.text(path.read_text()))
        try:
            if not self.compile(folder) or (folder in self.code and self.compiled(folder) == self.code[folder]):
                return None
            every, quick, slow = tests_of(mutant.path)
            if tests:
                killer, is_done = self.pytest(tests, 10 * SECONDS)
            else:
                for part in quick:
                    killer, is_done = self.pytest(part, SECONDS, QUICK_SECONDS)
                    if killer or not is_done:
                        break
        finally:
            self.restore()
        if killer is not None and killer not in self.good:
            if self.pytest([killer.partition(" (")[0]], SECONDS)[0] is not None:
                print(f"{killer} fails without a mutant too: the next run tries again\n{mutant.describe()}", flush=True)
                return None
            self.good.add(killer)
        seconds = round(time.perf_counter() - begin, 1)
        # waits: the tests that are still to be tried.
        waits = [] if killer or tests else slow if is_done else every
        return {"killed_by": killer, "seconds": seconds, "waits": waits}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutants that compile to other code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="paths that begin so")
    parser.add_argument("--report", type=Path, help="a JSON file; mutants that it has are not tried again")
    options = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if mutant.path.startswith(options.only)]
    random.Random(options.seed).shuffle(mutants)
    results: dict[str, dict] = (
        json.loads(options.report.read_text()) if options.report and options.report.exists() else {}
    )
    print(f"{len(mutants)} mutants are possible; {len(results)} were tried before", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for is_slow in (False, True):
            for mutant in mutants:
                name = mutant.describe()
                if not is_slow and len(results) >= options.count:
                    break
                if is_slow != (name in results) or (is_slow and not results[name]["waits"]):
                    continue
                if (result := copy.try_mutant(mutant, results[name]["waits"] if is_slow else [])) is None:
                    continue
                results[name] = result
                print(f"{result['seconds']:6.0f} s  {result['killed_by'] or 'SURVIVED'}\n{name}", flush=True)
                if options.report:
                    options.report.write_text(json.dumps(results, indent=1))
    survivors = [name for name, result in results.items() if result["killed_by"] is None]
    print(
        f"{len(results) - len(survivors)} of {len(results)} mutants were noticed; not noticed:\n", *survivors, sep="\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
