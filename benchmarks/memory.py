"""Counts the memory of inference and of training steps beside the released implementation.

Peak bytes of live tensors, weights included, in MB of 2**20 bytes, on a fake accelerator (see fake_accelerator.py), for
2448 x 2448 images, size_g and size_p 508: inference in mode 3, for all predictions, in sub-batches of 6 and of 1;
and a training step of each mode with 6 images, sub-batch 6. With `--view SIDE` inference on an image that is shrunk as
far, to SIDE x SIDE pixels: what `--view_pixels` bounds. The released figures were counted in the same way, without
numpy arrays. With a GPU, `torch.cuda.max_memory_allocated` of the same work is shown, too.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.fake_accelerator import MB, fake_inference, fake_training, megabytes
from benchmarks.workload import N_CLASS, Inference, TrainingStep, random_sample
from models.glnet import GLNet
from utils.arguments import AddOption, whole
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES

SIDE = 2448
SIZE = 508
BATCH = 6
COUNTED_PRECISIONS = ("fp32", "bf16")
RELEASED = {
    "inference_sub6": 2118,
    "inference_sub1": 1043,
    "train_mode1": 3600,
    "train_mode2": 5700,
    "train_mode3": 6600,
}
"""MB on the accelerator, float32."""


def count_inference(
    sub_batch: int,
    precision: str,
    *,
    side: int = SIDE,
    size: int = SIZE,
    size_g: int | None = None,
    backbone: str = "resnet50",
) -> dict[str, float]:
    """Count the MB, by `device` and `host`, of segmenting an image of side x side pixels in mode 3.

    `sub_batch` patches are computed at once; `size` is size_p, and size_g if that is None.
    """
    settings = Settings(size_p=size, sub_batch_size=sub_batch, precision=precision)
    with fake_inference(3, settings, side, size_g=size_g or size, backbone=backbone) as (count, work, sample):
        count.peak = dict(count.live)
        work(sample)
    return megabytes(count)


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
        count.peak = dict(count.live)
        step(samples)
    return megabytes(count)


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
        kind, number = key[:-1], int(key[-1])
        if kind == "train_mode":
            found = count_training(number, precision, recomputed=recomputed)
        elif recomputed:
            continue
        else:
            found = count_inference(number, precision)
        cuda = measure_on_gpu(kind, number, precision, recomputed) if options.device.type == "cuda" else None
        released = RELEASED[key]
        yield {
            "work": key,
            "precision": precision,
            **found,
            "released": released,
            "less": released / found["device"],
            "cuda": cuda,
        }


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
        work = partial(Inference(model.eval(), 3, own), random_sample(SIDE))
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / MB
