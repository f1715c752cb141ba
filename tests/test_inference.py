"""The prepared form of the network against the plain one, and what it is made of."""

import pytest
import torch
import torch.nn.functional as F
from builders import build_predictor, build_sample, build_settings, forward_scores, segment_scores, shared_model

from imaging.sources import MemorySource
from models import resized
from models.folding import Placement
from models.prepared import PreparedGLNet
from models.pyramid import resize
from models.resized import add_resized_conv, joint_conv
from utils.canvas import ArgmaxSink
from utils.stages import STAGES

SIZES = [(100, 100), (97, 131), (64, 64), (30, 41), (50, 200), (65, 64)]
"""Images: square, odd, one patch, smaller than a patch, a strip, a patch and one row."""


@pytest.mark.parametrize("mode", (1, 2, 3))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_prepared_network_gives_the_plain_ones_scores_at_every_pixel_whatever_the_sub_batch(mode, size) -> None:
    model, sample = shared_model(), build_sample(size)
    plain = forward_scores(model, mode, sample, build_settings())
    for sub_batch_size in (4, 1) if size == SIZES[0] else (4,):
        found = segment_scores(model, mode, sample, build_settings(sub_batch_size=sub_batch_size))
        for name, scores in plain.items():
            assert (scores - found[name]).abs().max() <= 1e-4 * (scores.max() - scores.min()), name


def test_preparing_leaves_the_network_as_it_was() -> None:
    model = shared_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PreparedGLNet(model, STAGES[3], Placement(torch.device("cpu"), torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("asked", [("global",), ("local",), ("ensemble",)], ids=str)
def test_a_prediction_is_the_same_whatever_else_is_asked_for(asked) -> None:
    sample, predictor = build_sample((90, 70)), build_predictor(shared_model(), 3, build_settings())
    every, alone = ({name: ArgmaxSink((90, 70)) for name in names} for names in (STAGES[3].predictions, asked))
    for sinks in (every, alone):
        predictor.segment(MemorySource(sample.image), sinks, global_image=sample.global_image)
    for name in asked:
        assert torch.equal(every[name].ids, alone[name].ids)


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
    torch.manual_seed(0)
    x = torch.randn(2, 5, *source, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, kernel, kernel, dtype=torch.float64, requires_grad=True)
    y = x
    for size in chain:
        y = resize(y, size)
    long_way = F.conv2d(y, weight, padding=kernel // 2)
    base = torch.randn(long_way.shape, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(resized, "TRANSIENT", transient)
    short_way = add_resized_conv(base * 1, x, weight, chain)
    with torch.no_grad():  # where more is held at a time
        without_gradients = add_resized_conv(base * 1, x, weight, chain)
    long_way = base + long_way
    torch.testing.assert_close(short_way, long_way, rtol=0, atol=1e-10)
    torch.testing.assert_close(without_gradients, long_way, rtol=0, atol=1e-10)
    seed = torch.randn_like(long_way)
    for a, b in zip(*(torch.autograd.grad(y, (base, x, weight), seed) for y in (short_way, long_way)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_joint_conv_equals_the_convolution_of_the_concatenation() -> None:
    torch.manual_seed(0)
    target, sizes = (16, 18), [(16, 18), (4, 5), (16, 18), (4, 5), (8, 9)]
    maps = [torch.randn(2, 3, *size) for size in sizes]
    weight = torch.randn(6, 15, 3, 3)
    joined = torch.cat([resize(x, target) for x in maps], dim=1)
    bias = torch.randn(6)
    found = joint_conv(maps, [[target]] * 5, weight.split(3, dim=1), bias)
    torch.testing.assert_close(found, F.conv2d(joined, weight, bias, padding=1), rtol=0, atol=1e-4)
