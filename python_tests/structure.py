"""The rules that hold the layout of the source tree, as checks of a folder.

Each check takes the root of a checkout and returns one line for each violation: the file, the line and the rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "recycle_ext"

# Which folder (or single file) of recycle_ext may import which; within a folder, files import each other freely.
# "recycle_ext" stands for the package's own __init__.py, "_C" for the compiled part, "checkpoint.config" for that one
# file of a folder.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "arguments": {"errors"},
    "_C": set(),
    "files": {"errors"},
    "former_names": set(),
    "modules": set(),
    "command_line": {"errors", "arguments"},
    "text": {"errors"},
    "checkpoint": {"errors", "arguments", "files", "text", "_C"},
    "weights": {"errors", "arguments", "checkpoint", "_C"},
    "ops": {"errors", "weights", "_C"},
    "decoding": {"errors", "arguments", "checkpoint.config", "weights", "_C"},
    "reference": {"checkpoint.config", "ops.functional"},
    "measuring": {"errors", "files", "_C"},
    "generate": {
        *("errors", "arguments", "command_line", "checkpoint", "text", "weights", "ops", "decoding"),
        *("measuring", "_C"),
    },
    "info": {
        *("errors", "command_line", "checkpoint", "text", "weights", "ops", "decoding"),
        *("generate", "measuring", "_C"),
    },
    "convert": {"errors", "command_line", "files", "checkpoint"},
    "bench": {
        *("errors", "command_line", "files", "checkpoint", "text", "weights", "ops", "decoding"),
        *("generate", "measuring", "_C"),
    },
    "eval": {
        *("errors", "command_line", "files", "checkpoint", "text", "weights", "decoding", "generate"),
        *("measuring", "reference", "_C"),
    },
    "train": {
        *("errors", "command_line", "files", "checkpoint", "text", "weights", "ops", "decoding"),
        *("generate", "measuring", "reference", "eval", "_C"),
    },
    "recycle_ext": {"errors", "former_names", "ops", "decoding", "generate"},
}

# Files whose row differs from the row of their folder.
ALLOWED_IMPORTS_OF_FILES: dict[str, set[str]] = {
    f"{PACKAGE}/ops/functional.py": set(),
    f"{PACKAGE}/bench/plain_torch.py": ALLOWED_IMPORTS["bench"] | {"reference"},
}

# Which folder of the C++ code may include files of which; "recycle" is csrc/include/recycle.
ALLOWED_INCLUDES: dict[str, set[str]] = {
    "csrc/include/recycle": set(),
    "csrc/common": {"csrc/include/recycle"},
    "csrc/cpu": {"csrc/include/recycle"},
    "csrc/cuda": {"csrc/include/recycle", "python_tests/cuda_emulation"},
    "csrc/bindings": {"csrc/include/recycle", "csrc/common", "csrc/cpu", "csrc/cuda"},
    "python_tests/cpp": {"csrc/include/recycle", "csrc/cpu"},
    "python_tests/cuda_emulation": {"csrc/include/recycle", "csrc/common", "csrc/cuda"},
}

# Headers of other projects, and the only folders that may include them.
FOREIGN_HEADERS = {
    re.compile(r"(torch|ATen|c10|pybind11)/"): ("csrc/bindings",),
    re.compile(r"(cuda|cub|mma|cooperative_groups)(_|\.h|/)"): ("csrc/cuda",),
}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
_CPP = (".h", ".cuh", ".cpp", ".cu", ".in")


class Import(NamedTuple):
    """One import of a module of the package."""

    file: Path
    line: int
    module: str  # the importing one, dotted
    target: str  # the imported one, dotted


def python_files(root: Path, folder: str = PACKAGE) -> list[Path]:
    """Python files below ``folder``, sorted."""
    return sorted((root / folder).rglob("*.py"))


def cpp_files(root: Path) -> list[Path]:
    """C++ and CUDA files below csrc/ and python_tests/, sorted."""
    files = [*(root / "csrc").rglob("*"), *(root / "python_tests").rglob("*")]
    return sorted(file for file in files if file.suffix in _CPP)


def room(module: str) -> str:
    """The folder (or single file) of a module: "recycle_ext.weights.plan" is in "weights"."""
    _, _, inner = module.partition(".")
    return inner.split(".")[0] if inner else PACKAGE


def imports(root: Path) -> list[Import]:
    """Every import of the package's modules in the package, wherever in the file it stands."""
    files = {_module_of(root, file): file for file in python_files(root)}
    known = {PACKAGE, f"{PACKAGE}._C", *files}
    found = []
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for name in _imported_names(node, module, is_package=file.name == "__init__.py"):
                if name.split(".")[0] == PACKAGE:
                    target = name
                    while target not in known:  # from module import function
                        target = target.rpartition(".")[0]
                    found.append(Import(file, node.lineno, module, target))
    return found


