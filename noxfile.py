"""The matrix that README.md and docs/testing.md claim: Pythons, torches, compilers, processors.

    pip install nox
    nox                                          # every session; an interpreter that is not there is left out
    nox -s python-3.12 -- python_tests/test_lossless.py     # one session, some tests of it

A session builds and installs the package in an environment of its own, as the README says. On Linux, plain `torch` of
PyPI is a build with CUDA of several gigabytes, so the sessions of Pythons are also those of a CUDA torch without a GPU.
"""

from __future__ import annotations

import os
import shutil

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

# The ops, whole decode steps, files, the command: what an interpreter, a torch, a compiler or a processor can change.
TESTS = [
    f"python_tests/test_{name}.py"
    for name in (
        "attention_decode",
        "recycle_head",
        "decode_step",
        "sampling",
        "opcheck",
        "op_arguments",
        "lossless",
        "parallel",
        "plan",
        "gguf",
        "huggingface",
        "module_directory",
        "tokenizer",
        "generate",
        "info",
    )
]
# Under an emulated processor one test takes some twenty times as long.
TESTS_OF_KERNELS = [f"python_tests/test_{name}.py" for name in ("attention_decode", "recycle_head", "decode_step")]


def install(session: nox.Session, torch: str, env: dict[str, str] | None = None) -> None:
    """Builds against the torch of this name, from scratch."""
    session.install(torch)
    shutil.rmtree("build", ignore_errors=True)  # the build tree of another torch or compiler
    session.install(".[test]", env=env)


def pytest(session: nox.Session, tests: list[str]) -> None:
    """Runs these tests, or those that the command line names."""
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or tests))


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def python(session: nox.Session) -> None:
    """Each Python, with the newest torch."""
    install(session, "torch")
    pytest(session, TESTS)


@nox.session
@nox.parametrize("torch", ["2.10.0", "2.13.0"])
def torch(session: nox.Session, torch: str) -> None:
    """The oldest torch that pyproject.toml allows, and the one of .ci/run."""
    install(session, f"torch=={torch}")
    pytest(session, TESTS)


@nox.session
@nox.parametrize("compiler", ["g++", "clang++"])
def compiler(session: nox.Session, compiler: str) -> None:
    """The C++ compilers; CXX names another version, clang++-16 say."""
    chosen = os.environ.get("CXX", compiler) if compiler in os.environ.get("CXX", "") else compiler
    if shutil.which(chosen) is None:
        session.skip(f"{chosen} is not installed")
    install(session, "torch==2.13.0", {"CXX": chosen, "RECYCLE_CUDA": "OFF"})
    pytest(session, TESTS)


@nox.session
@nox.parametrize("processor", ["Nehalem", "Haswell"])
def processor(session: nox.Session, processor: str) -> None:
    """Processors without AVX2 (Nehalem) and without AVX-512 (Haswell), by QEMU's user mode (Debian: qemu-user)."""
    if shutil.which("qemu-x86_64") is None:
        session.skip("qemu-x86_64 is not installed")
    install(session, "torch==2.13.0", {"RECYCLE_CUDA": "OFF"})
    interpreter = f"{session.bin}/python"
    tests = session.posargs or TESTS_OF_KERNELS
    command = ["qemu-x86_64", "-cpu", processor, interpreter, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    session.run(*command, external=True)
