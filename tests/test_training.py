"""What training and evaluation must hold to, whatever the weights: properties of steps, stages, network and loss."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from builders import (
    MIN_OVERLAP,
    N_CLASS,
    SIDE,
    build_model,
    build_predictor,
    build_sample,
    build_settings,
    gradients,
    learning_model,
    segment_scores,
    shared_model,
    take_step,
    train_epoch,
)
from torch import Tensor, nn

from dataset.base import Sample
from engine.patches import TrainingPatches
from evaluation.run import evaluate_images
from helper import SHOWN_EVERY, StageMetrics
from models.glnet import GLNet
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.classes import IGNORED
from utils.loss import focal_loss
from utils.settings import STATISTICS, Settings
from utils.stages import STAGES

SEVERAL_SIZES = [(100, 150), (64, 64), (40, 90), (130, 50), (33, 60)]
"""Several patches; exactly one; lower, narrower and smaller than a patch."""


def assert_close_as_a_whole(gradient: Tensor, expected: Tensor, name: str) -> None:
    """Entries near zero may differ by more than their share."""
    assert expected.norm() > 0, name
    assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_one_image_after_another_equals_each_alone(mode) -> None:
    model = shared_model()
    samples = [build_sample(size, seed, str(seed)) for seed, size in enumerate([(100, 90), (70, 120), (40, 50)])]
    found = {}
    evaluate_images(
        build_predictor(model, mode, build_settings()),
        [samples[:2], samples[2:]],
        StageMetrics(STAGES[mode], N_CLASS),
        on_image=lambda s, ids: found.update({s.id: ids}),
    )
    for sample in reversed(samples):
        alone = segment_scores(model, mode, sample, build_settings())
        for name, scores in alone.items():
            assert torch.equal(found[sample.id][name], scores.argmax(0).to(torch.uint8))


def backward_per_sub_batch(model: GLNet, batch: list[Sample], settings: Settings) -> None:
    """Stage 3's gradients the long way: each term of the loss goes back through the whole refined branch."""
    inputs = settings.to_input(torch.stack([sample.global_image for sample in batch]))
    images = [TrainingPatches(sample, settings) for sample in batch]
    merged, local = [], []
    with torch.no_grad():
        for x, image in zip(inputs.split(1), images, strict=True):
            _, context = model.global_(x)
            mosaic = Mosaic(1, context)
            for patches, x_p in image:
                _, pyramid = model.local(x_p, crop_pyramid(context, image.grid, patches))
                pyramid.visit(partial(mosaic.add, 0, image.grid, patches))
                local.append((len(merged), patches, pyramid.ps3))
            merged.append(mosaic.merged())
    logits, refined = model.refined(inputs, merged[0].map(lambda *maps: torch.cat(maps), *merged[1:]))
    target = torch.stack([sample.global_label for sample in batch])
    focal_loss(logits, target).backward(retain_graph=True)
    for i, patches, ps3 in local:
        crop = crop_global(refined.ps3[i : i + 1], images[i].grid, patches)
        scores = model.ensemble(ps3, crop)
        focal_loss(scores, images[i].targets(patches, scores)).backward(retain_graph=True)


