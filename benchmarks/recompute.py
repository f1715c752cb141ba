"""Compares training steps that recompute the encoders' activations with steps that keep them: memory and time.

    python -m benchmarks.recompute [--mode 1 2 3] [--precision fp32|bf16] [--steps N] [--no_time]

Memory is counted as by `python -m benchmarks.memory`, on the same work. Time is the processor time, of all threads
together, of steps on two 1000 x 1000 images with patches of 252, as in `python -m benchmarks.speed`: steps of both
kinds in turn, on one network, after one that warms up. The shortest step of each kind counts.
"""

import argparse
import time
import warnings

import torch

from benchmarks.memory import count_training
from benchmarks.workload import MODES, N_CLASS, TrainingStep, random_sample
from models.glnet import GLNet
from utils.memory import keep_freed_memory
from utils.settings import Settings

SIDE, SIZE, SUB_BATCH = 1000, 252, 5


def processor_seconds(mode: int, precision: str, steps: int) -> tuple[float, float]:
    """Return the processor seconds of a step that keeps activations, and of one that recomputes them.

    Args:
        mode: 1, 2 or 3.
        precision: see `utils.precision.PRECISIONS`.
        steps: of each kind that are timed.
    """
    torch.manual_seed(0)
    model, batch = GLNet(N_CLASS), [random_sample(SIDE, SIZE) for _ in range(2)]
    kinds = [
        TrainingStep(
            model,
            mode,
            Settings(size_p=SIZE, sub_batch_size=SUB_BATCH, precision=precision, checkpoint_activations=recomputed),
        )
        for recomputed in (False, True)
    ]
    kinds[0](batch[:1])
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for kind, seconds in zip(kinds, taken, strict=True):
            start = time.process_time()
            kind(batch)
            seconds.append(time.process_time() - start)
    return min(taken[0]), min(taken[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", type=int, nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed of each kind (default: %(default)s)")
    parser.add_argument("--no_time", action="store_true", help="memory alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    keep_freed_memory()
    print(f"{'mode':6}{'':>6}{'MB kept':>10}{'recomputed':>12}{'s kept':>9}{'recomputed':>12}{'ratio':>7}")
    for mode in options.mode:
        megabytes = [
            count_training(mode, options.precision, recomputed=recomputed)["device"] for recomputed in (False, True)
        ]
        line = f"{mode:<6}{options.precision:>6}{megabytes[0]:10.0f}{megabytes[1]:12.0f}"
        if not options.no_time:
            kept, recomputed = processor_seconds(mode, options.precision, options.steps)
            line += f"{kept:9.1f}{recomputed:12.1f}{recomputed / kept:7.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
