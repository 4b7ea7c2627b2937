"""RecycleGPT decoding for Llama-family models: two tokens for little more than one.

import recycle_ext

model = recycle_ext.load()
for piece in recycle_ext.generate(model, "Once upon a time,"):
    print(piece, end="", flush=True)
"""

import importlib.machinery
import sys
from pathlib import Path


def _need_torch() -> None:
    try:
        from torch import __version__ as given
    except ImportError:
        raise ImportError("recycle_ext needs torch 2.10 or newer; torch is not installed") from None
    if tuple(int(part) for part in given.split(".")[:2]) < (2, 10):
        raise ImportError(f"recycle_ext needs torch 2.10 or newer; this is torch {given}")


def _use_installed_package() -> None:
    """Makes this package, in a checkout, stand for the installed one.

    `python -m recycle_ext.generate` in a clone finds the clone's recycle_ext/ before the installed package;
    but only the installed one has the compiled part. Mixing the two could pair an old binary with new
    Python, so all submodules come from the installed package.
    """
    here = Path(__file__).resolve().parent
    if any(here.glob("_C.*")):
        return
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    spec = importlib.machinery.PathFinder.find_spec("recycle_ext", others)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{here} is not built: run `pip install .` in {here.parent}")
    __path__[:] = spec.submodule_search_locations


_need_torch()
_use_installed_package()

from recycle_ext import ops  # noqa: E402, F401  (registers torch.ops.recycle.*)
from recycle_ext.decoder import Decoder  # noqa: E402
from recycle_ext.errors import RecycleError  # noqa: E402
from recycle_ext.generation import Model, Statistics, generate, load  # noqa: E402

__all__ = ["Decoder", "Model", "RecycleError", "Statistics", "generate", "load"]
