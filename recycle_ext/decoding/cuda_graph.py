"""A decode step as one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor


class GraphedStep:
    """decode_step with fixed arguments, captured once; steps may be started before earlier ones are read.

    arguments: as the op takes them, all state on a GPU. The step has one shape whatever is accepted, allocates
    nothing and never waits, so a replay is all that a step costs the CPU.
    """

    def __init__(self, arguments: tuple) -> None:
        self._arguments = arguments  # the graph has their addresses
        weights, plan, base_cache, module_cache, pending, *rest = arguments
        self._device = weights.device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # Loads the kernels, which a capture must not: with all sequences idle it changes nothing.
            idle = torch.full_like(pending, -1)
            torch.ops.recycle.decode_step(weights, plan, base_cache, module_cache, idle, *rest)
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = torch.ops.recycle.decode_step(*arguments)
        # Results of steps that were started and not read yet, oldest first, and the events before and after;
        # buffers take turns.
        self._started: list[tuple[tuple[Tensor, ...], torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = 0.0  # that the GPU took for the step read last
        self._free = [
            tuple(
                torch.empty(r.shape, dtype=r.dtype, device="cpu", pin_memory=True)
                for r in self._results
            )
            for _ in range(2)
        ]

    @property
    def n_started(self) -> int:
        """Steps that were started and not read, at most 2."""
        return len(self._started)

    def replay(self) -> None:
        """Starts a step whose results nobody reads."""
        self._graph.replay()

    def start(self) -> None:
        """Starts a step, and returns."""
        buffers = self._free.pop()
        with torch.cuda.device(self._device):
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            self.replay()
            for buffer, result in zip(buffers, self._results, strict=True):
                buffer.copy_(result, non_blocking=True)
            done.record()
        self._started.append((buffers, begun, done))

    def read(self) -> tuple[Tensor, Tensor]:
        """tokens and counts of the oldest step that was started, on the CPU; waits for it."""
        buffers, begun, done = self._started.pop(0)
        done.synchronize()
        self.seconds = begun.elapsed_time(done) / 1e3
        tokens, counts = (buffer.clone() for buffer in buffers)
        self._free.append(buffers)
        return tokens, counts

    def forget(self, sequence: int) -> None:
        """Steps that were started give this sequence nothing; those that then give none are dropped."""
        kept = []
        for buffers, begun, done in self._started:
            done.synchronize()
            tokens, counts = buffers
            tokens[sequence] = -1
            counts[sequence] = 0
            if counts.any():
                kept.append((buffers, begun, done))
            else:
                self._free.append(buffers)
        self._started = kept
