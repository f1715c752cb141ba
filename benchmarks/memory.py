"""Counts the memory of inference and of training steps beside the released implementation.

Peak bytes of live tensors, weights included, in MB of 2**20 bytes, on a fake accelerator (see `fake_accelerator`), for
2448 x 2448 images, size_g and size_p 508: inference in mode 3, for all predictions, in sub-batches of 6 and of 1;
and a training step of each mode with 6 images, sub-batch 6. With `--view SIDE` inference on an image that is shrunk as
far, to SIDE x SIDE pixels: what `--view_pixels` bounds. The released figures were counted in the same way, without
numpy arrays. With a GPU, `torch.cuda.max_memory_allocated` of the same work is shown, too.
"""

import argparse
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed import N_CLASS, Inference, TrainingStep, prepared, random_sample
from dataset.base import Sample
from models import resized
from models.glnet import GLNet
from utils.arguments import AddOption, whole
from utils.memory import MB
from utils.metrics import StageMetrics
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES

SIDE = 2448
SIZE = 508
BATCH = 6
COUNTED_PRECISIONS = ("fp32", "bf16")
RELEASED = {
    **{"inference_sub6": 2118, "inference_sub1": 1043},
    **{"train_mode1": 3600, "train_mode2": 5700, "train_mode3": 6600},
}
"""MB on the accelerator, float32."""


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
        self.place: dict[int, str] = {}
        self.new = "device"
        self.restart()

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.peak = dict(self.live)

    def megabytes(self) -> dict[str, float]:
        """Return the peaks so far, in MB of 2**20 bytes."""
        return {place: size / MB for place, size in self.peak.items()}

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
        if key not in self.place:
            self.place[key] = self.new
            self._add(self.new, storage.nbytes())
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    @contextmanager
    def placing(self, place: str) -> Iterator[None]:
        """A context in which new tensors are counted as being at `place`."""
        self.new, before = place, self.new
        try:
            yield
        finally:
            self.new = before

    def put_on_device(self, modules: Iterable[nn.Module]) -> None:
        """Count the parameters and buffers of `modules` as being on the device."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                self._add(self.place[storage._cdata], -storage.nbytes())
                self.place[storage._cdata] = "device"
                self._add("device", storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._add(self.place.pop(key), -size)

    def _add(self, place: str, size: int) -> None:
        self.live[place] += size
        self.peak[place] = max(self.peak[place], self.live[place])


@contextmanager
def fake_accelerator() -> Iterator[MemoryCount]:
    """A context in which all tensors are torch's fake ones, shapes and storages without contents; yields their count.

    All are CPU tensors to torch. A tensor counts as being on the device unless it comes from `Tensor.cpu()` or is made
    within `placing("host")`; `Tensor.to` moves it to the device. Memory that a library allocates inside an operation
    (cuDNN's workspaces) is not counted.
    """
    count = MemoryCount()
    original = Tensor.to

    def copied(x: Tensor, place: str) -> Tensor:
        with count.placing(place):
            return x.clone()

    def to(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if count.place.get(x.untyped_storage()._cdata) == "host":
            x = copied(x, "device")
        return original(x, *arguments, **options)

    cpu = patch.object(Tensor, "cpu", lambda x: copied(x, "host"))
    # the cache of real tensors must not get fake ones, nor give real ones
    cache = patch.object(resized, "axis_bands", functools.cache(resized.axis_bands.__wrapped__))
    with FakeTensorMode(), count, cpu, patch.object(Tensor, "to", to), cache:
        yield count


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


def build_shapes(backbone: str) -> GLNet:
    """Return a network on torch's meta device: shapes without weights."""
    with torch.device("meta"):
        return GLNet(N_CLASS, backbone)


@contextmanager
def fake_inference(
    mode: int, settings: Settings, side: int, *, size_g: int = SIZE, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, Inference, Sample]]:
    """A context in which all tensors are fake; yields their count, an inference, and an image on the host.

    The image has side x side pixels, and size_g x size_g shrunk.
    """
    model = build_shapes(backbone).eval()
    with fake_accelerator() as count:
        with count.placing("host"):
            allocate(model)
            sample = random_sample(side, size_g)
        work = Inference(prepared(model, mode, settings))
        del model  # the prepared network is a copy
        gc.collect()
        yield count, work, sample


