"""Times evaluation and training steps beside the released implementation.

    python -m benchmarks.speed [--json FILE] [--precision fp32|bf16] [--quick]
    python -m benchmarks.speed --breakdown

Times are in units, so that they carry over between machines: one unit is a 3x3 convolution 1024 -> 512 at 127 x 127,
batch 1, float32, without gradients, the mean of three calls after one that warms up, timed just before and after each
measurement and averaged. Evaluation: one 1000 x 1000 image, patch 508, sub-batch 6 (9 patches), all predictions of the
mode. Training: one step on two 1000 x 1000 images, patch 252, sub-batch 5 (25 patches each). Images and labels are
random and decoded already. The released figures were measured in the same way. Which size_g they trained with is not on
record; 252 is taken here, as a step of mode 1 at 508 would cost more in convolutions alone than was measured.

`--breakdown` prints instead where the time of the evaluation in modes 2 and 3 goes, by torch's profiler, and the ratio
of the whole time to that of convolutions and matrix products.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.breakdown import print_breakdown
from benchmarks.workload import MODES, N_CLASS, Inference, TrainingStep, random_sample
from dataset.base import Sample
from models.glnet import GLNet
from utils.files import write_json
from utils.memory import keep_freed_memory
from utils.settings import Settings

RELEASED = {"eval": {1: 1.2, 2: 26.8, 3: 27.7}, "train": {1: 2.5, 2: 110.0, 3: 78.0}}
"""Units of the released implementation, float32 on a CPU."""

SIDE = 1000


@torch.no_grad()
def unit(device: torch.device) -> float:
    """Return the seconds of one unit."""
    x, weight = torch.randn(1, 1024, 127, 127, device=device), torch.randn(512, 1024, 3, 3, device=device)
    return seconds(lambda: F.conv2d(x, weight, padding=1), device, calls=3)


def elapsed(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of `calls` calls of `work`, until the device has done them."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of `calls` calls of `work`, after one that warms up."""
    elapsed(work, device)
    return elapsed(work, device, calls) / calls


def evaluation(mode: int, precision: str, device: torch.device) -> tuple[Inference, Sample]:
    """Return the evaluation that is measured, and its image."""
    torch.manual_seed(0)
    model = GLNet(N_CLASS).eval()
    settings = Settings(size_p=508, sub_batch_size=6, device=device, precision=precision)
    return Inference(model, mode, settings), random_sample(SIDE)


def measure(kind: str, mode: int, precision: str, device: torch.device, calls: int) -> dict[str, float]:
    """Measure an evaluation or a training step.

    Args:
        kind: `eval` or `train`.
        mode: 1, 2 or 3.
        precision: see `utils.precision.PRECISIONS`.
        device: of the network.
        calls: that are timed.

    Returns:
        `units`, `seconds`, and `ratio`: the released implementation's units over these.
    """
    work: Callable[[], object]
    if kind == "eval":
        inference, sample = evaluation(mode, precision, device)
        work = partial(inference, sample)
    else:
        torch.manual_seed(0)
        model = GLNet(N_CLASS)
        settings = Settings(size_p=252, sub_batch_size=5, device=device, precision=precision)
        step = TrainingStep(model.to(device), mode, settings)
        work = partial(step, [random_sample(SIDE, size_g=252) for _ in range(2)])
    before = unit(device)
    taken = seconds(work, device, calls)
    units = taken / ((before + unit(device)) / 2)
    return {"units": units, "seconds": taken, "ratio": RELEASED[kind][mode] / units}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="only this one (default: both)")
    parser.add_argument("--quick", action="store_true", help="one call of each evaluation instead of three")
    parser.add_argument("--breakdown", action="store_true", help="where the time of the evaluation goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_freed_memory()
    precisions = (options.precision,) if options.precision else ("fp32", "bf16")
    if options.breakdown:
        for mode in (2, 3):
            for precision in precisions:
                print_breakdown(*evaluation(mode, precision, device), f"mode {mode} {precision}")
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':12}{'':6}{'units':>8}{'released':>10}{'faster':>8}{'seconds':>9}")
    for kind in ("eval", "train"):
        for mode in MODES:
            for precision in precisions:
                calls = 1 if options.quick or kind == "train" else 3
                result = measure(kind, mode, precision, device, calls)
                found.setdefault(f"{kind}_mode{mode}", {})[precision] = result
                print(
                    f"{kind + ' mode ' + str(mode):12}{precision:>6}{result['units']:8.1f}{RELEASED[kind][mode]:10.1f}"
                    f"{result['ratio']:8.1f}{result['seconds']:9.2f}",
                    flush=True,
                )
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
