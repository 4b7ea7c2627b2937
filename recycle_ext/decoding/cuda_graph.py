"""A decode step as one CUDA graph."""

from __future__ import annotations

import os

import torch
from torch import Tensor


class GraphedStep:
    """decode_step with fixed arguments, captured once; two steps may be started before the first one is read.

    arguments: as the op takes them, all state on a GPU. A step has one shape whatever is accepted, allocates nothing and
    never waits for the host, so a replay is all that a step costs the CPU. With RECYCLE_CUDA_GRAPH=0 in the environment
    each step launches its kernels one by one, for tools that can't look into graphs.
    """

    def __init__(self, arguments: tuple) -> None:
        self._arguments = arguments  # the graph holds their addresses
        # Started steps that were not read, oldest first: host buffers, and the events before and after.
        self._started: list[tuple[tuple[Tensor, ...], torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = 0.0  # GPU time of the step that was read last
        self._capture()
        self._free = [
            tuple(torch.empty(r.shape, dtype=r.dtype, device="cpu", pin_memory=True) for r in self._results)
            for _ in range(2)
        ]

    def _capture(self) -> None:
        weights, plan, base_cache, module_cache, pending, *rest = self._arguments
        self._device = weights.device
        self._graph = torch.cuda.CUDAGraph() if os.environ.get("RECYCLE_CUDA_GRAPH") != "0" else None
        with torch.cuda.device(self._device):
            # Loads the kernels, which a capture must not do. With all sequences idle the step changes nothing.
            idle = torch.full_like(pending, -1)
            self._results = torch.ops.recycle.decode_step(weights, plan, base_cache, module_cache, idle, *rest)
            if self._graph is None:
                return
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = torch.ops.recycle.decode_step(*self._arguments)

    @property
    def n_started(self) -> int:
        """Steps that were started and not read, at most 2."""
        return len(self._started)

    def replay(self) -> None:
        """Starts a step whose results are not read."""
        if self._graph is not None:
            self._graph.replay()
            return
        for result, given in zip(self._results, torch.ops.recycle.decode_step(*self._arguments), strict=True):
            result.copy_(given)

    def start(self) -> None:
        """Starts a step and returns at once."""
        buffers = self._free.pop()
        with torch.cuda.device(self._device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            self.replay()
            for buffer, result in zip(buffers, self._results, strict=True):
                buffer.copy_(result, non_blocking=True)
            after.record()
        self._started.append((buffers, before, after))

    def read(self) -> tuple[Tensor, Tensor]:
        """tokens and counts of the oldest started step, on the CPU; waits for the step."""
        buffers, before, after = self._started.pop(0)
        after.synchronize()
        self.seconds = before.elapsed_time(after) / 1e3
        tokens, counts = (buffer.clone() for buffer in buffers)
        self._free.append(buffers)
        return tokens, counts

    def forget(self, sequence: int) -> None:
        """Started steps give this sequence nothing; steps that then give no sequence anything are dropped."""
        remaining = []
        for buffers, before, after in self._started:
            after.synchronize()
            tokens, counts = buffers
            tokens[sequence] = -1
            counts[sequence] = 0
            if counts.any():
                remaining.append((buffers, before, after))
            else:
                self._free.append(buffers)
        self._started = remaining
