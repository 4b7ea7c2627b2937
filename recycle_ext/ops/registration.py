"""Registers the ops: torch.ops.recycle.attention_decode, recycle_head, decode_step and prefill.

``_C`` brings their schemas and their CPU kernels (csrc/bindings/ops.cpp), librecycle_cuda.so their CUDA kernels
(csrc/bindings/cuda_ops.cpp); prefill on a GPU is PyTorch (cuda_prefill.py). The shape functions below serve
torch.compile, export and opcheck.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.errors import RecycleError

_CUDA_LIBRARY = Path(_C.__file__).with_name("librecycle_cuda.so")
HAS_CUDA_OPS = torch.version.cuda is not None and _CUDA_LIBRARY.exists()

if HAS_CUDA_OPS:
    torch.ops.load_library(_CUDA_LIBRARY)

    @torch.library.impl("recycle::prefill", "cuda")
    def _(*arguments) -> tuple:
        # Imported here: torch's attention brings its compiler, seconds of import that no CPU user needs.
        from recycle_ext.ops.cuda_prefill import prefill

        return prefill(*arguments)

    @torch.library.register_fake("recycle::finish_prefill")
    def _(weights, plan, base_cache, module_cache, pending, lengths, *rest) -> tuple:
        return torch.empty_like(pending), lengths.new_empty(pending.shape[0])


def check_device(device: str | torch.device) -> torch.device:
    """The device; raises RecycleError where it does not exist or this installation does not run on it."""
    try:
        found = torch.device(device) if isinstance(device, (str, torch.device)) else None
    except (RuntimeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise RecycleError(f"device is {str(device)!r}; it must be cpu, cuda or cuda:N")
    if found.type == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise RecycleError(f"device is {str(device)!r}, but torch {torch.__version__} was built without CUDA")
    if not _CUDA_LIBRARY.exists():
        raise RecycleError(
            f"device is {str(device)!r}, but recycle_ext was built without CUDA: install it again where "
            "nvcc is on the PATH, with RECYCLE_CUDA=ON to see why if it fails"
        )
    count, index = torch.cuda.device_count(), found.index or 0
    if index >= count:
        raise RecycleError(f"device is {str(device)!r}, but torch finds {count} GPUs")
    return torch.device("cuda", index)


@torch.library.register_fake("recycle::attention_decode")
def _(q, k, v, cache, lengths, inv_freq, q_norm=None, k_norm=None, eps=1e-5) -> Tensor:
    return torch.empty_like(q)


@torch.library.register_fake("recycle::recycle_head")
def _(hidden, norm, eps, head, format, n_vocab, positions, temperature, top_k, top_p, seeds) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows)


@torch.library.register_fake("recycle::decode_step")
def _(weights, plan, base_cache, module_cache, pending, lengths, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pending), lengths.new_empty(pending.shape[0])


@torch.library.register_fake("recycle::prefill")
def _(*arguments) -> None:
    return None
