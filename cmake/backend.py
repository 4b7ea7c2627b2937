"""The build backend: scikit-build-core, and the question which torch to build against.

pip builds in an environment of its own. Asking for torch there would download a second one, of
several gigabytes with CUDA, although the environment that is installed into usually has one, and any
from 2.10 on serves (the Stable ABI). So this looks there first, and asks for torch only when there is
none. `-C cmake.define.RECYCLE_TORCH_DIR=.../torch` names another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import site
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  (hooks that need nothing of us)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

OLDEST = (2, 10)
TORCH_DIR = "cmake.define.RECYCLE_TORCH_DIR"


def _site_packages() -> list[Path]:
    """Where the environment that is installed into may keep its packages."""
    # pip hides these from sys.path, but runs this with the environment's own Python.
    folders = [Path(folder) for folder in site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(Path(site.getusersitepackages()))
    # uv and `python -m build` run this in a second virtual environment.
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for environment in _other_environments():
        # Not Path.is_file(), which raises for a text that is too long for a path.
        if os.path.isfile(environment / "pyvenv.cfg") or os.path.isdir(environment / "conda-meta"):
            folders.append(environment / "lib" / name / "site-packages")
    return folders


def _other_environments() -> list[Path]:
    """Folders that may be the environment of a `uv pip install --python P`, `uv sync` or the like."""
    # Activated: PATH has its programs.
    found = [Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep)]
    # Named by a variable, or by an option of the installer, which is this process's parent.
    where, options = Path.cwd(), []
    with contextlib.suppress(OSError):  # Linux alone tells
        parent = Path("/proc", str(os.getppid()))
        where, options = (parent / "cwd").resolve(), (parent / "cmdline").read_text("utf-8", "replace").split("\0")
    variables = ("UV_PROJECT_ENVIRONMENT", "UV_PYTHON", "CONDA_PREFIX")
    for name in [*(os.environ.get(variable, "") for variable in variables), *options[1:], *options[:1]]:
        path = where / name.rpartition("=")[2]
        found += [path, path.parent.parent]  # the environment, or its Python
    # In the installer's folder or the source's, as uv's .venv.
    return found + [file.parent for folder in (where, Path.cwd()) for file in sorted(folder.glob("*/pyvenv.cfg"))]


def _version(torch: Path) -> tuple[int, ...]:
    """(2, 13) for 2.13.0+cpu; (0,) where there is no torch."""
    try:
        text = (torch / "version.py").read_text("utf-8")
    except OSError:
        return (0,)
    found = re.search(r"""__version__ = ['"](\d+)\.(\d+)""", text)
    return tuple(map(int, found.groups())) if found else (0,)


def _installed_torch() -> Path | None:
    """The torch of the environment, if it is new enough."""
    for folder in _site_packages():
        if _version(folder / "torch") >= OLDEST:
            return folder / "torch"
    return None


def _requires(config_settings: dict | None) -> list[str]:
    if TORCH_DIR in (config_settings or {}) or _installed_torch():
        return []
    return ["torch>=" + ".".join(map(str, OLDEST))]


def _with_torch(config_settings: dict | None) -> dict:
    torch = _installed_torch()
    if torch is None and (spec := importlib.util.find_spec("torch")):
        torch = Path(spec.submodule_search_locations[0])
    return {TORCH_DIR: str(torch or ""), **(config_settings or {})}


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _backend.get_requires_for_build_wheel(config_settings) + _requires(config_settings)


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _backend.get_requires_for_build_editable(config_settings) + _requires(config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    settings = _with_torch(config_settings)
    return _backend.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    settings = _with_torch(config_settings)
    return _backend.build_editable(wheel_directory, settings, metadata_directory)