def test_single_backward_of_stage_3_equals_the_sum_of_many() -> None:
    batch = [build_sample((100, 90), 0), build_sample((64, 120), 1)]
    settings, once, often = build_settings(sub_batch_size=3), *(learning_model(3) for _ in range(2))
    take_step(once, 3, batch, sub_batch_size=3)
    backward_per_sub_batch(often, batch, settings)
    expected = gradients(often)
    assert gradients(once).keys() == expected.keys()
    for name, gradient in gradients(once).items():
        assert_close_as_a_whole(gradient, expected[name], name)
    for (name, buffer), other in zip(once.named_buffers(), often.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_stage_changes_all_of_its_branches_and_nothing_else(mode) -> None:
    stage, model = STAGES[mode], learning_model(mode)
    before = deepcopy(model.state_dict())
    train_epoch(model, mode, [[build_sample((64, 90), 0)], [build_sample((70, 64), 1)]])
    for name, tensor in model.state_dict().items():
        learns = name.split(".")[0] in stage.trains
        assert torch.equal(tensor, before[name]) != learns, name
    assert {name.split(".")[0] for name in gradients(model)} == set(stage.trains)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_what_learns_survives_switching_between_training_and_evaluation(mode) -> None:
    model = learning_model(mode)
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    for name, child in model.named_children():
        learns = name in STAGES[mode].trains
        norms = [m for m in child.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == (0 if name == "ensemble" else 20)
        assert {m.training for m in norms} <= {learns}
        assert {p.requires_grad for p in child.parameters()} == {learns}


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_images_of_several_sizes_train_in_one_batch(mode) -> None:
    model = learning_model(mode)
    batch = [build_sample(size, seed) for seed, size in enumerate(SEVERAL_SIZES)]
    terms, metrics = take_step(model, mode, batch)
    labelled = sum(int((sample.label != IGNORED).sum()) for sample in batch)
    assert all(math.isfinite(value) and value > 0 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert [int(matrix.counts.sum()) for matrix in metrics.matrices.values()] == [labelled] * len(metrics.matrices)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_an_image_without_any_label_gives_no_loss_and_no_gradient_but_the_regulariser(mode) -> None:
    model = learning_model(mode)
    sample = build_sample((64, 90), left_out=1)
    terms, metrics = take_step(model, mode, [sample], lamb_fmreg=0.0)
    assert all(value == 0 for value in terms.values())
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model).values())
    assert all(matrix.counts.sum() == 0 for matrix in metrics.matrices.values())


def test_the_regulariser_counts_as_much_as_its_weight_says() -> None:
    sample = build_sample((64, 90))
    one, other = (take_step(learning_model(2), 2, [sample], lamb_fmreg=weight)[0] for weight in (1.0, 0.15))
    assert float(other["fmreg"]) == pytest.approx(0.15 * float(one["fmreg"]), rel=1e-5)
    assert float(other["focal_local"]) == pytest.approx(float(one["focal_local"]), rel=1e-5)


def test_a_step_brings_its_numbers_to_the_host_in_one_transfer(monkeypatch) -> None:
    """Neither loss nor metric is read by itself; the mIoU of the progress bar comes along at intervals."""
    shown, transfers = [], []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(StageMetrics, "mean_iou", lambda self: pytest.fail("the confusion matrix went to the host"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a number of its own"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or plain(self))
    on_device = StageMetrics.mean_iou_on_device
    monkeypatch.setattr(StageMetrics, "mean_iou_on_device", lambda self: shown.append(1) or on_device(self))
    model = learning_model(1)
    batches, before = [[build_sample((64, 64))]] * (SHOWN_EVERY + 1), len(transfers)
    train_epoch(model, 1, batches, torch.optim.SGD(model.global_.parameters(), lr=0.0))  # Adam's steps read numbers
    assert len(transfers) - before == len(batches)
    assert len(shown) == 2


@pytest.mark.parametrize("name", ["none", "half", "imagenet"])
def test_normalisation_scales_to_one_and_subtracts_and_divides_per_channel(name) -> None:
    expected = {
        "none": ([0, 0, 0], [1, 1, 1]),
        "half": ([0.5] * 3, [0.5] * 3),
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }
    assert expected.keys() == STATISTICS.keys()
    mean, std = (np.array(values)[:, None, None] for values in expected[name])
    image = build_sample((8, 9)).image
    found = Settings(size_p=SIDE, min_overlap=MIN_OVERLAP, statistics=STATISTICS[name]).to_input(image[None])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), (image.numpy() / 255 - mean) / std, atol=1e-6)
    assert image.dtype == torch.uint8


def state_after_a_step(model: GLNet, mode: int, precision: str, checkpoint_activations: bool) -> dict[str, Tensor]:
    """Weights, buffers and gradients after a step on two images of several patches."""
    torch.manual_seed(0)
    model.learn(STAGES[mode].trains)
    batch = [build_sample((100, 150), seed) for seed in (0, 1)]
    train_epoch(model, mode, [batch], precision=precision, checkpoint_activations=checkpoint_activations)
    return {**model.state_dict(), **{f"{name}.grad": x for name, x in gradients(model).items()}}


def assert_same_step(models: tuple[GLNet, GLNet], mode: int, precision: str) -> None:
    plain, saving = (
        state_after_a_step(model, mode, precision, recomputed)
        for model, recomputed in zip(models, (False, True), strict=True)
    )
    assert plain.keys() == saving.keys()
    assert [name for name in plain if not torch.equal(plain[name], saving[name])] == []


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize(("mode", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_step_that_recomputes_activations_equals_one_that_keeps_them(mode, precision) -> None:
    models = build_model(), build_model()
    branches = [getattr(model, STAGES[mode].trains[0]) for model in models]
    kept, recomputed = (count_calls(branch.backbone.layer4[0].conv1) for branch in branches)
    assert_same_step(models, mode, precision)
    assert len(recomputed) == 2 * len(kept) > 0
    assert all("forward" not in vars(module) for module in models[1].modules())  # as before the step


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_convnext", "timm/small_swin"])
def test_encoders_of_timm_do_so_too(name) -> None:
    pytest.importorskip("test_encoders")  # registers the small Swin
    model = GLNet(N_CLASS, name)
    assert_same_step((model, deepcopy(model)), 1, "fp32")