def _module_of(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_names(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            package = module.split(".")
            package = package[: len(package) - node.level + is_package]
            source = ".".join([*package, *filter(None, [source])])
        yield from (f"{source}.{alias.name}" for alias in node.names)


def forbidden_imports(root: Path) -> list[str]:
    """Imports that have no arrow in the table, and folders that have no row."""
    wrong = []
    for entry in imports(root):
        here, there = room(entry.module), room(entry.target)
        name = entry.file.relative_to(root).as_posix()
        allowed = ALLOWED_IMPORTS_OF_FILES.get(name, ALLOWED_IMPORTS.get(here))
        where = f"{name}:{entry.line}"
        if allowed is None:
            wrong.append(f"{where}: {here} has no row in ALLOWED_IMPORTS")
        elif not {there, entry.target.removeprefix(f"{PACKAGE}.")} & allowed and (
            there != here or (name in ALLOWED_IMPORTS_OF_FILES and not allowed)
        ):
            may = ", ".join(sorted(allowed)) or "nothing of recycle_ext"
            wrong.append(f"{where}: imports {entry.target}; {here} may import {may}")
    return _without_repeats(wrong)


def rooms(root: Path) -> set[str]:
    """The folders and single files of the package, which the table must name."""
    return {room(_module_of(root, file)) for file in python_files(root)}


def circles(root: Path) -> list[str]:
    """Circles of imports between files; imports in functions and for type checkers count.

    Imports in a module's ``__getattr__`` do not count: they exist to be late.
    """
    late = _late_lines(root)
    arrows: dict[str, list[Import]] = {}
    for entry in imports(root):
        if entry.target != entry.module and entry.line not in late.get(entry.file, ()):
            arrows.setdefault(entry.module, []).append(entry)
    wrong, done = [], set()

    def visit(module: str, path: list[Import]) -> None:
        on_path = [entry.module for entry in path]
        if module in on_path:
            circle = path[on_path.index(module) :]
            names = " -> ".join([*(entry.module for entry in circle), module])
            last = circle[-1]
            where = f"{last.file.relative_to(root).as_posix()}:{last.line}"
            wrong.append(f"{where}: closes a circle of imports: {names}")
        elif module not in done:
            for entry in arrows.get(module, ()):
                visit(entry.target, [*path, entry])
            done.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return _without_repeats(wrong)


def _without_repeats(lines: list[str]) -> list[str]:
    """One import statement of several names is one violation."""
    return list(dict.fromkeys(lines))


def _late_lines(root: Path) -> dict[Path, set[int]]:
    """Lines of each file that are in a module's ``__getattr__``."""
    late = {}
    for file in python_files(root):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                late[file] = set(range(node.lineno, node.end_lineno + 1))
    return late


def forbidden_includes(root: Path) -> list[str]:
    """Includes that have no arrow in the table, foreign headers out of place, and headers that do not exist."""
    wrong = []
    for file in cpp_files(root):
        name = file.relative_to(root).as_posix()
        here = _cpp_folder(name)
        if here is None:
            wrong.append(f"{name}:1: the file's folder has no row in ALLOWED_INCLUDES")
            continue
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
            if match is None:
                continue
            bracket, header = match.groups()
            where = f"{name}:{number}"
            for pattern, folders in FOREIGN_HEADERS.items():
                if pattern.match(header) and here not in folders:
                    wrong.append(f"{where}: includes {header}; only {', '.join(folders)} may")
            if bracket == "<":
                continue
            target = _resolved(root, file, header)
            if target is None:
                if not any(pattern.match(header) for pattern in FOREIGN_HEADERS):
                    wrong.append(f"{where}: includes {header}; no folder of csrc/ has that file")
                continue
            there = _cpp_folder(target)
            if there != here and there not in ALLOWED_INCLUDES[here]:
                may = ", ".join(sorted(ALLOWED_INCLUDES[here])) or "its own folder alone"
                wrong.append(f"{where}: includes {target}; {here} may include {may}")
    return wrong


def _cpp_folder(name: str) -> str | None:
    return next((folder for folder in ALLOWED_INCLUDES if name.startswith(f"{folder}/")), None)


def _resolved(root: Path, file: Path, header: str) -> str | None:
    """The path of a quoted header from the root on; a header that the build makes stands for its template."""
    folders = (file.parent, root / "csrc/include", *(root / name for name in ALLOWED_INCLUDES))
    for folder in folders:
        for suffix in ("", ".in"):
            path = (folder / f"{header}{suffix}").resolve()
            if path.is_file():
                return path.relative_to(root.resolve()).as_posix()
    return None


def long_files(root: Path) -> list[str]:
    """Files of code over MAX_FILE_LINES lines."""
    wrong = []
    for file in [*python_files(root), *python_files(root, "python_tests"), *cpp_files(root)]:
        lines = len(file.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            name = file.relative_to(root).as_posix()
            wrong.append(f"{name}:{lines}: a file has at most {MAX_FILE_LINES} lines")
    return wrong


def long_functions(root: Path) -> list[str]:
    """Python functions over MAX_FUNCTION_LINES lines, their docstrings included."""
    wrong = []
    for file in [*python_files(root), *python_files(root, "python_tests")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                where = f"{file.relative_to(root).as_posix()}:{node.lineno}"
                wrong.append(f"{where}: {node.name} has {lines} lines; a function has at most {MAX_FUNCTION_LINES}")
    return wrong
