"""The conditions of a figure besides the model: processor, caches, memory, GPU, versions."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ext import _C
from recycle_ext.measuring.extras import require

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Instruction sets that kernels of this package or of other engines choose by.
FEATURES = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Processor:
    """name: as the processor calls itself. features: those of FEATURES that it has."""

    name: str
    features: tuple[str, ...]


@functools.cache
def processor() -> Processor:
    """The processor of this machine. The first call takes about a second."""
    require("cpuinfo", "the processor's name")
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    flags = set(info.get("flags", ()))
    found = tuple(name for name in FEATURES if name in flags)
    return Processor(info.get("brand_raw") or platform.machine(), found)


def cache_bytes() -> dict[str, int]:
    """Sizes of the first core's data caches, as {"L1": bytes, "L2": ..., "L3": ...}; empty where Linux does not say.

    From sysfs: py-cpuinfo gives the sum over cores for some levels, and an AMD processor's L2 as its L3.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = {}
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
    return found


def peak_memory_bytes() -> int:
    """The largest resident memory of this process since its start.

    VmHWM, and not getrusage's ru_maxrss: a child inherits its parent's ru_maxrss through fork and exec.
    """
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def date() -> str:
    """Local date and time to the minute."""
    return time.strftime("%Y-%m-%d %H:%M")


def machine() -> dict:
    """The machine and the versions that a CPU's figures depend on, for JSON."""
    require("psutil", "the size of the memory")
    import psutil

    return {
        "cpu": processor().name,
        "cpu_features": list(processor().features),
        "cores": _C.available_cores(),
        "isa": _C.isa(),
        "cache_bytes": cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recycle_ext": _C.build_info()["version"],
        "date": date(),
    }


def gpu_driver() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or "unknown"


def gpu_machine(device: torch.device) -> dict:
    """The same for a GPU's figures."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": gpu_driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "recycle_ext": _C.build_info()["version"],
        "date": date(),
    }


def plural(count: int, noun: str) -> str:
    """ "1 core", "2 cores"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
