"""Optional libraries: the error for a missing library is one line with the `pip install` command."""

from __future__ import annotations

import importlib.util

from recycle_ext.errors import RecycleError

# Libraries whose package has another name than the module that Python imports.
PACKAGES = {"cpuinfo": "py-cpuinfo", "llama_cpp": "llama-cpp-python"}


def is_installed(module: str) -> bool:
    """Whether Python can import ``module`` (a top-level name)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None: the import of this module is blocked
        return False


def require(module: str, feature: str) -> None:
    """Raises RecycleError unless ``module`` is installed. feature: the part that needs the module, for the message."""
    if not is_installed(module):
        package = PACKAGES.get(module, module)
        raise RecycleError(f"{feature} needs {package}: `pip install {package}`")
