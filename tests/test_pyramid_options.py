"""`--pyramid_norm`, `--pyramid_width` and `--start`: every form of the network agrees on them."""

import pytest
import torch
from builders import (
    BACKBONE,
    N_CLASS,
    build_header,
    build_predictor,
    build_sample,
    build_settings,
    forward,
    forward_scores,
    segment_scores,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import local2global
from imaging.sources import MemorySource
from models import checkpoint
from models.efficient import branch_pyramid
from models.fpn import INITIAL_STD, SameConv
from models.glnet import GLNet
from models.header import Header
from models.restore import build_network, restore
from models.sharing import crop_global
from utils.canvas import ArgmaxSink
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES

SIZE = (100, 70)
WIDTH = 12


def build(norm: str = "batch", width: int = WIDTH, seed: int = 0) -> GLNet:
    """A network in evaluation mode whose maps are around 1 and whose norm layers are neither equal nor neutral."""
    torch.manual_seed(seed)
    model = GLNet(N_CLASS, BACKBONE, pyramid_width=width, pyramid_norm=norm)
    for module in model.modules():
        if isinstance(module, SameConv):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_the_prepared_network_gives_the_plain_ones_scores(mode) -> None:
    model, sample = build(), build_sample(SIZE)
    plain, found = (give(model, mode, sample, build_settings()) for give in (forward_scores, segment_scores))
    for name, scores in plain.items():
        spread = scores.max() - scores.min()
        assert spread > 1e-2 and (scores - found[name]).abs().max() <= 1e-4 * spread, name


def test_norm_layers_cost_nothing_in_inference() -> None:
    """The prepared form has the same operations, and tensors of the same sizes, with norm layers and without."""

    def work(norm: str) -> tuple[int, list[torch.Size]]:
        model, sample = build(norm), build_sample(SIZE)
        predictor = build_predictor(model, 3, build_settings())
        with FlopCounterMode(display=False) as operations:
            sinks = {name: ArgmaxSink(SIZE) for name in STAGES[3].predictions}
            predictor.segment(MemorySource(sample.image), sinks, global_image=sample.global_image)
        pyramids = predictor.network.pyramids.values()
        kept = [x.shape for pyramid in pyramids for depth in pyramid.own for pair in depth for x in pair]
        return operations.get_total_flops(), kept

    assert work("batch") == work("none")


def test_a_norm_layer_is_what_torch_computes_after_each_convolution() -> None:
    model, sample = build(), build_sample((64, 64))
    pyramid = model.local.pyramid
    layers = [*pyramid.lateral, *pyramid.smooth1, *pyramid.smooth2, pyramid.smooth]
    assert all(isinstance(layer.norm, nn.BatchNorm2d) for layer in layers)
    pyramid.train()
    x = build_settings().to_input(sample.global_image[None])
    own = branch_pyramid(model.local, x, model.global_(x)[1])
    for level in own.ps2:  # each channel has the mean and the deviation of its norm layer
        assert level.mean((0, 2, 3)).abs().max() < 1
    mean = own.ps3.mean((0, 2, 3))
    torch.testing.assert_close(mean, pyramid.smooth.norm.bias, rtol=1e-3, atol=1e-4)


def test_stage_3_trains_with_norm_layers_and_changes_the_refined_branch_alone() -> None:
    model = build()
    model.learn(STAGES[3].trains)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    metrics = StageMetrics(STAGES[3], build_header(3).classes)
    local2global.training_step(model, [build_sample(SIZE), build_sample((70, 70))], build_settings(), metrics)
    changed = {name.split(".")[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"refined"}  # statistics of its norm layers
    learned = {name.split(".")[0] for name, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    assert learned == {"refined", "ensemble"}


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_stage_2_starts_as_the_global_head(norm) -> None:
    model, sample = build(norm), build_sample(SIZE)
    model.continue_global()
    found, grid = forward(model, 2, sample, build_settings())
    with torch.no_grad():
        _, maps = model.global_(build_settings().to_input(sample.global_image[None]))
        crop = crop_global(maps.ps3, grid, slice(0, len(grid)))
        size = found.ensemble.shape[-2:]
        expected = model.global_.head(nn.functional.interpolate(crop, size=size, mode="bilinear", align_corners=False))
    torch.testing.assert_close(found.ensemble, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_stage_3_starts_as_the_global_branch(norm) -> None:
    model, sample = build(norm), build_sample(SIZE)
    model.start_refined()
    model.continue_refined()
    expected, found = (forward(model, mode, sample, build_settings())[0] for mode in (2, 3))
    scale = expected.global_.abs().max()
    assert scale > 1e-2
    assert (found.global_ - expected.global_).abs().max() <= 1e-4 * scale
    assert (found.ensemble - expected.ensemble).abs().max() <= 1e-4 * expected.ensemble.abs().max()


def test_a_checkpoint_records_the_pyramid_and_the_released_form_refuses_it(tmp_path) -> None:
    header = build_header(2, pyramid_width=WIDTH, pyramid_norm="batch")
    assert Header.from_record(header.to_record()) == header
    model = build_network(header)
    checkpoint.save(tmp_path / "a.pth", model, header)
    file = checkpoint.read(tmp_path / "a.pth")
    found, expected = restore(file, header).state_dict(), model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in file.tensors)
    with pytest.raises(InputError, match=r"a.pth was made with --pyramid_width 12 --pyramid_norm batch"):
        checkpoint.export(tmp_path / "a.pth", tmp_path / "released.pth")


def test_the_defaults_are_the_released_network() -> None:
    """Weights start by fan-in with a norm layer, and as released without."""
    states = []
    for given in ({}, {"pyramid_width": 256, "pyramid_norm": "none"}):
        torch.manual_seed(0)
        states.append(GLNet(N_CLASS, BACKBONE, **given).state_dict())
    assert states[0].keys() == states[1].keys() and not any(".norm." in name for name in states[0])
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    layer = SameConv(64, 64, 3, "batch")
    assert layer.weight.std().item() == pytest.approx(layer.initial_std, rel=0.02)
    assert layer.initial_std == pytest.approx((64 * 9) ** -0.5)
    assert SameConv(64, 64, 3).weight.std().item() == pytest.approx(INITIAL_STD, rel=0.02)
