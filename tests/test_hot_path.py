"""What the hot path calls: no loops of small products, no waiting for the device; and where its time goes."""

import pytest
import torch
import torch.nn.functional as F
from builders import build_sample, build_settings, shared_model

pytest.importorskip("torch._subclasses.fake_tensor")

from benchmarks.breakdown import PARTS, print_breakdown
from benchmarks.calls import count
from benchmarks.workload import Inference
from models.resized import add_resized_conv, resize, resize_and_add_taps, taps_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Accessing the data pointer")]


def test_a_large_image_takes_few_calls_beside_the_encoders() -> None:
    """36 patches in 6 sub-batches. A loop of products over rows or columns would add tens of thousands of calls."""
    calls, copies = count("inference", 3, side=2448, backbone="resnet18")
    assert calls["bmm"] and calls["baddbmm_"]
    assert calls.total() < 3200  # 2946 when it was written
    assert copies == 12  # the scores of both predictions of each sub-batch


@pytest.mark.parametrize(
    ("kind", "mode", "copies"), [("inference", 1, 0), ("inference", 2, 0), ("training", 1, 0), ("training", 2, 0)]
)
def test_the_host_never_waits_for_the_device(kind: str, mode: int, copies: int) -> None:
    assert count(kind, mode, side=508, backbone="resnet18")[1] == copies


def test_resized_taps_have_the_values_and_gradients_of_the_convolution() -> None:
    torch.manual_seed(0)
    size = (31, 40)
    x = torch.randn(2, 5, 26, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    found = resize_and_add_taps(F.conv2d(x, taps_of(weight)), [(26, 13), size])
    wanted = F.conv2d(resize(x, size), weight, padding=1)
    torch.testing.assert_close(found, wanted)
    seed = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, seed), torch.autograd.grad(wanted, x, seed))


def test_training_may_follow_inference_at_the_same_sizes() -> None:
    x, weight = torch.randn(1, 3, 5, 7), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        before = add_resized_conv(torch.zeros(1, 4, 22, 23), x, weight, [(22, 23)])
    after = add_resized_conv(torch.zeros(1, 4, 22, 23), x, weight, [(22, 23)])
    after.sum().backward()
    torch.testing.assert_close(after, before)


def test_the_breakdown_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = print_breakdown(Inference(shared_model(), 3, build_settings()), build_sample((100, 100)), "title")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["title", "encoder", *PARTS, "rest", "all"]
    assert ratio > 1
