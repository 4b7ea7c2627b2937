"""The dtypes and the rows of the key/value caches (csrc/include/recycle/kv_cache.h)."""

from __future__ import annotations

import torch

# The dtype of a cache by its name on the command line.
CACHE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8}
_SCALE_BYTES = 4


def row_elements(dtype: torch.dtype, head_dim: int) -> int:
    """Size of a cache's last dimension: an int8 row ends with the four bytes of its float32 scale."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim
