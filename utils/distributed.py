"""Several processes that train and evaluate together, one for each device; started by torchrun."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError, Value

PATIENCE = timedelta(hours=2)
"""The longest wait of a process for the others, one of which may segment a far larger image."""

MEETING = timedelta(minutes=15)
"""The longest wait for all processes to start."""

TOLD_AFTER = 20
"""Seconds of that wait after which a line says so."""


@dataclass(frozen=True)
class Ranks:
    """The processes that run together: this one's number, from 0, how many there are, and the device of its tensors.

    Every method must be called by all of them, in the same order. If there is one, no method communicates.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and logs."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors`, all of one dtype, by its sum over the processes, in one transfer."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        return max(self.gather(number))

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Value]) -> Value:
        """Return what `work`, which calls no other method, returns in this process.

        Raises the InputError of the first process in which it failed, in all processes: none is left alone in what
        they do together next.
        """
        found: list[Value] = []
        failure = None
        try:
            found.append(work())
        except InputError as error:
            failure = str(error), error.kind
        if failures := [one for one in self.gather(failure) if one]:
            raise InputError(*failures[0])
        return found[0]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()
"""A single process on the CPU."""


def start(device: str | None) -> Ranks:
    """Join the processes that torchrun started, by its environment variables; return a single one without torchrun.

    `device` is the value of `--device`; None is CUDA if there is any, else the CPU. Of several processes on a machine
    with GPUs each takes the GPU of its local rank. Raises InputError if the device cannot be used.
    """
    world, rank, local = (_environment_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world <= 1:
        return Ranks(device=pick_device(device))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or rank >= world:
        fault = f"{missing[0]} is not set" if missing else f"RANK is {rank}"
        raise InputError(
            f"the environment says WORLD_SIZE {world}, but {fault}: start with torchrun (NPROC in the scripts), or "
            "unset WORLD_SIZE to run a single process"
        )
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
    store = dist.PrefixStore("glnet", _meet(rank, world))
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    return Ranks(rank, world, own)


def _environment_number(name: str) -> int:
    """Return the number in an environment variable; 0 if it is unset or empty. Raises InputError for another text."""
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}, not a number; start with torchrun, or unset it")
    return int(text)


def world_size() -> int:
    """Return how many processes run together by the environment; 1 where it says none."""
    text = os.environ.get("WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def _meet(rank: int, world: int) -> dist.Store:
    """Return the store of all processes, once they have met. Raises InputError after `MEETING` without all of them."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = Timer(TOLD_AFTER, lambda: print(f"process {rank} waits for the others at {where}", file=sys.stderr))
    told.daemon = True
    told.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"process {rank} of {world} did not meet the others at {where} (MASTER_ADDR, MASTER_PORT) within "
            f"{MEETING.total_seconds():.0f} s: {str(error).splitlines()[0]}"
        ) from error
    finally:
        told.cancel()
    store.set_timeout(PATIENCE)
    return store


def stop() -> None:
    """Leave the group of processes, if there is one, after all work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`; for None CUDA if there is any, else the CPU. Raises InputError if it fails."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def trained_statistics(model: nn.Module) -> list[Tensor]:
    """Return running means and variances of the norm layers in training mode; `num_batches_tracked` has no effect."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    statistics = (statistic for norm in norms for statistic in (norm.running_mean, norm.running_var))
    return [statistic for statistic in statistics if statistic is not None]


def reduce_step(
    ranks: Ranks, parameters: Sequence[nn.Parameter], statistics: Sequence[Tensor], numbers: Tensor, active: bool
) -> None:
    """Combine the processes' parts of one step, in place; afterwards all processes hold the same.

    Gradients of the parameters, of which a missing one is taken as 0, and `numbers`, float32, become sums over the
    processes; running statistics of norm layers means over those that are `active`, which had anything to learn from,
    NaN without any.
    """
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if ranks.world == 1:
        return
    count = torch.tensor([float(active)], device=ranks.device)
    for statistic in statistics:
        statistic.mul_(count)
    ranks.sum_([*gradients, *statistics, numbers, count])
    for statistic in statistics:
        statistic.div_(count)
