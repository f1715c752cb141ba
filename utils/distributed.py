"""Several processes that train and evaluate together, one for each device; started by torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: for one that segments a far larger image, not for one that failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` that run together: number `rank`, its tensors on `device`.

    Every method must be called by all of them, in the same order. Alone, each does nothing.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and logs."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors`, all of one type, by its sum over the processes; all in one transfer."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def max(self, number: int) -> int:
        """The largest of an integer over the processes."""
        return max(self.gather(number))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of their numbers."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def start(device: str | None) -> Ranks:
    """Join the processes that torchrun started, by its environment variables, or be alone.

    `device` is the option: None is the best there is. Of several processes on a machine with GPUs each takes the one of
    its local rank. Raises InputError where the device cannot be used.
    """
    world, rank, local = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world <= 1:
        return Ranks(device=pick_device(device))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise InputError(f"--device {kind} names one device, but there are {world} processes; give cuda or cpu")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
            "lower --nproc_per_node (NPROC in the scripts), or give --device cpu"
        )
    own = pick_device(f"cuda:{local}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(rank, world, own)


def stop() -> None:
    """Leave the other processes, all of which are done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def trained_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the norm layers in training mode.

    Their `num_batches_tracked` is no part of any result and stays each process's own.
    """
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    return [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]


def reduce_step(
    ranks: Ranks, parameters: Sequence[nn.Parameter], statistics: Sequence[Tensor], numbers: Tensor, active: bool
) -> None:
    """Make one step of what each process did with its images; in place, and the same everywhere afterwards.

    Gradients of `parameters`, 0 where there are none, and `numbers`, float32, become sums over the processes. Running
    `statistics` become means over the `active` processes, which had something to learn from; not a number where none
    was.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.world == 1:
        return
    count = torch.tensor([float(active)], device=ranks.device)
    for statistic in statistics:
        statistic.mul_(count)
    ranks.sum_([*(parameter.grad for parameter in parameters), *statistics, numbers, count])
    for statistic in statistics:
        statistic.div_(count)