@contextmanager
def fake_training(
    mode: int, settings: TrainingSettings, side: int, *, images: int = 1, size_g: int = SIZE, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, TrainingStep, list[Sample]]]:
    """A context in which all tensors are fake; yields their count, a training step, and its images on the host.

    Sides are as of `fake_inference`. Predictions, whose values fake tensors lack, are not counted.
    """
    model = build_shapes(backbone)
    with fake_accelerator() as count, patch.object(StageMetrics, "update", lambda *_: None):
        with count.placing("host"):
            allocate(model)
            samples = [random_sample(side, size_g) for _ in range(images)]
        count.put_on_device(getattr(model, name) for name in STAGES[mode].uses)
        yield count, TrainingStep(model, mode, settings), samples


def count_inference(
    sub_batch: int, precision: str, *, side: int = SIDE, size: int = SIZE, size_g: int = 0, backbone: str = "resnet50"
) -> dict[str, float]:
    """Count the MB, by `device` and `host`, of segmenting an image of side x side pixels in mode 3.

    `sub_batch` patches are computed at once; `size` is size_p, and size_g if that is 0.
    """
    settings = Settings(size_p=size, sub_batch_size=sub_batch, precision=precision)
    with fake_inference(3, settings, side, size_g=size_g or size, backbone=backbone) as (count, work, sample):
        count.restart()
        work(sample)
    return count.megabytes()


def count_training(
    mode: int,
    precision: str,
    side: int = SIDE,
    batch: int = BATCH,
    backbone: str = "resnet50",
    *,
    recomputed: bool = False,
) -> dict[str, float]:
    """Count the MB, by `device` and `host`, of a second training step, for which the optimizer has its state.

    The images have side x side pixels; `recomputed` is as `--checkpoint_activations`.
    """
    settings = TrainingSettings(precision=precision, checkpoint_activations=recomputed)
    with fake_training(mode, settings, side, images=batch, backbone=backbone) as (count, step, samples):
        step(samples[:1])
        count.restart()
        step(samples)
    return count.megabytes()


def measure_on_gpu(kind: str, number: int, precision: str, recomputed: bool) -> float:
    """Return the peak MB of CUDA's allocator for the work `kind` and `number` in `RELEASED`."""
    device, model = torch.device("cuda"), GLNet(N_CLASS)
    work: Callable[[], object]
    if kind == "train_mode":
        for name in STAGES[number].uses:
            getattr(model, name).to(device)
        settings = TrainingSettings(precision=precision, device=device, checkpoint_activations=recomputed)
        step = TrainingStep(model, number, settings)
        step([random_sample(SIDE)])
        work = partial(step, [random_sample(SIDE) for _ in range(BATCH)])
    else:
        own = Settings(sub_batch_size=number, precision=precision, device=device)
        work = partial(Inference(prepared(model.eval(), 3, own)), random_sample(SIDE))
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / MB


COLUMNS = {
    "work": "MB of 2^20 bytes",
    "precision": "precision",
    "device": "device",
    "host": "host",
    "released": "released",
    "less": "times less",
    "cuda": "CUDA",
}


def add_options(add: AddOption) -> None:
    add("--precisions", nargs="+", choices=COUNTED_PRECISIONS, default=COUNTED_PRECISIONS, help="(default: both)")
    add("--checkpoint_activations", action="store_true", help="training steps that recompute activations")
    add("--view", type=whole(64), metavar="SIDE", help="inference alone, on a larger image shrunk to this side")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each work in `RELEASED` and precision."""
    recomputed = options.checkpoint_activations
    if options.view:
        side = round(SIDE / SIZE * options.view)
        for number, precision in product((6, 1), options.precisions):
            found = count_inference(number, precision, side=side, size_g=options.view)
            yield {"work": f"inference_sub{number} of {side} x {side}", "precision": precision, **found}
        return
    for key, precision in product(RELEASED, options.precisions):
        kind, number, released = key[:-1], int(key[-1]), RELEASED[key]
        if kind == "train_mode":
            found = count_training(number, precision, recomputed=recomputed)
        elif recomputed:
            continue
        else:
            found = count_inference(number, precision)
        row = {"work": key, "precision": precision, **found, "released": released, "less": released / found["device"]}
        if options.device.type == "cuda":
            row["cuda"] = measure_on_gpu(kind, number, precision, recomputed)
        yield row
