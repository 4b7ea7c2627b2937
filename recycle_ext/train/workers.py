"""The processes of a run: one, or several that torchrun started and torch.distributed connects."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import BaseModel


@dataclass(frozen=True)
class Workers:
    """This process (``rank``) among ``count``, and the device it trains on."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """Whether this process is rank 0, which alone reports and saves."""
        return self.rank == 0

    def check_batch(self, batch_sequences: int, accumulate: int, n_train: int) -> None:
        """Raises RecycleError where a step's batch cannot be split over processes and micro-batches, or is too large."""
        if batch_sequences % (accumulate * self.count):
            raise RecycleError(
                f"--batch-sequences is {batch_sequences}; it must be a multiple of --accumulate "
                f"times the processes, {accumulate} x {self.count}"
            )
        if batch_sequences > n_train:
            raise RecycleError(f"--batch-sequences is {batch_sequences}, and there are {n_train} sequences to train on")

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def parallel(self, task: nn.Module) -> nn.Module:
        """The task with its gradients averaged over the processes (DDP)."""
        if self.count == 1:
            return task
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(task, device_ids=ids)

    def shard(self, base: BaseModel) -> None:
        """Splits a frozen base's weights over the processes (FSDP2), layer by layer.

        A device then holds its share of the layers and at most one whole layer. Embedding and head stay whole. A
        frozen base has no gradients, so set_requires_gradient_sync has nothing to postpone here.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)


def gradient_reduction(task: nn.Module, enabled: bool) -> AbstractContextManager:
    """The context of a forward and backward pass: ``enabled`` is whether its gradients are reduced over the processes."""
    if enabled or not isinstance(task, DistributedDataParallel):
        return nullcontext()
    return task.no_sync()


def join(device: str) -> Workers:
    """Joins the processes of torchrun, if it started this one. Raises RecycleError for a GPU that is not there."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecycleError(f"--device is {device}; this torch sees no NVIDIA GPU")
    if count == 1:
        return Workers(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Workers(dist.get_rank(), count, torch.device(device))


def leave(workers: Workers) -> None:
    """Undoes join()."""
    if workers.count > 1:
        dist.destroy_process_group()
