"""Several processes under torchrun; under plain python one process and no process group.

Every rank runs the same job. Work is divided by place (of an image in its dataset, of an example
in the global batch), so that results do not depend on the number of processes; rank 0 writes.
"""

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError


def start() -> None:
    """Joins the process group if torchrun started this process; NCCL on GPUs, gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits for every rank; of use before reading what rank 0 wrote."""
    if dist.is_initialized():
        dist.barrier()


def share(n: int) -> range:
    """This rank's part of the indices 0 .. n - 1: consecutive, of nearly equal length."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def share_of_batch(batch_size: int) -> slice:
    """This rank's part of a global batch. Raises UserError if it cannot be divided equally."""
    each, rest = divmod(batch_size, world_size())
    if rest or not each:
        raise UserError(
            f"batch_size {batch_size} is not divisible by the {world_size()} processes: it is the "
            "global batch, of which each process takes an equal part"
        )
    return slice(rank() * each, (rank() + 1) * each)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up `tensor` over the ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows (n_rank, ...) of all ranks, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return np.concatenate(parts)


def replicated(module: nn.Module) -> nn.Module:
    """`module`, wrapped so that gradients are averaged over the ranks, if there are several."""
    return DistributedDataParallel(module) if dist.is_initialized() else module
