"""Counts operator calls and waits for the device: python -m benchmarks.calls [--side PIXELS] [--backbone NAME]

Counts on fake tensors (see fake_accelerator.py), so that nothing is computed. A call is one call of an operator that
computes or copies; views and empty tensors are not counted, nor is what the encoders call. A batched product counts as
one call for each product in the batch if its result is not contiguous, because on CPUs torch then computes one after
the other. A copy to the host makes the host wait for the device. Operators whose result the host has to read
(`.item()`, `nonzero`, indices from a mask) raise an error on fake tensors, so that there is none where a count is
printed. The counting of labels (`utils/metrics.py`), which is not run on fake tensors, is left out.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_work import fake_inference, fake_training
from benchmarks.workload import MODES
from utils.settings import Settings, TrainingSettings


class CallCount(TorchDispatchMode):
    """Counts operator calls.

    Attributes:
        calls: by operator.
        paused: nothing is counted while it is set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and isinstance(result, Tensor) and not _is_free(func):
            name = func.overloadpacket.__name__
            loops = name in ("bmm", "baddbmm", "baddbmm_") and not result.is_contiguous()
            self.calls[name] += len(result) if loops else 1
        return result

    def skip(self, modules: Iterable[nn.Module]) -> None:
        """Leave out what `modules` call."""
        for module in modules:
            module.register_forward_pre_hook(lambda *_: setattr(self, "paused", True))
            module.register_forward_hook(lambda *_: setattr(self, "paused", False))


def _is_free(func: Any) -> bool:
    """Return whether an operator only returns a view of its input, or memory without values."""
    if "empty" in func.overloadpacket.__name__:
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def host_copies() -> Iterator[list[torch.Size]]:
    """A context within `fake_accelerator`; yields the shapes of the tensors that were copied to the host."""
    found: list[torch.Size] = []
    copied = Tensor.cpu

    def cpu(x: Tensor) -> Tensor:
        found.append(x.shape)
        return copied(x)

    with patch.object(Tensor, "cpu", cpu):
        yield found


def count(kind: str, mode: int, side: int = 2448, backbone: str = "resnet50") -> tuple[Counter[str], int]:
    """Count the calls of segmenting one image, all predictions of the mode, or of a training step with one image.

    Args:
        kind: `inference` or `training`.
        mode: 1, 2 or 3.
        side: of the image, in pixels; patches and the shrunk image have 508.
        backbone: of the network.

    Returns:
        The calls by operator, and the number of copies to the host.
    """
    calls = CallCount()
    if kind == "training":
        with fake_training(mode, TrainingSettings(), side, backbone=backbone) as (_, step, samples):
            calls.skip(branch.backbone for branch in (step.model.global_, step.model.local, step.model.refined))
            with host_copies() as copies, calls:
                step(samples)
    else:
        with fake_inference(mode, Settings(), side, backbone=backbone) as (_, inference, sample):
            calls.skip(inference.predictor.network.backbones.values())
            with host_copies() as copies, calls:
                inference(sample)
    return calls.calls, len(copies)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=2448, help="of the image, in pixels (default: %(default)s)")
    parser.add_argument("--backbone", default="resnet50", help="(default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    for kind in ("inference", "training"):
        for mode in MODES:
            calls, copies = count(kind, mode, options.side, options.backbone)
            most = ", ".join(f"{name} {times}" for name, times in calls.most_common(6))
            print(f"{kind} mode {mode}: {calls.total()} calls, {copies} copies to the host ({most})", flush=True)


if __name__ == "__main__":
    main()
