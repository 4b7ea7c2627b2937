"""The build: which torch it finds, the flags that no CXXFLAGS override, and the standard library it asks for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILERS = [name for name in ("g++", "clang++", "clang++-16") if shutil.which(name)]
SITE = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")

# Asks the build backend, as an installer's process would: argument 1 is the folder of backend.py.
ASK = """
import sys, types
sys.path.insert(0, sys.argv[1])
library = sys.modules["scikit_build_core"] = types.ModuleType("scikit_build_core")
library.build = sys.modules["scikit_build_core.build"] = types.ModuleType("build")
for name in ("build_sdist get_requires_for_build_sdist prepare_metadata_for_build_editable "
             "prepare_metadata_for_build_wheel").split():
    setattr(library.build, name, None)
import backend
backend.site.getsitepackages = lambda: []  # the environment of the build, which has no torch
backend.site.getusersitepackages = lambda: "/nowhere"
print(backend._installed_torch())
"""
INSTALLER = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:3]], cwd=sys.argv[3], check=True)"
)


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with torch, to be installed into."""
    folder = tmp_path / "here" / "V"
    (folder / SITE / "torch").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    (folder / "pyvenv.cfg").touch()
    (folder / SITE / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\n")
    return folder


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"PATH": "{V}/bin"}, []),
        ({}, ["--python", "{V}/bin/python"]),
        ({}, ["--python={V}"]),
        ({}, ["-p", "here/V/bin/python"]),
        ({"UV_PYTHON": "{V}/bin/python"}, []),
        ({"UV_PROJECT_ENVIRONMENT": "{V}"}, []),
        ({"CONDA_PREFIX": "{V}"}, []),
    ],
)
def test_build_finds_the_torch_of_the_environment_it_installs_into(tmp_path, environment, variables, options):
    variables = {name: value.format(V=environment) for name, value in variables.items()}
    options = [each.format(V=environment) for each in options]
    assert asked(tmp_path, variables, options) == str(environment / SITE / "torch")


def test_build_finds_an_environment_in_the_folder_of_the_source(tmp_path, environment):
    assert asked(tmp_path, {}, [], source=environment.parent) == str(environment / SITE / "torch")
    assert asked(tmp_path, {}, []) == "None"


def asked(folder, variables, options, source="/"):
    """The torch that the backend finds, started by an installer that runs in ``folder`` with these options."""
    command = [os.path.realpath(sys.executable), "-c", INSTALLER, ASK, str(ROOT / "cmake"), str(source), *options]
    done = subprocess.run(
        command, cwd=folder, env={"PATH": "/bin"} | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


PROBE = """
float sum(const float* x) { float s = 0; for (int i = 0; i < 64; ++i) s += x[i]; return s; }
bool is_nan(float x) { return x != x; }
float multiply_add(float a, float b, float c) { return a * b + c; }
float divide(float a, float b, float c) { return a / c + b / c; }
float add_zero(float a) { return a + 0.0f; }
"""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_flags_of_the_environment_change_no_arithmetic(tmp_path, compiler):
    (tmp_path / "probe.cpp").write_text(PROBE)
    text = (ROOT / "cmake" / "CpuIsa.cmake").read_text()
    exact = re.search(r"set\(RECYCLE_EXACT_FLAGS ([^)]*)\)", text)[1].split()
    for condition, more in re.findall(r"if\((.*)\)\n  list\(APPEND RECYCLE_EXACT_FLAGS (\S+)\)", text):
        if platform.machine() in condition or ("GNU" in condition and compiler == "g++"):
            exact.append(more)

    def assembly(*flags):
        command = [compiler, *flags, "-S", "probe.cpp", "-o", "-"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        return [line for line in done.stdout.splitlines() if not line.strip().startswith(b".")]

    plain = assembly("-O3", "-ffp-contract=off")
    for flags in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only", "-march=native",
                  "-ffp-contract=fast", "-fassociative-math -fno-signed-zeros -fno-trapping-math"):  # fmt: skip
        assert assembly(*flags.split(), *exact) == plain, flags
    assert assembly("-Ofast") != plain


@pytest.mark.parametrize("compiler", COMPILERS)
def test_standard_library_without_atomic_wait_is_told(tmp_path, compiler):
    """The program that CMake tries, with this machine's library, and with one as GCC 10's."""
    text = (ROOT / "CMakeLists.txt").read_text()
    program = re.search(r'check_cxx_source_compiles\("(.*?)"\n', text, re.S)[1]
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "atomic_wait.h").write_text("#pragma once\n")
    compile = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    status = [
        subprocess.run([*compile, *more], input=program, capture_output=True, text=True, check=False).returncode
        for more in ([], [f"-I{tmp_path}"])
    ]
    assert status == [0, 1]
    assert "libstdc++ of GCC 11 or newer" in text
