"""The facts that a bug report needs: versions, build, processor, threads, memory, GPUs, the default model's place.

`python -m recycle_ext.info` prints them, in the manner of `python -m torch.utils.collect_env`.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from recycle_ext import _C
from recycle_ext.checkpoint.default_model import GGUF_NAME, HUB_ID, cache_directory
from recycle_ext.errors import RecycleError, first_line
from recycle_ext.measuring.bandwidth import read_bandwidth
from recycle_ext.measuring.extras import require
from recycle_ext.measuring.machine import cache_bytes, date, gpu_driver, plural, processor
from recycle_ext.ops.registration import HAS_CUDA_OPS

# The libraries that recycle_ext depends on, then those of its extras.
LIBRARIES = (
    *("numpy", "safetensors", "tokenizers", "huggingface_hub", "gguf", "jinja2", "tqdm"),
    *("filelock", "psutil", "py-cpuinfo"),
    *("transformers", "llama-cpp-python", "pyarrow", "scipy", "tabulate", "matplotlib"),
)
PROBE_BYTES = (32 << 20, 256 << 20)  # the second is about a small model in 16 bits
_PROBE_REPEATS = 3


def info(bandwidth: bool = True) -> dict[str, dict[str, str]]:
    """The report: sections of lines, each a name and a text. bandwidth: whether to measure it, in a short probe."""
    return {
        "versions": versions(),
        "build": build(),
        "processor": processor_lines(),
        "memory": memory_lines(bandwidth),
        "GPU": gpu_lines(),
        "default model": default_model_lines(),
    }


def text(report: dict[str, dict[str, str]]) -> str:
    """The report for a terminal or an issue."""
    width = max(len(name) for lines in report.values() for name in lines)
    blocks = [
        "\n".join([f"{section}:", *(f"  {name:<{width}}  {line}" for name, line in lines.items())])
        for section, lines in report.items()
    ]
    return "\n\n".join(blocks)


def versions() -> dict[str, str]:
    """Versions of this package, the system, and the libraries."""
    found = {
        "recycle_ext": _C.build_info()["version"],
        "from": str(Path(_C.__file__).parent),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "torch": torch.__version__,
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    found["date"] = date()
    return found


def build() -> dict[str, str]:
    """The build of the compiled part."""
    facts = _C.build_info()
    cuda_library = Path(_C.__file__).with_name("librecycle_cuda.so")
    return {
        "compiler": facts["compiler"],
        "torch headers": facts["torch"],
        "CPU targets": facts["cpu_targets"],
        "CUDA": facts["cuda"],
        "librecycle_cuda.so": "there" if cuda_library.exists() else "not there",
    }


def processor_lines() -> dict[str, str]:
    """The processor, the instruction set in use, and the number of threads with its reason."""
    cpu = processor()
    available, total = _C.available_cores(), os.cpu_count()
    quota = _C.cpu_quota()
    caches = ", ".join(f"{name} {_size(size)}" for name, size in cache_bytes().items())
    return {
        "model": cpu.name,
        "features": " ".join(cpu.features) or "unknown",
        "instruction set": f"{_C.isa()} (of {', '.join(_C.runnable_isas())})",
        "cores": f"{available} of {total}, by the affinity of this process; {_C.physical_cores()} physical",
        "CPU time limit": "none" if quota is None else f"{quota:g} cores (container)",
        "threads": f"{_C.n_threads()}: {_reason_of_threads(quota)}; torch: {torch.get_num_threads()}",
        "caches of a core": caches or "unknown",
    }


def _reason_of_threads(quota: float | None) -> str:
    """Which limit the number of threads comes from."""
    limits = {
        "one per physical core that this process may run on": _C.physical_cores(),
        "the CPU time limit, rounded down": _C.physical_cores() if quota is None else max(1, int(quota)),
        "torch's number (OMP_NUM_THREADS, torch.set_num_threads)": torch.get_num_threads(),
    }
    reason = min(limits, key=limits.__getitem__)
    return reason if limits[reason] == _C.n_threads() else "set by a call"


def memory_lines(bandwidth: bool) -> dict[str, str]:
    """Memory, and the speed at which all threads read it."""
    require("psutil", "the size of the memory")
    import psutil

    memory = psutil.virtual_memory()
    lines = {"memory": f"{_size(memory.total)}, {_size(memory.available)} available"}
    if bandwidth:
        for size in PROBE_BYTES:
            rate = read_bandwidth(torch.device("cpu"), size, _PROBE_REPEATS)
            lines[f"reading {_size(size)}"] = f"{rate / 1e9:.1f} GB/s with {plural(_C.n_threads(), 'thread')}"
    return lines


def gpu_lines() -> dict[str, str]:
    """The GPUs that torch sees, and whether this installation can use them."""
    if torch.version.cuda is None:
        return {"torch": "built without CUDA"}
    lines = {
        "torch": f"CUDA {torch.version.cuda}",
        "driver": gpu_driver(),
        "ops for CUDA": "loaded" if HAS_CUDA_OPS else "not loaded",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {_size(properties.total_memory)}"
        )
    return lines


def default_model_lines() -> dict[str, str]:
    """The default model's folder, and its file if the model was fetched."""
    try:
        folder = cache_directory()
        places = [folder / GGUF_NAME, folder / Path(HUB_ID).name]
        found = next((place for place in places if place.exists()), None)
    except (OSError, RecycleError) as error:  # a report has all the other lines
        return {"folder": first_line(error)}
    return {
        "folder": str(folder),
        "RECYCLE_CACHE": os.environ.get("RECYCLE_CACHE", "not set"),
        "file": "not fetched yet" if found is None else found.name,
    }


def _size(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1024:.3g} KiB"
