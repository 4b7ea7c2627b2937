"""The layout of the source tree: who may import whom, and how long a file may be (see structure.py)."""

from __future__ import annotations

import graphlib
from collections.abc import Callable
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).parent.parent
CHECKS = [
    structure.forbidden_imports,
    structure.circles,
    structure.forbidden_includes,
    structure.long_files,
    structure.long_functions,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_tree_has_no_violation(check: Callable[[Path], list[str]]):
    violations = check(ROOT)
    assert not violations, "\n" + "\n".join(violations)


def test_every_folder_has_its_row():
    assert structure.rooms(ROOT) <= set(structure.ALLOWED_IMPORTS)
    for row in structure.ALLOWED_IMPORTS.values():
        assert {name.split(".")[0] for name in row} <= set(structure.ALLOWED_IMPORTS)


def test_table_has_no_circle():
    rows = structure.ALLOWED_IMPORTS.items()
    folders = {folder: {name.split(".")[0] for name in row} for folder, row in rows}
    graphlib.TopologicalSorter(folders).prepare()  # raises CycleError


def test_checks_see_the_whole_tree():
    """A check of an empty list of files would pass whatever the tree holds."""
    assert len(structure.imports(ROOT)) > 200
    assert len(structure.cpp_files(ROOT)) > 50
    assert {entry.module for entry in structure.imports(ROOT)} >= {
        "recycle_ext",
        "recycle_ext.generate.__main__",
        "recycle_ext.weights.plan",
    }


def write(root: Path, files: dict[str, str]) -> Path:
    """A source tree with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HARMLESS = {
    "recycle_ext/__init__.py": "from recycle_ext.generate import generate\n",
    "recycle_ext/errors.py": "import os\n",
    "recycle_ext/generate/__init__.py": "from recycle_ext.decoding.decoder import Decoder\n"
    "def __getattr__(name):\n    from recycle_ext.generate.__main__ import main\n",
    "recycle_ext/generate/__main__.py": "from recycle_ext.generate import generate\n",
    "recycle_ext/decoding/__init__.py": "",
    "recycle_ext/decoding/decoder.py": "from recycle_ext import _C\nfrom recycle_ext.errors import E\n",
    "recycle_ext/bench/plain_torch.py": "from recycle_ext.reference import model\n",
    "recycle_ext/reference/model.py": "from recycle_ext.ops.functional import rms_norm\n",
    "recycle_ext/ops/__init__.py": "",
    "recycle_ext/ops/functional.py": "import torch\n",
    "recycle_ext/ops/registration.py": "import torch\n",
    "csrc/include/recycle/format.h": "#include <cstdint>\n",
    "csrc/cpu/kernels.h": '#include "recycle/format.h"\n',
    "csrc/cpu/kernels/table.h": '#include "../kernels.h"\n',
    "csrc/cuda/step.cu": '#include <cuda_runtime.h>\n#include "recycle/format.h"\n',
    "csrc/bindings/ops.cpp": '#include <torch/library.h>\n#include "../cpu/kernels.h"\n',
    "csrc/bindings/info.h.in": "",
    "csrc/bindings/info.cpp": '#include "info.h"\n',
    "python_tests/test_x.py": "def f():\n    pass\n",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_harmless_tree_passes(tmp_path, check):
    assert check(write(tmp_path, HARMLESS)) == []


PLANTED = [
    (
        structure.forbidden_imports,
        {"recycle_ext/decoding/a.py": "\nfrom recycle_ext.generate import model\n"},
        "recycle_ext/decoding/a.py:2: imports recycle_ext.generate; decoding may import ",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/decoding/a.py": "from ..reference.model import BaseModel\n"},
        "recycle_ext/decoding/a.py:1: imports recycle_ext.reference.model; decoding may import ",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/decoding/a.py": "def f():\n    import recycle_ext\n"},
        "recycle_ext/decoding/a.py:2: imports recycle_ext; decoding may import ",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/reference/a.py": "from recycle_ext.ops import registration\n"},
        "recycle_ext/reference/a.py:1: imports recycle_ext.ops.registration; reference may import ",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/bench/b.py": "from recycle_ext.reference.model import BaseModel\n"},
        "recycle_ext/bench/b.py:1: imports recycle_ext.reference.model; bench may import ",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/ops/functional.py": "from recycle_ext.ops import registration\n"},
        "recycle_ext/ops/functional.py:1: imports recycle_ext.ops.registration; ops may import nothing of recycle_ext",
    ),
    (
        structure.forbidden_imports,
        {
            "recycle_ext/text/a.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from recycle_ext import _C\n"
        },
        "recycle_ext/text/a.py:3: imports recycle_ext._C; text may import errors",
    ),
    (
        structure.forbidden_imports,
        {"recycle_ext/attic/a.py": "from recycle_ext import errors\n"},
        "recycle_ext/attic/a.py:1: attic has no row in ALLOWED_IMPORTS",
    ),
    (
        structure.circles,
        {
            "recycle_ext/text/a.py": "from recycle_ext.text.b import x\n",
            "recycle_ext/text/b.py": "def f():\n    from recycle_ext.text import a\n",
        },
        "recycle_ext/text/b.py:2: closes a circle of imports: "
        "recycle_ext.text.a -> recycle_ext.text.b -> recycle_ext.text.a",
    ),
    (
        structure.forbidden_includes,
        {"csrc/cpu/a.cpp": "// a\n#include <torch/csrc/stable/tensor.h>\n"},
        "csrc/cpu/a.cpp:2: includes torch/csrc/stable/tensor.h; only csrc/bindings may",
    ),
    (
        structure.forbidden_includes,
        {"csrc/cuda/a.cuh": '#include "kernels.h"\n'},
        "csrc/cuda/a.cuh:1: includes csrc/cpu/kernels.h; csrc/cuda may include ",
    ),
    (
        structure.forbidden_includes,
        {"csrc/common/plan.cpp": '#include "../bindings/ops.h"\n', "csrc/bindings/ops.h": ""},
        "csrc/common/plan.cpp:1: includes csrc/bindings/ops.h; csrc/common may include ",
    ),
    (
        structure.forbidden_includes,
        {"csrc/cpu/a.cpp": "#include <cuda_fp16.h>\n"},
        "csrc/cpu/a.cpp:1: includes cuda_fp16.h; only csrc/cuda may",
    ),
    (
        structure.forbidden_includes,
        {"csrc/cpu/a.cpp": '#include "gone.h"\n'},
        "csrc/cpu/a.cpp:1: includes gone.h; no folder of csrc/ has that file",
    ),
    (
        structure.forbidden_includes,
        {"csrc/attic/a.cpp": "\n"},
        "csrc/attic/a.cpp:1: the file's folder has no row in ALLOWED_INCLUDES",
    ),
    (structure.long_files, {"csrc/cpu/a.cpp": "//\n" * 451}, "csrc/cpu/a.cpp:451: a file has at most 450 lines"),
    (
        structure.long_files,
        {"python_tests/test_x.py": "#\n" * 451},
        "python_tests/test_x.py:451: a file has at most 450 lines",
    ),
    (
        structure.long_functions,
        {"recycle_ext/errors.py": "\n\ndef f():\n" + "    pass\n" * 80},
        "recycle_ext/errors.py:3: f has 81 lines; a function has at most 80",
    ),
]


@pytest.mark.parametrize(("check", "files", "message"), PLANTED)
def test_planted_violation_is_found(tmp_path, check, files, message):
    violations = check(write(tmp_path, HARMLESS | files))
    assert len(violations) == 1
    assert violations[0].startswith(message)
