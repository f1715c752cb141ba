"""Counts the bytes of live tensors on device and host, without a device and without computing anything.

Tensors are torch's fake ones: shapes and storages without contents. All of them are CPU tensors to torch. A tensor
counts as being on the device unless it comes from `Tensor.cpu()` or is made within `host_tensors`; `Tensor.to` moves it
to the device. Memory that a library allocates inside an operation (cuDNN's workspaces) is not counted.
"""

import functools
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workload import Inference, TrainingStep, build_shapes, random_sample
from dataset.base import Sample
from models import resized
from utils.memory import MB
from utils.metrics import StageMetrics
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of live storages.

    Attributes:
        live: bytes now, by `device` and `host`.
        peak: the largest number of bytes so far, by `device` and `host`.
        place: of each live storage, by its address.
        new: the place of new storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = {"device": 0, "host": 0}
        self.peak = dict(self.live)
        self.place: dict[int, str] = {}
        self.new = "device"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add_storage(leaf)
        return result

    def add_storage(self, x: Tensor) -> None:
        """Count the storage of `x`, if it is new, until it is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.place:
            return
        self.place[key] = self.new
        self._add(self.new, storage.nbytes())
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def move(self, x: Tensor, place: str) -> None:
        """Count the storage of `x` as being at `place`."""
        storage = x.untyped_storage()
        self._add(self.place[storage._cdata], -storage.nbytes())
        self.place[storage._cdata] = place
        self._add(place, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._add(self.place.pop(key), -size)

    def _add(self, place: str, size: int) -> None:
        self.live[place] += size
        self.peak[place] = max(self.peak[place], self.live[place])


@contextmanager
def fake_accelerator() -> Iterator[MemoryCount]:
    """A context in which all tensors are fake; yields their count."""
    count = MemoryCount()
    original = Tensor.to

    def copied(x: Tensor, place: str) -> Tensor:
        count.new, before = place, count.new
        try:
            return x.clone()
        finally:
            count.new = before

    def to(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if count.place.get(x.untyped_storage()._cdata) == "host":
            x = copied(x, "device")
        return original(x, *arguments, **options)

    def cpu(x: Tensor) -> Tensor:
        return copied(x, "host")

    # the cache of real tensors must not get fake ones, nor give real ones
    cache = patch.object(resized, "axis_bands", functools.cache(resized.axis_bands.__wrapped__))
    with FakeTensorMode(), count, patch.object(Tensor, "cpu", cpu), patch.object(Tensor, "to", to), cache:
        yield count


@contextmanager
def host_tensors(count: MemoryCount) -> Iterator[None]:
    """A context in which new tensors are counted as being on the host."""
    count.new, before = "host", count.new
    try:
        yield
    finally:
        count.new = before


def allocate(model: nn.Module) -> None:
    """Replace the tensors of a network on torch's meta device by new ones, fake ones within `fake_accelerator`.

    A network is built on the meta device first, because some constructors of timm read numbers from tensors, which fake
    ones lack.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(new, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def put_on_device(count: MemoryCount, modules: Iterable[nn.Module]) -> None:
    """Move the parameters and buffers of `modules` to the device."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            count.move(tensor, "device")


def megabytes(count: MemoryCount) -> dict[str, float]:
    """Return the peaks so far, in MB of 2**20 bytes."""
    return {place: size / MB for place, size in count.peak.items()}


@contextmanager
def fake_inference(
    mode: int, settings: Settings, side: int, *, size_g: int = 508, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, Inference, Sample]]:
    """A context in which all tensors are fake; yields their count, an inference, and an image on the host.

    The image has side x side pixels, and size_g x size_g shrunk.
    """
    model = build_shapes(backbone).eval()
    with fake_accelerator() as count:
        with host_tensors(count):
            allocate(model)
            sample = random_sample(side, size_g)
        work = Inference(model, mode, settings)
        del model  # the prepared network is a copy
        gc.collect()
        yield count, work, sample


@contextmanager
def fake_training(
    mode: int, settings: TrainingSettings, side: int, *, images: int = 1, size_g: int = 508, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, TrainingStep, list[Sample]]]:
    """A context in which all tensors are fake; yields their count, a training step, and its images on the host.

    Sides are as of `fake_inference`. Predictions, whose values fake tensors lack, are not counted.
    """
    model = build_shapes(backbone)
    with fake_accelerator() as count, patch.object(StageMetrics, "update", lambda *_: None):
        with host_tensors(count):
            allocate(model)
            samples = [random_sample(side, size_g) for _ in range(images)]
        put_on_device(count, [getattr(model, name) for name in STAGES[mode].uses])
        yield count, TrainingStep(model, mode, settings), samples
