"""What the hot path calls and holds: no loops of small products, no waiting for the device, memory within budgets."""

import pytest
import torch

from benchmarks.memory import count_inference, count_training, fake_inference, fake_training

pytest.importorskip("torch._subclasses.fake_tensor")

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.resized import add_resized_conv
from utils.settings import Settings, TrainingSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Accessing the data pointer")]


class CallCount(TorchDispatchMode):
    """Counts operator calls, by operator, unless it is paused."""

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
        for module in modules:
            module.register_forward_pre_hook(lambda *_: setattr(self, "paused", True))
            module.register_forward_hook(lambda *_: setattr(self, "paused", False))


def _is_free(func: Any) -> bool:
    """Return whether an operator only returns a view of its input, or memory without values."""
    if "empty" in func.overloadpacket.__name__:
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def count(kind: str, mode: int, side: int = 2448, backbone: str = "resnet50") -> tuple[Counter[str], int]:
    """The calls by operator, and the copies to the host, of segmenting an image, or of a training step with one."""
    calls = CallCount()
    if kind == "training":
        with fake_training(mode, TrainingSettings(), side, backbone=backbone) as (_, step, samples):
            calls.skip(branch.backbone for branch in (step.model.global_, step.model.local, step.model.refined))
            with patch.object(Tensor, "cpu", autospec=True, side_effect=Tensor.cpu) as copies, calls:
                step(samples)
    else:
        with fake_inference(mode, Settings(), side, backbone=backbone) as (_, inference, sample):
            calls.skip(inference.predictor.network.backbones.values())
            with patch.object(Tensor, "cpu", autospec=True, side_effect=Tensor.cpu) as copies, calls:
                inference(sample)
    return calls.calls, copies.call_count


def test_a_large_image_takes_few_calls_beside_the_encoders() -> None:
    """36 patches in 6 sub-batches. A loop of products over rows or columns would add tens of thousands of calls."""
    calls, copies = count("inference", 3, side=2448, backbone="resnet18")
    assert calls["bmm"] and calls["baddbmm_"]
    assert calls.total() < 3200  # 2946 when it was written
    assert copies == 12  # the scores of both predictions of each sub-batch


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("mode", [1, 2])
def test_the_host_never_waits_for_the_device(kind, mode) -> None:
    assert count(kind, mode, side=508, backbone="resnet18")[1] == 0


def test_training_may_follow_inference_at_the_same_sizes() -> None:
    x, weight = torch.randn(1, 3, 5, 7), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        before = add_resized_conv(torch.zeros(1, 4, 22, 23), x, weight, [(22, 23)])
    after = add_resized_conv(torch.zeros(1, 4, 22, 23), x, weight, [(22, 23)])
    after.sum().backward()
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("side", "sub_batch", "precision", "budget"),
    [(1000, 1, "fp32", 620), (1000, 1, "bf16", 310), (2448, 6, "fp32", 880), (2448, 6, "bf16", 440)],
)
def test_inference_stays_within_its_budget(side, sub_batch, precision, budget) -> None:
    """The budget is that of a 2448 x 2448 image; one patch after another takes as much for a smaller one."""
    found = count_inference(sub_batch, precision, side=side)
    assert 50 < found["device"] < budget  # the weights alone take more than the lower bound
    assert found["host"] < 400


@pytest.mark.parametrize(("mode", "images", "gigabytes"), [(1, 6, 3.4), (2, 1, 4.2), (3, 6, 4.7)])
def test_a_training_step_with_2448_images_stays_within_its_budget(mode, images, gigabytes) -> None:
    """Of six images; mode 2 computes one after the other, so that one is enough to count it."""
    found = count_training(mode, "fp32", batch=images)
    assert 0.5 < found["device"] / 1024 < gigabytes  # weights and moments take more than half


def test_only_the_kept_local_maps_of_stage_three_are_on_the_host() -> None:
    found = count_training(mode=3, precision="fp32", side=1000, batch=2)
    images = 2 * (4 * 1000**2 + 508**2 * 3 + 127**2)
    kept = 2 * (9 + 1) * 128 * sum(side**2 for side in (127, 64, 32, 16)) * 4  # ps2 of nine patches and of the image
    assert images < found["host"] * 2**20 < 1.1 * (kept + images + 2**20)
