"""Memory bandwidth: the limit that a decode step's reading of weights is compared with."""

from __future__ import annotations

import statistics

import torch

from recycle_ext import _C

_MIN_GPU_BYTES = 256_000_000  # more than the L2 cache of any GPU holds


def read_bandwidth(device: torch.device, size: int, repeats: int = 10) -> float:
    """Bytes per second, the median of ``repeats`` passes over a buffer of ``size`` bytes.

    CPU: all kernel threads read the buffer together. GPU: copies of at least 256 MB, bytes read and written added up.
    A buffer as large as the model stays in the same caches as the model.
    """
    if device.type == "cpu":
        return _C.read_bandwidth(size, repeats)
    source = torch.zeros(max(size, _MIN_GPU_BYTES), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    with torch.cuda.device(device):
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(seconds[1:])
