"""Lossless speculative decoding for Llama-family models with a recyclable module (RecycleGPT, arXiv 2308.03421).

The shortest use:

    import recycle_ext

    model = recycle_ext.load()
    for piece in recycle_ext.generate(model, "Once upon a time,"):
        print(piece, end="", flush=True)
"""

import filecmp
import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def _need_torch() -> None:
    try:
        from torch import __version__ as given
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("recycle_ext needs torch 2.10 or newer; torch is not installed") from None
    if tuple(int(part) for part in given.split(".")[:2]) < (2, 10):
        raise ImportError(f"recycle_ext needs torch 2.10 or newer; this is torch {given}")


def _import_installed_package() -> None:
    """Puts the installed recycle_ext in the place of this one, a checkout's, which has no compiled part.

    `python -m recycle_ext.generate` in a clone finds the clone's recycle_ext/ before the installed
    package. Lending it the installed compiled part alone could pair an old binary with new Python, so
    all of the installed package runs, and it is said when the checkout is no longer the same.
    """
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    find = importlib.machinery.PathFinder.find_spec
    spec = find(__name__, elsewhere)
    if spec is None or find(f"{__name__}._C", spec.submodule_search_locations) is None:
        raise ImportError(f"recycle_ext is not installed: run `{sys.executable} -m pip install .` in {here.parent}")
    installed = Path(spec.origin).parent
    names = [str(file.relative_to(here)) for file in here.rglob("*.py")]
    _, changed, missing = filecmp.cmpfiles(here, installed, names, shallow=False)
    if changed or missing:
        print(
            f"recycle_ext: this checkout is not what runs, {installed} is, and differs in "
            f"{', '.join(sorted(changed + missing))}; `pip install .` installs this checkout",
            file=sys.stderr,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)


_need_torch()

if importlib.util.find_spec(f"{__name__}._C") is None:
    _import_installed_package()
else:
    from recycle_ext import former_names
    from recycle_ext.decoding.decoder import Decoder
    from recycle_ext.errors import RecycleError

    # The import of the package recycle_ext.generate binds that name; the function then takes the name for good.
    from recycle_ext.generate import generate
    from recycle_ext.generate.generation import Statistics
    from recycle_ext.generate.model import Model, load
    from recycle_ext.ops import registration  # noqa: F401  (registers torch.ops.recycle.*)

    former_names.install()

    __all__ = ["Decoder", "Model", "RecycleError", "Statistics", "generate", "load"]
