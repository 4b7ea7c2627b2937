"""One process, or several started by torchrun, through torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import BaseModel


@dataclass(frozen=True)
class Workers:
    """This process among ``count``, and the device it trains on."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place."""
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
        """Splits a frozen base's weights over the processes (FSDP2), layer by layer, so that no device need
        hold more of them than its share and one layer. Embedding and head stay whole.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)


def join(device: str) -> Workers:
    """Takes torchrun's environment variables, if it started this process."""
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
    """The counterpart of join()."""
    if workers.count > 1:
        dist.destroy_process_group()
