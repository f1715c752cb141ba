"""`--share`: whose global maps the local branch reads, its own image's, none, another image's, a grey one's."""

import builders
import pytest
import torch
from builders import (
    SIDE,
    build_header,
    build_model,
    build_predictor,
    build_sample,
    build_settings,
    segment_scores,
    shared_model,
    take_step,
)
from runs import generate
from torch import Tensor, nn

from dataset.base import GREY
from dataset.registry import describe
from evaluation.run import evaluate_images
from models.glnet import GLNet
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES

SIZE = (100, 150)


def changed_global_branch() -> GLNet:
    model = build_model()
    with torch.no_grad():
        for parameter in model.global_.parameters():
            parameter.mul_(-0.7)
    return model


def gradients(model: GLNet, mode: int, share_maps: bool) -> dict[str, torch.Tensor]:
    model.learn(STAGES[mode].trains)
    take_step(model.train(), mode, [build_sample(SIZE)], share_maps=share_maps, lamb_fmreg=0.0)
    return builders.gradients(model)


@pytest.mark.parametrize("mode", [2, 3])
def test_without_sharing_local_scores_do_not_depend_on_the_global_branch(mode) -> None:
    sample, other = build_sample(SIZE), changed_global_branch()
    alone, shared = build_settings(share_maps=False), build_settings()
    expected = segment_scores(shared_model(), mode, sample, alone)
    found = segment_scores(other, mode, sample, alone)
    for name in ("local", "ensemble"):  # in mode 3 the ensemble reads the refined branch, which is the same
        assert torch.equal(found[name], expected[name]), name
    plain = segment_scores(shared_model(), mode, sample, shared)["local"]
    assert (plain - expected["local"]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", [2, 3])
def test_without_sharing_gradients_do_not_depend_on_the_global_branch(mode) -> None:
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


@pytest.mark.parametrize("mode", [2, 3])
def test_another_context_changes_what_reads_local_maps_and_nothing_else(mode) -> None:
    """With its own shrunk image as context the scores are the same; with another one the global ones of mode 2 are."""
    sample, other = build_sample(SIZE), build_sample(SIZE, seed=1)

    def scores(context: Tensor | None) -> dict[str, Tensor]:
        return segment_scores(shared_model(), mode, sample, build_settings(), shared=context)

    own, same, changed = scores(None), scores(sample.global_image), scores(other.global_image)
    for name, values in own.items():
        torch.testing.assert_close(same[name], values, rtol=1e-4, atol=1e-4)
        if (mode, name) != (2, "global"):
            assert (changed[name] - values).abs().max() > 1e-2, name
    if mode == 2:
        torch.testing.assert_close(changed["global"], own["global"], rtol=1e-4, atol=1e-4)


def test_the_context_is_the_next_image_or_grey(tmp_path) -> None:
    data = describe("deep_globe", generate(tmp_path, images=7)).open("train", SIDE)
    own = [data[i] for i in range(len(data))]
    assert all(sample.shared is None for sample in own)
    data.share = "other"
    for i in range(len(own)):
        context = data[i].shared
        assert context is not None and torch.equal(context, own[(i + 1) % len(own)].global_image)
        assert torch.equal(data[i].global_image, own[i].global_image)
    data.share = "blank"
    assert torch.equal(data[0].shared, torch.full((3, SIDE, SIDE), GREY, dtype=torch.uint8))
    data.share, data._samples = "other", data._samples[:1]
    with pytest.raises(InputError, match="--share other needs a second image"):
        data[0]


def test_evaluation_predicts_with_the_context_of_its_samples() -> None:
    sample, other = build_sample(SIZE), build_sample(SIZE, seed=1)
    predictor = build_predictor(shared_model(), 2, build_settings())

    def matrices(context: Tensor | None) -> dict[str, Tensor]:
        metrics = StageMetrics(STAGES[2], build_header(2).classes)
        evaluate_images(predictor, [[sample._replace(shared=context)]], metrics)
        return {name: matrix.counts for name, matrix in metrics.matrices.items()}

    own, changed = matrices(None), matrices(other.global_image)
    assert torch.equal(own["global"], changed["global"])
    assert not torch.equal(own["local"], changed["local"])
