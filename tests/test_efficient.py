"""What training computes against the definition, values and gradients: models/efficient.py, models/regulariser.py."""

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from builders import BACKBONE, build_sample, build_settings, learning_model, take_step
from torch import Tensor, nn

import helper
import train_deep_globe
from engine.terms import outside_autocast
from models import efficient
from models.efficient import branch_logits, conv_ps3, ensemble_global_half, shared_maps
from models.fpn import FPN
from models.glnet import GLNet
from models.pyramid import Pyramid, resize
from models.regulariser import conv_and_distance, last_conv
from models.sharing import crop_global
from training import run as training_run
from utils.precision import autocast
from utils.tiling import PatchGrid, map_size

CHANNELS = (16, 8, 6, 4)
SIDES = ((1, 1), (2, 3), (7, 5), (14, 11))
"""Of the maps, coarsest first; those of the other branch are larger or smaller, and at one level of the same size."""

OTHER_SIDES = ((2, 1), (2, 3), (3, 4), (20, 17))


OPTIONS = pytest.mark.parametrize(
    ("fused", "norm", "trains", "width"),
    [
        (fused, *norms, width)
        for fused, norms, width in product((False, True), (("none", True), ("batch", True), ("batch", False)), (4, 12))
    ],
)


def build_fpn(fused: bool, norm: str, trains: bool, width: int) -> FPN:
    """A pyramid in float64 whose maps are around 1 and whose norm layers are neither equal nor neutral."""
    torch.manual_seed(0)
    fpn = FPN(CHANNELS, fused, width, norm).double().train(trains)
    for name, tensor in fpn.state_dict().items():
        if tensor.dim() == 4:
            nn.init.normal_(tensor, 0, tensor[0].numel() ** -0.5)
        elif name.endswith(("var", "norm.weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, 0, 0.2)
    return fpn


def build_maps(sides: tuple[tuple[int, int], ...], width: int, samples: int = 2) -> Pyramid:
    """The maps of a pyramid, float64, which have gradients."""
    channels = CHANNELS, (width,) * 4, (width,) * 4, (width // 2,) * 4
    return Pyramid.of(
        [
            torch.randn(samples, k, *side, dtype=torch.float64).requires_grad_()
            for k, side in zip(of, sides, strict=True)
        ]
        for of in channels
    )


def gradients(outputs: list[Tensor], module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of a random sum of `outputs` in every weight and input that they depend on."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    named = dict(module.named_parameters()) | {f"input {k}": x for k, x in enumerate(inputs)}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def check_alike(
    module: nn.Module, inputs: list[Tensor], first: Callable[[nn.Module], list[Tensor]], second: Callable, rtol: float
) -> None:
    """Both functions of a module give the same values, gradients and statistics of norm layers."""
    modules = module, deepcopy(module)
    outputs = [compute(one) for compute, one in zip((first, second), modules, strict=True)]
    torch.testing.assert_close(*outputs, rtol=rtol, atol=rtol, check_dtype=False)
    wanted, found = (gradients(of, one, inputs) for of, one in zip(outputs, modules, strict=True))
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * max(1, gradient.abs().max()))
    torch.testing.assert_close(*(dict(one.named_buffers()) for one in modules))


@OPTIONS
def test_the_pyramid_of_training_is_that_of_the_definition(fused, norm, trains, width) -> None:
    fpn, own, other = build_fpn(fused, norm, trains, width), build_maps(SIDES, width), build_maps(OTHER_SIDES, width)
    given = other if fused else None
    inputs = [*own.c, *(x for levels in other.levels for x in levels if fused)]

    def maps(compute: Callable) -> Callable[[FPN], list[Tensor]]:
        def found(one: FPN) -> list[Tensor]:
            pyramid = compute(one, own.c, given)
            return [x for levels in pyramid.levels for x in levels] + [pyramid.ps3]

        return found

    check_alike(fpn, inputs, maps(lambda one, *arguments: one(*arguments)), maps(efficient.full_pyramid), 1e-9)


@OPTIONS
def test_convolutions_of_ps3_need_no_ps3(fused, norm, trains, width) -> None:
    """Sums over taps are in float32, and a fused pyramid with norm layers must be in evaluation mode."""
    fpn = build_fpn(fused, norm, trains and not (fused and norm == "batch"), width)
    own, other = build_maps(SIDES, width), build_maps(OTHER_SIDES, width) if fused else None
    weight, bias = torch.randn(3, fpn.ps3_channels, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    weight.requires_grad_()
    inputs = [*own.c, weight, *(() if other is None else other.ps2)]

    def defined(one: FPN) -> list[Tensor]:
        return [F.conv2d(one(own.c, other).ps3, weight, bias, padding=1)]

    def trained(one: FPN) -> list[Tensor]:
        return [conv_ps3(one, shared_maps(one, own.c, other).ps2, weight, bias, None if other is None else other.ps2)]

    check_alike(fpn, inputs, defined, trained, 1e-5)


def test_heads_and_ensemble_read_ps3_as_defined() -> None:
    torch.manual_seed(0)
    model = GLNet(3, BACKBONE, pyramid_width=4).double()
    for name, tensor in model.state_dict().items():
        if name.startswith("ensemble") or ".head." in name:
            nn.init.normal_(tensor)
    model.requires_grad_(True)
    grid = PatchGrid.cover((60, 50), 40, 10)
    everything = slice(0, len(grid))
    ps3, whole = (torch.randn(n, 8, 10, 10, dtype=torch.float64, requires_grad=True) for n in (len(grid), 1))

    def defined(one: GLNet) -> list[Tensor]:
        crop = crop_global(whole, grid, everything)
        distance = (ps3 - resize(crop, map_size(ps3)).detach()).square().mean()
        return [one.local.head(ps3), distance, one.refined.head(whole), one.ensemble(ps3, crop)]

    def trained(one: GLNet) -> list[Tensor]:
        logits, half, distance = efficient.read_local(one, ps3 * 1, crop_global(whole.detach(), grid, everything))
        logits_g, taps = efficient.read_refined(one, whole * 1)
        torch.testing.assert_close(taps, efficient.ensemble_taps(one.ensemble, whole))
        return [
            logits,
            distance,
            logits_g,
            half + ensemble_global_half(taps, grid, everything, map_size(half)),
        ]

    check_alike(model, [ps3, whole], defined, trained, 1e-5)


@pytest.mark.parametrize("name", ["global_", "local"])
def test_logits_of_a_branch_need_no_ps3(name) -> None:
    torch.manual_seed(0)
    branch = getattr(GLNet(3, BACKBONE, pyramid_width=4, pyramid_norm="batch"), name).eval()
    nn.init.normal_(branch.head.weight)
    image = torch.rand(2, 3, 64, 96)
    c = branch.backbone(image)
    other = branch.pyramid(c, Pyramid(c, *[[x[:, :w] for x in c] for w in (4, 4, 2)])) if name == "local" else None
    own = shared_maps(branch.pyramid, c, other)
    torch.testing.assert_close(branch_logits(branch, own, other), branch(image, other)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("crop_size", [(4, 5), (9, 8)])
def test_convolution_and_distance_have_the_values_and_gradients_of_the_two_apart(crop_size) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    crop = torch.randn(3, 6, *crop_size)
    kept = crop.clone()
    seed = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    apart = F.conv2d(x, weight, bias, padding=1), F.mse_loss(x, resize(crop.double(), (9, 8)))
    together = conv_and_distance(x, weight, bias, crop)
    torch.testing.assert_close(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1].float())
    wanted, found = (
        torch.autograd.grad((scores * seed).sum() + 0.15 * distance.double(), (x, weight, bias))
        for scores, distance in (apart, together)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the distance is counted in float32
    assert torch.equal(crop, kept)


def test_a_last_convolution_has_the_gradients_of_a_plain_one_and_its_map_can_be_read_no_more() -> None:
    torch.manual_seed(0)
    source = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((F.conv2d(source * 2, weight) * seed).sum(), (source, weight))
    x = source * 2
    found = torch.autograd.grad((last_conv(x, weight) * seed).sum(), (source, weight))
    torch.testing.assert_close(found, wanted)
    x = source * 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x.square().sum() + last_conv(x, weight).sum()).backward()


CPU = torch.device("cpu")


def test_the_folded_kernel_of_ps3_has_a_gradient_in_float32(monkeypatch) -> None:
    """In bfloat16 maps are rounded, but the product of kernels is not: its gradient follows from theirs exactly.

    The backward pass within autocast is computed outside of it.
    """
    torch.manual_seed(0)
    pyramid = FPN((64, 32, 16, 8), fused=True)
    weight, bias = torch.randn(3, pyramid.smooth.out_channels, 3, 3, requires_grad=True), torch.zeros(3)
    own = tuple(torch.randn(1, pyramid.smooth2[0].out_channels, k, k) for k in (2, 4, 8, 16))
    kernels, multiply = [], torch.tensordot

    def kept(*arguments, **more):
        kernels.append(multiply(*arguments, **more))
        kernels[0].retain_grad()
        return kernels[0]

    monkeypatch.setattr(torch, "tensordot", kept)
    with autocast(CPU, "bf16"):
        scores = conv_ps3(pyramid, own, weight, bias, own)
        loss = scores.float().square().sum()
        with outside_autocast(build_settings(precision="bf16")):
            loss.backward()
    (kernel,) = kernels
    taps = weight.detach().permute(2, 3, 0, 1).flatten(0, 2)
    expected = multiply(taps.t().contiguous(), kernel.grad, dims=1)
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


@pytest.mark.parametrize(("least", "code"), [(1.0, 0), (2.0**15, 1)])
def test_overflows_of_the_search_for_a_scale_are_not_bad(reference, tmp_path, monkeypatch, capsys, least, code) -> None:
    """Of a scale of 2^16: four in a row, of which three would be too many; below the least scale they count."""
    step, left = helper.TRAINING_STEPS[1], [4]

    def overflowing(model, *arguments):
        terms = step(model, *arguments)
        left[0] -= 1
        if left[0] >= 0:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return terms

    monkeypatch.setitem(helper.TRAINING_STEPS, 1, overflowing)
    monkeypatch.setattr(training_run, "LEAST_SCALE", least)
    monkeypatch.setattr(training_run, "MOST_BAD_STEPS", 3)
    folders = reference.folders.beside(tmp_path)
    assert train_deep_globe.main(folders.arguments(1, "--precision=fp16")) == code
    assert ("3 steps in a row" in capsys.readouterr().err) == (code == 1)
