"""What training computes against the definition, values and gradients: models/efficient.py, models/regulariser.py."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from builders import BACKBONE
from torch import Tensor, nn

from models.efficient import (
    branch_logits,
    conv_ps3,
    ensemble_global_half,
    ensemble_taps,
    full_pyramid,
    read_local,
    read_refined,
    shared_maps,
)
from models.fpn import FPN
from models.glnet import GLNet
from models.pyramid import Pyramid, resize
from models.regulariser import conv_and_distance, last_conv
from models.sharing import crop_global
from utils.tiling import PatchGrid, map_size

CHANNELS = (16, 8, 6, 4)
SIDES = ((1, 1), (2, 3), (7, 5), (14, 11))
"""Of the maps, coarsest first; those of the other branch are larger or smaller, and at one level of the same size."""

OTHER_SIDES = ((2, 1), (2, 3), (3, 4), (20, 17))

OPTIONS = pytest.mark.parametrize(
    ("fused", "norm", "trains", "width"),
    [
        (fused, norm, trains, width)
        for fused in (False, True)
        for norm, trains in (("none", True), ("batch", True), ("batch", False))
        for width in (4, 12)
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
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=rtol)
    wanted, found = (gradients(of, one, inputs) for of, one in zip(outputs, modules, strict=True))
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * max(1, gradient.abs().max()))
    for name, buffer in modules[0].named_buffers():
        torch.testing.assert_close(modules[1].get_buffer(name), buffer)


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

    check_alike(fpn, inputs, maps(lambda one, *arguments: one(*arguments)), maps(full_pyramid), 1e-9)


@OPTIONS
def test_convolutions_of_ps3_need_no_ps3(fused, norm, trains, width) -> None:
    """Sums over taps are in float32, and a fused pyramid with norm layers must be in evaluation mode."""
    fpn = build_fpn(fused, norm, trains and not (fused and norm == "batch"), width)
    own, other = build_maps(SIDES, width), build_maps(OTHER_SIDES, width) if fused else None
    weight, bias = torch.randn(3, fpn.ps3_channels, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    weight.requires_grad_()
    inputs = [*own.c, weight, *(() if other is None else other.ps2)]
    check_alike(
        fpn,
        inputs,
        lambda one: [F.conv2d(one(own.c, other).ps3, weight, bias, padding=1)],
        lambda one: [
            conv_ps3(one, shared_maps(one, own.c, other).ps2, weight, bias, None if other is None else other.ps2)
        ],
        1e-5,
    )


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
        logits, half, distance = read_local(one, ps3 * 1, crop_global(whole.detach(), grid, everything))
        logits_g, taps = read_refined(one, whole * 1)
        torch.testing.assert_close(taps, ensemble_taps(one.ensemble, whole))
        return [logits, distance, logits_g, half + ensemble_global_half(taps, grid, everything, map_size(half))]

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
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the distance is counted in float32
    assert torch.equal(crop, kept)


def test_a_last_convolution_has_the_gradients_of_a_plain_one_and_its_map_can_be_read_no_more() -> None:
    torch.manual_seed(0)
    source = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((F.conv2d(source * 2, weight) * seed).sum(), (source, weight))
    x = source * 2
    found = torch.autograd.grad((last_conv(x, weight) * seed).sum(), (source, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    x = source * 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x.square().sum() + last_conv(x, weight).sum()).backward()
