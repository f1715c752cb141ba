"""`--no-share_maps`: the local branch reads nothing of the global branch."""

import pytest
import torch
from builders import build_header, build_model, build_sample, build_settings, segment_scores, shared_model
from torch import nn

from engine import global2local, local2global
from models.glnet import GLNet
from models.header import Header
from utils.metrics import StageMetrics
from utils.stages import STAGES

SIZE = (100, 150)


def changed_global_branch() -> GLNet:
    """The shared network with another global branch."""
    model = build_model()
    with torch.no_grad():
        for parameter in model.global_.parameters():
            parameter.mul_(-0.7)
    return model


def gradients(model: GLNet, mode: int, share_maps: bool) -> dict[str, torch.Tensor]:
    """The gradients of one step of a stage."""
    step = {2: global2local, 3: local2global}[mode].training_step
    model.learn(STAGES[mode].trains)
    settings = build_settings(share_maps=share_maps, lamb_fmreg=0.0)
    step(model.train(), [build_sample(SIZE)], settings, StageMetrics(STAGES[mode], build_header(mode).classes))
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("mode", [2, 3])
def test_without_sharing_local_scores_do_not_depend_on_the_global_branch(mode: int) -> None:
    sample, other = build_sample(SIZE), changed_global_branch()
    alone, shared = build_settings(share_maps=False), build_settings()
    expected = segment_scores(shared_model(), mode, sample, alone)
    found = segment_scores(other, mode, sample, alone)
    for name in ("local", "ensemble"):  # in mode 3 the ensemble reads the refined branch, which is the same
        assert torch.equal(found[name], expected[name]), name
    plain = segment_scores(shared_model(), mode, sample, shared)["local"]
    assert (plain - expected["local"]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", [2, 3])
def test_without_sharing_gradients_do_not_depend_on_the_global_branch(mode: int) -> None:
    expected = gradients(build_model(), mode, share_maps=False)
    found = gradients(changed_global_branch(), mode, share_maps=False)
    assert expected and all(torch.equal(found[name], x) for name, x in expected.items())
    shared = gradients(build_model(), mode, share_maps=True)
    assert any(not torch.allclose(shared[name], x) for name, x in expected.items())


def test_training_and_inference_leave_out_the_same_maps() -> None:
    """The local scores are those of a network whose weights for the other branch's maps are 0."""
    sample, model = build_sample(SIZE), build_model()
    with torch.no_grad():
        for convolution in (*model.local.pyramid.lateral, *model.local.pyramid.smooth1, *model.local.pyramid.smooth2):
            convolution.weight[:, convolution.in_channels // 2 :] = 0
    found = segment_scores(shared_model(), 2, sample, build_settings(share_maps=False))["local"]
    assert isinstance(model.local.pyramid.smooth, nn.Conv2d)
    # the last convolution reads ps2 of both branches, level by level, own maps first
    with torch.no_grad():
        groups = model.local.pyramid.smooth.weight.unflatten(1, (4, 2, 128))
        groups[:, :, 1] = 0
    torch.testing.assert_close(segment_scores(model, 2, sample, build_settings())["local"], found, rtol=1e-4, atol=1e-4)


def test_the_header_records_it_and_older_files_share() -> None:
    header = build_header(2, share_maps=False)
    assert Header.from_record(header.to_record()) == header
    assert not header.settings().share_maps
    record = header.to_record()
    del record["share_maps"]
    assert Header.from_record(record).share_maps
    with pytest.raises(ValueError, match="share_maps"):
        Header.from_record({**record, "share_maps": "no"})
