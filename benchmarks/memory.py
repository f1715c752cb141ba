"""Counts the memory of inference and of training steps beside the released implementation.

    python -m benchmarks.memory [--json FILE]

Peak bytes of live tensors, weights included, in MB of 2**20 bytes, on a fake accelerator (see fake_accelerator.py), for
2448 x 2448 images, size_g and size_p 508: inference in mode 3, for all predictions, in sub-batches of 6 and of 1;
and a training step of each mode with 6 images, sub-batch 6. The released figures were counted in the same way, without
numpy arrays. With a GPU, `torch.cuda.max_memory_allocated` of the same work is shown, too.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.fake_accelerator import MB, megabytes
from benchmarks.fake_work import fake_inference, fake_training
from benchmarks.workload import N_CLASS, Inference, TrainingStep, random_sample
from models.glnet import GLNet
from utils.files import write_json
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES

SIDE = 2448
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
    sub_batch: int, precision: str, mode: int = 3, *, side: int = SIDE, size: int = 508, backbone: str = "resnet50"
) -> dict[str, float]:
    """Count the memory of segmenting one image.

    Args:
        sub_batch: patches at a time.
        precision: see `utils.precision.PRECISIONS`.
        mode: 1, 2 or 3.
        side: of the image, in pixels.
        size: size_g and size_p, in pixels.
        backbone: of the network.

    Returns:
        MB by `device` and `host`.
    """
    settings = Settings(size_p=size, sub_batch_size=sub_batch, precision=precision)
    with fake_inference(mode, settings, side, size_g=size, backbone=backbone) as (count, work, sample):
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
    """Count the memory of a second training step, for which the optimizer has its state.

    Args:
        mode: 1, 2 or 3.
        precision: see `utils.precision.PRECISIONS`.
        side: of the images, in pixels.
        batch: how many images there are.
        backbone: of the network.
        recomputed: whether activations are recomputed, as with `--checkpoint_activations`.

    Returns:
        MB by `device` and `host`.
    """
    settings = TrainingSettings(precision=precision, checkpoint_activations=recomputed)
    with fake_training(mode, settings, side, images=batch, backbone=backbone) as (count, step, samples):
        step(samples[:1])
        count.peak = dict(count.live)
        step(samples)
    return megabytes(count)


def count(key: str, precision: str) -> dict[str, float]:
    """Return the MB, by `device` and `host`, of the work called `key` in `RELEASED`."""
    kind, number = key[:-1], int(key[-1])
    return count_training(number, precision) if kind == "train_mode" else count_inference(number, precision)


def measure_on_gpu(key: str, precision: str) -> float:
    """Return the peak MB of CUDA's allocator for the work called `key` in `RELEASED`."""
    kind, number = key[:-1], int(key[-1])
    device, model = torch.device("cuda"), GLNet(N_CLASS)
    work: Callable[[], object]
    if kind == "train_mode":
        for name in STAGES[number].uses:
            getattr(model, name).to(device)
        step = TrainingStep(model, number, TrainingSettings(precision=precision, device=device))
        step([random_sample(SIDE)])
        work = partial(step, [random_sample(SIDE) for _ in range(BATCH)])
    else:
        settings = Settings(sub_batch_size=number, precision=precision, device=device)
        work = partial(Inference(model.eval(), 3, settings), random_sample(SIDE))
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / MB


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'MB of 2^20 bytes':16}{'':6}{'device':>8}{'host':>8}{'released':>10}{'less':>6}{'CUDA':>8}")
    for key, released in RELEASED.items():
        for precision in COUNTED_PRECISIONS:
            result = count(key, precision)
            found.setdefault(key, {})[precision] = result
            cuda = f"{measure_on_gpu(key, precision):8.0f}" if torch.cuda.is_available() else f"{'-':>8}"
            device, host = result["device"], result["host"]
            less = released / device
            print(f"{key:16}{precision:>6}{device:8.0f}{host:8.0f}{released:10}{less:6.1f}{cuda}", flush=True)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
