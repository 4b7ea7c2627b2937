"""Mutants: whether the tests notice a small fault in the code.

    python python_tests/mutants.py --count 200 --seed 0 --report mutants.json

A mutant is the source with one operator, index, constant or term changed. Mutants are drawn with a seed over csrc/cpu,
csrc/cuda and recycle_ext, in proportion to what can be changed there. Each is put into a copy of the sources, built,
and tried by the tests of its folder (TESTS), the quickest first, until a test fails. The report names each mutant and
the test that failed; a mutant that no test noticed is printed as a diff. A mutant that does not compile is drawn anew.

Needed: an environment with the extra `dev`, and torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc/cpu", "csrc/cuda", "recycle_ext")
SECONDS = 900  # for the tests of one mutant; a mutant that hangs is noticed

# By the beginning of the mutant's path, the longest that fits: the tests that run.
KERNELS = (
    "attention_decode recycle_head weights_layout loading decode_step sampling lossless parallel instruction_sets cpp"
)
FILES = "huggingface gguf module_directory tokenizer default_model fingerprint generate"
TESTS = {
    "csrc/cpu": f"{KERNELS} op_arguments guard_pages measuring info",
    "csrc/cuda": "cuda_emulated cuda_races gpu_report",
    "recycle_ext": "command_line info readme op_arguments generate",
    "recycle_ext/checkpoint": f"{FILES} convert memory",
    "recycle_ext/text": f"{FILES} chat",
    "recycle_ext/weights": "weights_layout plan rounding memory decode_step convert",
    "recycle_ext/ops": "opcheck op_arguments gpu_prefill reference",
    "recycle_ext/decoding": "draft_policy decode_step lossless auto_drafts step_records sampling generate",
    "recycle_ext/generate": "generate smollm2 step_records",
    "recycle_ext/reference": "reference attention_decode recycle_head decode_step",
    "recycle_ext/measuring": "measuring info bench_command eval",
    "recycle_ext/train": "train train_*",
    "recycle_ext/eval": "eval eval_figures",
    "recycle_ext/bench": "bench_* gpu_report",
    "recycle_ext/convert": "convert convert_*",
    "recycle_ext/info": "info",
}

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
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh"}
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in tracked.stdout.splitlines() if Path(name).suffix in suffixes]
    return [mutant for path in paths for mutant in mutants_of(path)]


def tests_of(path: str) -> list[str]:
    prefix = max((prefix for prefix in TESTS if path.startswith(prefix)), key=len)
    return [
        str(test.relative_to(ROOT))
        for name in TESTS[prefix].split()
        for test in sorted((ROOT / "python_tests").glob(f"test_{name}.py"))
    ]


class Copy:
    """A copy of the sources with a build tree, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.source, self.build = folder / "source", folder / "build"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.source)], check=True)
        configure = ["cmake", "-S", self.source, "-B", self.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
        configure += [
            "-DSKBUILD_PROJECT_VERSION=0",
            "-DSKBUILD_PROJECT_NAME=recycle_ext",
            "-DRECYCLE_CUDA=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRECYCLE_TORCH_DIR={Path(torch.__file__).parent}",
            f"-Dpybind11_DIR={pybind.stdout.strip()}",
        ]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        assert self.compile()

    def compile(self) -> bool:
        """Whether the extension builds."""
        done = subprocess.run(["cmake", "--build", self.build], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode:
            return False
        for library in self.build.glob("_C.*.so"):
            shutil.copy(library, self.source / "recycle_ext")
        return True

    def compiles(self, mutant: Mutant) -> bool:
        if mutant.path.endswith(".py"):
            return True
        if mutant.path.startswith("csrc/cpu"):
            return self.compile()
        includes = [f"-I{self.source}/csrc/{folder}" for folder in ("include", "cuda")]
        emulation = ["-include", str(self.source / "python_tests/cuda_emulation/emulation.h")]
        units = (
            [self.source / mutant.path] if mutant.path.endswith(".cu") else sorted(self.source.glob("csrc/cuda/*.cu"))
        )
        command = ["c++", "-std=c++20", "-fsyntax-only", "-x", "c++", *emulation, *includes, *map(str, units)]
        return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode

    def failing_test(self, tests: list[str]) -> str | None:
        """The first test that fails, or "timeout"; None where all pass."""
        environment = os.environ | {"PYTHONPATH": str(self.source), "PYTHONDONTWRITEBYTECODE": "1"}
        for test in tests:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
            try:
                done = subprocess.run(
                    command, cwd=self.source, env=environment, capture_output=True, text=True, timeout=SECONDS
                )
            except subprocess.TimeoutExpired:
                return f"{test}: timeout"
            if done.returncode not in (0, 5):  # 5: all tests of the file were deselected
                found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
                return found[1] if found else f"{test}: exit status {done.returncode}"
        return None

    def try_mutant(self, mutant: Mutant) -> dict | None:
        """What became of the mutant; None where it does not compile."""
        path = self.source / mutant.path
        source = path.read_text()
        begin = time.perf_counter()
        path.write_text(mutant.text(source))
        try:
            if not self.compiles(mutant):
                return None
            killer = self.failing_test(tests_of(mutant.path))
        finally:
            path.write_text(source)
        seconds = round(time.perf_counter() - begin, 1)
        return {"mutant": mutant.describe(), "killed_by": killer, "seconds": seconds}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutants that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="paths that begin so")
    parser.add_argument("--report", type=Path, help="a JSON file; mutants that it has are not tried again")
    options = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if mutant.path.startswith(options.only)]
    random.Random(options.seed).shuffle(mutants)
    results = json.loads(options.report.read_text()) if options.report and options.report.exists() else []
    known = {result["mutant"] for result in results}
    print(f"{len(mutants)} mutants are possible; {len(results)} were tried before")
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for mutant in mutants:
            if len(results) >= options.count:
                break
            if mutant.describe() in known or (result := copy.try_mutant(mutant)) is None:
                continue
            results.append(result)
            print(f"{result['seconds']:6.0f} s  {result['killed_by'] or 'SURVIVED'}\n{result['mutant']}", flush=True)
            if options.report:
                options.report.write_text(json.dumps(results, indent=1))
    survivors = [result["mutant"] for result in results if result["killed_by"] is None]
    print(
        f"{len(results) - len(survivors)} of {len(results)} mutants were noticed; not noticed:\n", *survivors, sep="\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
