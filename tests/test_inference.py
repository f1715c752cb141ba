"""The prepared network against the plain one; norm layers and `--start`; turns of images and their averages."""

import builders
import pytest
import torch
import torch.nn.functional as F
from builders import N_CLASS, build_header, build_model, build_predictor, build_sample, build_settings, shared_model
from pictures import random_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import local2global
from engine.predictor import Predictor
from evaluation.run import evaluate_images
from imaging.sources import MemorySource, TurnedSource
from models import checkpoint, resized
from models.efficient import branch_pyramid
from models.folding import Placement
from models.fpn import INITIAL_STD, SameConv
from models.glnet import GLNet
from models.header import Header
from models.prepared import GlobalMaps, PreparedGLNet
from models.pyramid import resize
from models.resized import add_resized_conv, joint_conv
from models.restore import build_network, restore
from models.sharing import crop_global
from utils.canvas import ArgmaxSink
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES
from utils.tiling import Box
from utils.turns import TURNS, Turn

SIZES = [(100, 100), (97, 131), (64, 64), (30, 41), (50, 200), (65, 64)]
"""Images: square, odd, one patch, smaller than a patch, a strip, a patch and one row."""

SIZE = (100, 70)
WIDTH = 12


def build(norm: str = "batch", width: int = WIDTH) -> GLNet:
    """A network in evaluation mode whose maps are around 1 and whose norm layers are neither equal nor neutral."""
    torch.manual_seed(0)
    model = GLNet(N_CLASS, builders.BACKBONE, pyramid_width=width, pyramid_norm=norm)
    for module in model.modules():
        if isinstance(module, SameConv):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("mode", (1, 2, 3))
@pytest.mark.parametrize("size", [*SIZES, "norm layers"], ids=str)
def test_prepared_network_gives_the_plain_ones_scores_at_every_pixel_whatever_the_sub_batch(mode, size) -> None:
    model, sample = (build(), build_sample(SIZE)) if size == "norm layers" else (shared_model(), build_sample(size))
    plain = builders.forward_scores(model, mode, sample, build_settings())
    for sub_batch_size in (4, 1) if size == SIZES[0] else (4,):
        found = builders.segment_scores(model, mode, sample, build_settings(sub_batch_size=sub_batch_size))
        for name, scores in plain.items():
            spread = scores.max() - scores.min()
            assert spread > 1e-2 and (scores - found[name]).abs().max() <= 1e-4 * spread, name


def test_preparing_changes_nothing_and_a_prediction_is_the_same_whatever_else_is_asked_for() -> None:
    model, sample = shared_model(), build_sample((90, 70))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PreparedGLNet(model, STAGES[3], Placement(torch.device("cpu"), torch.bfloat16))
    predictor = build_predictor(model, 3, build_settings())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def segment(*names: str) -> dict[str, ArgmaxSink]:
        sinks = {name: ArgmaxSink((90, 70)) for name in names}
        predictor.segment(MemorySource(sample.image), sinks, global_image=sample.global_image)
        return sinks

    every = segment(*STAGES[3].predictions)
    for name, sink in every.items():
        assert torch.equal(sink.ids, segment(name)[name].ids)


