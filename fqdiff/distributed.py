"""Several processes started by ``torchrun``: who am I, and how do gradients meet. Everything is one process without it."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes_launched() -> int:
    """How many processes ``torchrun`` started, this one included; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> None:
    """Join the other processes (gloo on a CPU, NCCL on a GPU)."""
    if processes_launched() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def agree(decision: bool) -> bool:
    """The first process's ``decision``, in every process."""
    if not dist.is_initialized():
        return decision
    shared = [decision]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def mean(value: Tensor) -> Tensor:
    """``value`` averaged over the processes."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()


def wrap(network: nn.Module) -> nn.Module:
    """``network`` with gradients averaged over the processes at each backward pass."""
    return nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network
