"""The speed that reading weights is measured against."""

from __future__ import annotations

import statistics

import torch

from recycle_ext import _C


def read_bandwidth(device: torch.device, size: int, repeats: int = 10) -> float:
    """Bytes a second. On the CPU: read by all threads from a buffer of ``size`` bytes. On a GPU: read and written
    together, by copies of at least 256 MB (more than its caches hold). The median of the repeats.
    """
    if device.type == "cpu":
        return _C.read_bandwidth(size, repeats)
    source = torch.zeros(max(size, 256_000_000), dtype=torch.uint8, device=device)
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
