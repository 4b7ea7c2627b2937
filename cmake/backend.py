"""The build backend: scikit-build-core, and the question which torch to build against.

pip builds in an environment of its own. Asking for torch there would download a second one, of
several gigabytes with CUDA, although the environment that is installed into usually has one, and any
from 2.10 on serves (the Stable ABI). So this looks there first, and asks for torch only when there is
none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  (hooks that need nothing of us)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

OLDEST = (2, 10)


def _site_packages() -> list[Path]:
    """Where the environment that is installed into keeps its packages."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if env := os.environ.get("VIRTUAL_ENV"):
        # uv builds in a second virtual environment; the first is named here.
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folders += [Path(env, "lib", name, "site-packages"), Path(env, "Lib", "site-packages")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(folder) for folder in folders]


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


def _requires() -> list[str]:
    return [] if _installed_torch() else ["torch>=" + ".".join(map(str, OLDEST))]


def _with_torch(config_settings: dict | None) -> dict:
    torch = _installed_torch()
    if torch is None and (spec := importlib.util.find_spec("torch")):
        torch = Path(spec.submodule_search_locations[0])
    return {**(config_settings or {}), "cmake.define.RECYCLE_TORCH_DIR": str(torch or "")}


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _backend.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _backend.get_requires_for_build_editable(config_settings) + _requires()


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
