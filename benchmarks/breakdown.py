"""Where the time of an evaluation goes, by torch's profiler: `python -m benchmarks.speed --breakdown`.

Parts of the work are named from here, so that the code that is measured has no ranges of its own. Each operator counts
to the innermost part that called it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.workload import Inference
from dataset.base import Sample
from models import prepared
from models.sharing import Mosaic
from utils.canvas import ArgmaxSink, ScoreCanvas
from utils.settings import Settings

PARTS: dict[str, list[tuple[Any, str]]] = {
    "pyramid": [(prepared.PreparedPyramid, "__call__")],
    "tail": [(prepared.FoldedTail, "__call__"), (prepared, "add_taps")],
    "sharing": [
        (prepared, "crop_pyramid"),
        (prepared.PreparedPyramid, "project"),
        (prepared.PreparedGLNet, "ensemble_logits"),
    ],
    "merging": [(Mosaic, "add"), (Mosaic, "merged")],
    "canvas": [(ScoreCanvas, "add"), (ArgmaxSink, "__call__")],
    "copies": [(Settings, "to_input"), (Settings, "to_device")],
}
"""The functions of each part, with the place where their name is read. The encoder is one more part."""

ARITHMETIC = ("conv", "mm", "gemm")
"""Parts of the names of convolutions and matrix products in the profile."""


@contextmanager
def named_parts(work: Inference) -> Iterator[None]:
    """A context in which the profiler sees the parts of `work` as ranges."""
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, _named(part, getattr(owner, name))))
        for backbone in work.predictor.network.backbones.values():
            stack.enter_context(patch.object(backbone, "forward", _named("encoder", backbone.forward)))
        yield


def _named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(f"part: {part}"):
            return function(*arguments, **options)

    return call


def profiled_parts(work: Inference, sample: Sample) -> tuple[Counter[str], Counter[str]]:
    """Return the seconds of each part of one evaluation, and those of its convolutions and matrix products.

    On CUDA they are the seconds of the kernels.
    """
    cuda = work.settings.device.type == "cuda"
    work(sample)  # warms up
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with named_parts(work), profile(activities=activities) as recorded:
        work(sample)
        if cuda:
            torch.cuda.synchronize()
    total, arithmetic = Counter[str](), Counter[str]()
    for event in recorded.events():
        taken = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        part = _part_of(event)
        total[part] += taken
        if any(text in event.name for text in ARITHMETIC):
            arithmetic[part] += taken
    return total, arithmetic


def _part_of(event: Any) -> str:
    """Return the innermost part that an event of the profiler is in."""
    while event is not None and not event.name.startswith("part: "):
        event = event.cpu_parent
    return "rest" if event is None else event.name.removeprefix("part: ")


def print_breakdown(work: Inference, sample: Sample, title: str) -> float:
    """Print a line for each part; return the ratio of the whole time to that of convolutions and matrix products."""
    total, arithmetic = profiled_parts(work, sample)
    whole, ratio = total.total(), total.total() / arithmetic.total()
    print(f"{title:16}{'seconds':>9}{'share':>8}{'convolutions and products':>27}{'other':>9}")
    for part in ("encoder", *PARTS, "rest"):
        of_part, of_arithmetic = total[part], arithmetic[part]
        print(
            f"{part:16}{of_part:9.2f}{of_part / whole:8.1%}{of_arithmetic:27.2f}{of_part - of_arithmetic:9.2f}",
            flush=True,
        )
    print(f"{'all':16}{whole:9.2f}{1:8.1%}{arithmetic.total():27.2f}{whole - arithmetic.total():9.2f}")
    print(f"time / time of convolutions and products: {ratio:.2f}\n", flush=True)
    return ratio