@pytest.mark.parametrize("transient", (1, 2**23), ids=("one sample at a time", "all together"))
@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize(
    ("source", "chain"),
    [
        ((5, 7), [(20, 31)]),
        ((3, 3), [(8, 8), (31, 30)]),
        ((13, 9), [(13, 9)]),
        ((20, 6), [(5, 40)]),
        ((1, 1), [(9, 4)]),
        ((40, 33), [(70, 90)]),
        ((35, 50), [(64, 50), (127, 128)]),
    ],
    ids=str,
)
def test_adding_a_resized_conv_equals_resizing_then_convolving(monkeypatch, transient, kernel, source, chain) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    x, weight = draw(2, 5, *source), draw(4, 5, kernel, kernel)
    y = x
    for size in chain:
        y = resize(y, size)
    long_way = F.conv2d(y, weight, padding=kernel // 2)
    base = draw(*long_way.shape)
    long_way = base + long_way
    monkeypatch.setattr(resized, "TRANSIENT", transient)
    short_way = add_resized_conv(base * 1, x, weight, chain)
    with torch.no_grad():  # where more is held at a time
        without_gradients = add_resized_conv(base * 1, x, weight, chain)
    for found in (short_way, without_gradients):
        torch.testing.assert_close(found, long_way, rtol=0, atol=1e-10)
    seed = torch.randn_like(long_way)
    for a, b in zip(*(torch.autograd.grad(y, (base, x, weight), seed) for y in (short_way, long_way)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_joint_conv_equals_the_convolution_of_the_concatenation() -> None:
    torch.manual_seed(0)
    target, sizes = (16, 18), [(16, 18), (4, 5), (16, 18), (4, 5), (8, 9)]
    maps, weight, bias = [torch.randn(2, 3, *size) for size in sizes], torch.randn(6, 15, 3, 3), torch.randn(6)
    joined = torch.cat([resize(x, target) for x in maps], dim=1)
    found = joint_conv(maps, [[target]] * 5, weight.split(3, dim=1), bias)
    torch.testing.assert_close(found, F.conv2d(joined, weight, bias, padding=1), rtol=0, atol=1e-4)


def test_norm_layers_cost_nothing_in_inference() -> None:
    """The prepared form has the same operations, and tensors of the same sizes, with norm layers and without."""

    def work(norm: str) -> tuple[int, list[torch.Size]]:
        sample, predictor = build_sample(SIZE), build_predictor(build(norm), 3, build_settings())
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
    torch.testing.assert_close(own.ps3.mean((0, 2, 3)), pyramid.smooth.norm.bias, rtol=1e-3, atol=1e-4)


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
def test_stages_2_and_3_start_as_the_global_head_and_branch(norm) -> None:
    model, sample, settings = build(norm), build_sample(SIZE), build_settings()
    model.continue_global()
    found, grid = builders.forward(model, 2, sample, settings)
    with torch.no_grad():
        _, maps = model.global_(settings.to_input(sample.global_image[None]))
        crop = crop_global(maps.ps3, grid, slice(0, len(grid)))
        crop = F.interpolate(crop, size=found.ensemble.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(found.ensemble, model.global_.head(crop), rtol=1e-4, atol=1e-5)
    model = build(norm)
    model.start_refined()
    model.continue_refined()
    expected, found = (builders.forward(model, mode, sample, settings)[0] for mode in (2, 3))
    assert expected.global_.abs().max() > 1e-2
    for one, other in ((found.global_, expected.global_), (found.ensemble, expected.ensemble)):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


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
        states.append(GLNet(N_CLASS, builders.BACKBONE, **given).state_dict())
    assert states[0].keys() == states[1].keys() and not any(".norm." in name for name in states[0])
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    layer = SameConv(64, 64, 3, "batch")
    assert layer.initial_std == pytest.approx((64 * 9) ** -0.5)
    assert layer.weight.std().item() == pytest.approx(layer.initial_std, rel=0.02)
    assert SameConv(64, 64, 3).weight.std().item() == pytest.approx(INITIAL_STD, rel=0.02)


def test_the_eight_turns_differ_turning_twice_is_one_of_them_and_undo_is_the_inverse() -> None:
    square, image, box = random_image((5, 5)), random_image((13, 22)), Box(3, 5, 6, 4)
    found = [turn.apply(square) for turn in TURNS["d4"]]
    for k, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[k + 1 :])
        for turn in TURNS["d4"]:
            assert any(torch.equal(turn.apply(one), other) for other in found)
    for turn in TURNS["d4"]:
        turned = turn.apply(image)
        assert torch.equal(turn.undo(turned), image)
        assert tuple(turned.shape[-2:]) == turn.size((13, 22))
        assert torch.equal(TurnedSource(MemorySource(image), turn).read(box), box.of(turned))
    assert TURNS["flip"] == (Turn(), Turn(mirrored=True))
    assert torch.equal(TURNS["flip"][1].apply(square), square.flip(-1))


class PointwiseNetwork:
    """Stage 1 of a network that knows each pixel alone, and so turns with the image."""

    def global_maps(self, image, *, logits, context, ensemble):
        cells = image[:, :, ::4, ::4] + image[:, :, 3::4, 3::4] + image[:, :, ::4, 3::4] + image[:, :, 3::4, ::4]
        return GlobalMaps(torch.cat([cells, 1.5 * cells - cells.mean()], dim=1), None, None)


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_a_network_that_turns_with_the_image_gives_the_same_with_and_without(turns):
    image = random_image((128, 128))
    found, expected = ArgmaxSink((128, 128)), ArgmaxSink((128, 128))
    for sink, chosen in ((found, turns), (expected, "none")):
        predictor = Predictor(PointwiseNetwork(), STAGES[1], build_settings(), 64, TURNS[chosen])
        predictor.segment(MemorySource(image), {"global": sink})
    assert (found.ids == expected.ids).float().mean() > 0.99  # shrinking rounds rows and columns in turn


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_evaluation_counts_what_averaging_predicts(turns):
    model, stage, sample = build_model(), STAGES[2], build_sample((70, 90))
    averaging, plain = (build_predictor(model, 2, build_settings(), TURNS[name]) for name in (turns, "none"))
    seen, straight = {}, {}
    for predictor, found in ((averaging, seen), (plain, straight)):
        metrics = StageMetrics(stage, model.n_class)
        evaluate_images(predictor, [[sample]], metrics, on_image=lambda s, ids, found=found: found.update(ids))
    sinks = {name: ArgmaxSink((70, 90)) for name in stage.predictions}
    averaging.segment(MemorySource(sample.image), sinks)
    for name, sink in sinks.items():
        assert (seen[name] == sink.ids).float().mean() > 0.999
        assert 0.1 < (seen[name] == straight[name]).float().mean() < 1


def test_without_turns_the_shrunk_image_at_hand_is_used():
    sample, predictor = build_sample((70, 90)), build_predictor(build_model(), 1, build_settings())
    found = []
    for shrunk in (None, sample.global_image, sample.global_image.flip(-1)):
        sink = ArgmaxSink((70, 90))
        predictor.segment(MemorySource(sample.image), {"global": sink}, global_image=shrunk)
        found.append(sink.ids)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
