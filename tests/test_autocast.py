"""Lower precisions in training: what is computed in float32 has a gradient in float32, and scales are searched."""

import math

import pytest
import torch
from builders import build_sample, build_settings, learning_model, take_step

import helper
import train_deep_globe
from engine.terms import outside_autocast
from models.efficient import conv_ps3
from models.fpn import FPN
from training import run as training_run
from utils.precision import autocast

CPU = torch.device("cpu")


def test_a_backward_pass_within_autocast_is_computed_outside_of_it() -> None:
    """The product of two kernels in float32 has the gradient of float32, not one that is rounded to 8 bits."""
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    (a @ b).square().sum().backward()
    expected, a.grad = a.grad, None
    with autocast(CPU, "bf16"):
        with torch.autocast("cpu", enabled=False):
            product = (a @ b).square().sum()
        with outside_autocast(build_settings(precision="bf16")):
            product.backward()
    assert torch.equal(a.grad, expected)


def test_the_folded_kernel_of_ps3_has_a_gradient_in_float32(monkeypatch) -> None:
    """In bfloat16 maps are rounded, but the product of kernels is not: its gradient follows from theirs exactly."""
    torch.manual_seed(0)
    pyramid = FPN((64, 32, 16, 8), fused=True)
    weight, bias = torch.randn(3, pyramid.smooth.out_channels, 3, 3, requires_grad=True), torch.zeros(3)
    own = tuple(torch.randn(1, pyramid.smooth2[0].out_channels, k, k) for k in (2, 4, 8, 16))
    kernels = []
    product = torch.tensordot

    def kept(*arguments, **more):
        found = product(*arguments, **more)
        found.retain_grad()
        kernels.append(found)
        return found

    monkeypatch.setattr(torch, "tensordot", kept)
    with autocast(CPU, "bf16"):
        scores = conv_ps3(pyramid, own, weight, bias, own)
        loss = scores.float().square().sum()
        with outside_autocast(build_settings(precision="bf16")):
            loss.backward()
    (kernel,) = kernels
    taps = weight.detach().permute(2, 3, 0, 1).flatten(0, 2)
    expected = product(taps.t().contiguous(), kernel.grad, dims=1)
    found = pyramid.smooth.weight.grad
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mode", [2, 3])
def test_a_step_in_bfloat16_has_the_direction_of_one_in_float32(mode) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        model = learning_model(mode)
        with autocast(CPU, precision):
            take_step(model, mode, [build_sample((80, 100))] * 2, precision=precision)
        found[precision] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found["bf16"].isfinite().all()
    likeness = torch.nn.functional.cosine_similarity(found["fp32"], found["bf16"], dim=0)
    assert likeness > 0.9, likeness


def overflow(monkeypatch: pytest.MonkeyPatch, steps: int, least: float) -> None:
    """Let the gradients of the first `steps` steps overflow in a run with a scale of 2^16."""
    step = helper.TRAINING_STEPS[1]
    left = [steps]

    def overflowing(model, *arguments):
        terms = step(model, *arguments)
        left[0] -= 1
        if left[0] >= 0:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return terms

    monkeypatch.setitem(helper.TRAINING_STEPS, 1, overflowing)
    monkeypatch.setattr(training_run, "LEAST_SCALE", least)


@pytest.mark.parametrize(("least", "code"), [(1.0, 0), (2.0**15, 1)])
def test_overflows_of_the_search_for_a_scale_are_not_bad(reference, tmp_path, monkeypatch, capsys, least, code) -> None:
    """Four in a row, of which three would be too many; below the least scale they count."""
    overflow(monkeypatch, 4, least)
    monkeypatch.setattr(training_run, "MOST_BAD_STEPS", 3)
    folders = reference.folders.beside(tmp_path)
    assert train_deep_globe.main(folders.arguments(1, "--precision=fp16")) == code
    assert ("3 steps in a row" in capsys.readouterr().err) == (code == 1)
