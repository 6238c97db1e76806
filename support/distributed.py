"""Several processes under torchrun; under plain python one process and no process group.

Every rank runs the same job. Work is divided by place (of an image in its dataset, of an example
in the global batch), so that results do not depend on the number of processes; rank 0 writes.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.errors import UserError

# The others wait while rank 0 downloads or decodes; that a rank has died is torchrun's to notice.
TIMEOUT = timedelta(days=1)


def start() -> None:
    """Joins the process group if torchrun started this process; NCCL on GPUs, gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=TIMEOUT)


def stop() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, from 0; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, which is also that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has asked this of the same message; the first one prints it."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(f"said/{message}", 1) == 1
    except dist.DistError:  # the store is gone with the rank that kept it: better twice than never
        return True


def barrier() -> None:
    """Waits until every rank is here, as before reading what rank 0 wrote."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Drops what the ranks other than 0 print in the block to standard output."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find its files on the disk."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def share(n: int) -> range:
    """This rank's part of the indices 0 .. n - 1: consecutive, of nearly equal length."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def at_least_one(mine: range) -> range:
    """`mine`, or one index of another rank's if it is empty: no network takes an empty batch.

    Only the first len(mine) results are to be used.
    """
    return range(mine.start, max(mine.stop, mine.start + 1))


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


def max_over_ranks(value: int) -> int:
    """The largest `value` of all ranks. It goes from host to host: no rank waits for its GPU."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_shares(rows: Tensor, n: int) -> Tensor:
    """All n rows, (n, ...) on the device, on every rank; `rows` are those of `share(n)`."""
    if not dist.is_initialized():
        return rows
    whole = rows.new_zeros((n, *rows.shape[1:]))
    mine = share(n)
    whole[mine.start : mine.stop] = rows
    return sum_over_ranks(whole)


def gather_with_gradient(rows: Tensor, n: int) -> Tensor:
    """`gather_shares`, through which a gradient reaches this rank's own rows.

    It is `world_size` times that of the result, because `replicated` averages over the ranks what
    is here a sum of one part from each.
    """
    if not dist.is_initialized():
        return rows
    whole, mine = gather_shares(rows.detach(), n), share(n)
    own = rows.detach() + world_size() * (rows - rows.detach())
    return torch.cat([whole[: mine.start], own, whole[mine.stop :]])


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows (n_rank, ...) of all ranks, in the order of the ranks, on every rank's host."""
    if not dist.is_initialized():
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return np.concatenate(parts)


def replicated(module: nn.Module) -> nn.Module:
    """`module`, wrapped so that gradients are averaged over the ranks, if there are several."""
    return DistributedDataParallel(module) if dist.is_initialized() else module
