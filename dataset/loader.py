"""Batches of samples: in which order, which part for which process, and by which workers."""

import atexit
import functools
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from dataset.base import SegmentationDataset
from utils.errors import InputError


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields all indices below `length` as (epoch, index), in an order that depends on seed and epoch only."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return the epoch's whole order. A process of several, or a resumed run, takes its part of it."""
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(repeat(self.epoch), self.order(), strict=False)

    def __len__(self) -> int:
        return self.length


class BatchPart(Sampler[list[tuple[int, int]]]):
    """Yields this process's part of each batch of an epoch: every `world`-th key from the `rank`-th on.

    `batch_size` is that of all processes together. All get as many batches; in a short last one, parts may be empty.
    No key is left out or comes twice. Iteration starts at batch `start`, for a run that goes on inside an epoch.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.sampler, self.batch_size, self.start = sampler, batch_size, 0
        self.rank, self.world = rank, world

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, and the batch in it, both counted from 0, that the next iteration starts with."""
        self.sampler.set_epoch(epoch)
        self.start = start

    def batch(self, number: int) -> list[int]:
        """Return the indices of a whole batch of the epoch, of all processes."""
        return self.sampler.order()[number * self.batch_size : (number + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = list(self.sampler)
        for first in range(self.start * self.batch_size, len(keys), self.batch_size):
            yield keys[first : first + self.batch_size][self.rank :: self.world]

    @property
    def batches(self) -> int:
        """Return the number of batches in a whole epoch."""
        return -(-len(self.sampler) // self.batch_size)

    def __len__(self) -> int:
        return self.batches - self.start


def prepare_worker(worker: int) -> None:
    """Prepare a process that reads images.

    It ignores SIGINT and SIGTERM, which terminals and batch systems send to every process: the parent stops workers.
    OpenCV gets one thread, as torch gives itself in workers: its others do not survive the fork.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)


_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
"""The workers of all loaders of this process."""


@functools.cache
def _kill_workers_at_exit() -> None:
    """Register an exit handler that ends the workers of loaders that were left in the middle.

    They ignore the SIGTERM that Python sends before it waits for them. Handlers run in reverse order, so this one comes
    before Python's own, which was registered when torch imported multiprocessing.
    """

    def kill() -> None:
        for worker in list(_workers):
            if worker.is_alive():
                worker.kill()

    atexit.register(kill)


def start_pass(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a pass; its workers end with this process, even if the pass is left in the middle."""
    iterator: Any = DataLoader.__iter__(loader)
    if loader.num_workers:
        _kill_workers_at_exit()
        _workers.update(iterator._workers)
    return iterator


class ErrorsAsValues(Dataset[Any]):
    """What `read` returns for each key of an item; an InputError is returned instead of raised.

    Torch turns what a worker raises into text; returned, the error keeps its type and its kind.
    """

    def __init__(self, read: Callable[[Any], Any], length: int) -> None:
        self.read, self.length = read, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.read(key)
        except InputError as error:
            return error


def read_each(
    read: Callable[[Any], Any], indices: Sequence[Any], num_workers: int, bar: str, quiet: bool
) -> Iterator[Any]:
    """Yield what `read` returns for each of `indices`, in order, by `num_workers` processes; `bar` names the progress.

    Raises the InputError that `read` raises.
    """
    loader = DataLoader(
        ErrorsAsValues(read, len(indices)),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        # torch would draw the workers' seeds from the generator that initial weights come from
        generator=torch.Generator(),
    )
    found = start_pass(loader)
    for value in tqdm(found, total=len(indices), desc=bar, unit="image", dynamic_ncols=True, disable=quiet):
        if isinstance(value, InputError):
            raise value
        yield value


class SampleLoader(DataLoader[Any]):
    """Yields batches of a data set, as lists of samples."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        *,
        batch_size: int = 1,
        sampler: Iterable[Any] | None = None,
        num_workers: int = 0,
        persistent: bool = False,
        pin: bool = False,
    ) -> None:
        """Load samples.

        Args:
            dataset: the samples.
            batch_size: samples in a batch.
            sampler: keys of the data set in order, or a `BatchPart`; by default the data set's own order.
            num_workers: processes that decode, each two batches ahead; 0 is this process.
            persistent: whether workers wait for another pass, until `close`; else they end with a pass.
            pin: whether tensors come in pinned memory, which needs CUDA.
        """
        order: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler}
        if isinstance(sampler, BatchPart):
            order = {"batch_sampler": sampler}
        super().__init__(
            ErrorsAsValues(dataset.__getitem__, len(dataset)),
            **order,
            num_workers=num_workers,
            collate_fn=list,  # every sample has its own size
            worker_init_fn=prepare_worker,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin,
            # torch would draw the workers' seeds from the generator that initial weights come from
            generator=torch.Generator(),
        )

    def __iter__(self) -> Any:
        """Yield batches, lists of samples. Raises the InputError that the data set raised, wherever it was raised."""
        for batch in start_pass(self):
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch

    def close(self) -> None:
        """End the workers that wait for another pass, if any; the next pass starts new ones."""
        iterator: Any = self._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._iterator = None
