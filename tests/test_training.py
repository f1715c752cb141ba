"""What training and evaluation must hold to, whatever the weights: properties of steps, stages, network and loss."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import (
    MIN_OVERLAP,
    N_CLASS,
    SIDE,
    build_model,
    build_predictor,
    build_sample,
    build_settings,
    segment_scores,
    shared_model,
)
from torch import Tensor, nn

from dataset.base import Sample
from engine.patches import TrainingPatches
from evaluation.run import evaluate_images
from helper import SHOWN_EVERY, TRAINING_STEPS, StageMetrics, train_one_epoch
from models.fpn import FPN, resize
from models.glnet import GLNet
from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.classes import IGNORED
from utils.loss import focal_loss
from utils.metrics import ConfusionMatrix
from utils.settings import STATISTICS, Settings
from utils.stages import STAGES, Stage

SEVERAL_SIZES = [(100, 150), (64, 64), (40, 90), (130, 50), (33, 60)]
"""Several patches; exactly one; lower, narrower and smaller than a patch."""


def build_learning_model(stage: Stage) -> GLNet:
    model = build_model()
    model.learn(stage.trains)
    return model.train()


def take_step(
    model: GLNet, mode: int, batch: list[Sample], settings: Settings
) -> tuple[dict[str, float], StageMetrics]:
    """The loss terms and the training metric of one batch; gradients are added to the model's."""
    metrics = StageMetrics(STAGES[mode], model.n_class)
    terms = TRAINING_STEPS[mode](model, batch, settings, metrics)
    return {name: float(value) for name, value in terms.items()}, metrics


def train_steps(model: GLNet, stage: Stage, batches: list[list[Sample]]) -> None:
    """One optimizer step for each of `batches`."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1)
    train_one_epoch(model, stage, batches, optimizer, scheduler, build_settings(), on_step=lambda values: None)


def gradients(model: GLNet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close_as_a_whole(gradient: Tensor, expected: Tensor, name: str) -> None:
    """Entries near zero may differ by more than their share."""
    assert expected.norm() > 0, name
    assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def assert_same_decision(scores: Tensor, expected: Tensor) -> None:
    """Scores equal up to rounding, and the ids wherever rounding cannot turn them."""
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    first, second = expected.topk(2, dim=0).values
    clear = first - second > 1e-3
    assert clear.float().mean() > 0.95
    assert torch.equal(scores.argmax(0)[clear], expected.argmax(0)[clear])


# evaluation


@pytest.mark.parametrize("mode", [2, 3])
def test_sub_batch_size_does_not_matter_in_evaluation(mode: int) -> None:
    model, sample = shared_model(), build_sample((100, 150))
    expected = segment_scores(model, mode, sample, build_settings(sub_batch_size=100))
    for sub_batch_size in (1, 4):
        found = segment_scores(model, mode, sample, build_settings(sub_batch_size=sub_batch_size))
        for name, scores in found.items():
            assert_same_decision(scores, expected[name])


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_one_image_after_another_equals_each_alone(mode: int) -> None:
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


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_evaluation_counts_as_one_does_by_hand(mode: int) -> None:
    labelled = [build_sample(size, seed, str(seed)) for seed, size in enumerate([(70, 90), (64, 40)])]
    bare = build_sample((50, 60), 2, "2")._replace(label=None, global_label=None)
    found = {}
    result = evaluate_images(
        build_predictor(shared_model(), mode, build_settings()),
        [labelled, [bare]],
        StageMetrics(STAGES[mode], N_CLASS),
        on_image=lambda s, ids: found.update({s.id: ids}),
    )
    assert (result.images, sorted(found)) == (3, ["0", "1", "2"])
    for name in STAGES[mode].predictions:
        expected = np.zeros((N_CLASS, N_CLASS), np.int64)
        for sample in labelled:
            pairs = zip(sample.label.flatten().tolist(), found[sample.id][name].flatten().tolist(), strict=True)
            for truth, guess in pairs:
                if truth != IGNORED:
                    expected[truth, guess] += 1
        np.testing.assert_array_equal(result.metrics.matrices[name].counts.numpy(), expected)


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 70), (70, 1), (1, 1)])
def test_strips_of_a_single_pixel_are_segmented(mode: int, size: tuple[int, int]) -> None:
    for scores in segment_scores(shared_model(), mode, build_sample(size), build_settings()).values():
        assert scores.shape == (N_CLASS, *size)
        assert scores.isfinite().all()


# training


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
    settings, once, often = build_settings(sub_batch_size=3), *(build_learning_model(STAGES[3]) for _ in range(2))
    take_step(once, 3, batch, settings)
    backward_per_sub_batch(often, batch, settings)
    expected = gradients(often)
    assert gradients(once).keys() == expected.keys()
    for name, gradient in gradients(once).items():
        assert_close_as_a_whole(gradient, expected[name], name)
    for (name, buffer), other in zip(once.named_buffers(), often.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_stage_changes_all_of_its_branches_and_nothing_else(mode: int) -> None:
    stage, model = STAGES[mode], build_learning_model(STAGES[mode])
    before = deepcopy(model.state_dict())
    train_steps(model, stage, [[build_sample((64, 90), 0)], [build_sample((70, 64), 1)]])
    for name, tensor in model.state_dict().items():
        learns = name.split(".")[0] in stage.trains
        assert torch.equal(tensor, before[name]) != learns, name
    assert {name.split(".")[0] for name in gradients(model)} == set(stage.trains)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_what_learns_survives_switching_between_training_and_evaluation(mode: int) -> None:
    model = build_learning_model(STAGES[mode])
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
def test_images_of_several_sizes_train_in_one_batch(mode: int) -> None:
    model = build_learning_model(STAGES[mode])
    batch = [build_sample(size, seed) for seed, size in enumerate(SEVERAL_SIZES)]
    terms, metrics = take_step(model, mode, batch, build_settings())
    labelled = sum(int((sample.label != IGNORED).sum()) for sample in batch)
    assert all(math.isfinite(value) and value > 0 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert [int(matrix.counts.sum()) for matrix in metrics.matrices.values()] == [labelled] * len(metrics.matrices)


@pytest.mark.parametrize("mode", [2, 3])
def test_gradients_of_several_images_are_added(mode: int) -> None:
    """In mode 3 with the norm layers of the refined branch in evaluation: in training they see the batch as one."""
    batch = [build_sample((64, 100), 0), build_sample((40, 50), 1)]
    together, apart = (build_learning_model(STAGES[mode]).eval() for _ in range(2))
    whole, _ = take_step(together, mode, batch, build_settings())
    terms = [take_step(apart, mode, [sample], build_settings())[0] for sample in batch]
    assert whole["focal_ensemble"] == pytest.approx(sum(term["focal_ensemble"] for term in terms), rel=1e-5)
    for name in ("ensemble.weight", "ensemble.bias"):
        assert_close_as_a_whole(gradients(together)[name], gradients(apart)[name], name)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_an_image_without_any_label_gives_no_loss_and_no_gradient_but_the_regulariser(mode: int) -> None:
    model = build_learning_model(STAGES[mode])
    sample = build_sample((64, 90), left_out=1)
    terms, metrics = take_step(model, mode, [sample], build_settings(lamb_fmreg=0.0))
    assert all(value == 0 for value in terms.values())
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model).values())
    assert all(matrix.counts.sum() == 0 for matrix in metrics.matrices.values())


def test_the_regulariser_counts_as_much_as_its_weight_says() -> None:
    sample = build_sample((64, 90))
    one, other = (
        take_step(build_learning_model(STAGES[2]), 2, [sample], build_settings(lamb_fmreg=weight))[0]
        for weight in (1.0, 0.15)
    )
    assert other["fmreg"] == pytest.approx(0.15 * one["fmreg"], rel=1e-5)
    assert other["focal_local"] == pytest.approx(one["focal_local"], rel=1e-5)


# network


def test_split_ensemble_equals_the_convolution_of_the_concatenation() -> None:
    ensemble = shared_model().ensemble
    local, crop = torch.randn(2, 512, 16, 12), torch.randn(2, 512, 5, 7)
    joined = torch.cat([local, resize(crop, (16, 12))], dim=1)
    expected = F.conv2d(joined, ensemble.weight, ensemble.bias, padding=1)
    torch.testing.assert_close(ensemble(local, crop), expected, rtol=1e-4, atol=1e-4)


def random_levels(generator: torch.Generator, channels: tuple[int, ...], scale: int = 1) -> tuple[Tensor, ...]:
    """Four maps, coarsest first."""
    sides = [scale * side for side in (2, 3, 6, 12)]
    return tuple(
        torch.randn(1, c, side, side + 1, generator=generator, dtype=torch.float64)
        for c, side in zip(channels, sides, strict=True)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_pyramid_is_affine(fused: bool) -> None:
    """f(x + y) - f(x) - f(y) + f(0) = 0: there is no activation and no normalisation in it."""
    channels, generator = (16, 8, 4, 4), torch.Generator().manual_seed(0)
    fpn = FPN(channels, fused).double()
    for parameter in fpn.parameters():
        nn.init.normal_(parameter, 0, 0.05, generator=generator)

    def maps() -> tuple[Pyramid, Pyramid]:
        widths = (channels, (256,) * 4, (256,) * 4, (128,) * 4)
        return tuple(Pyramid(*(random_levels(generator, w, scale) for w in widths)) for scale in (1, 2))

    @torch.no_grad()
    def f(own: Pyramid, other: Pyramid) -> Tensor:
        return fpn(own.c, other if fused else None).ps3

    x, y = maps(), maps()
    both = [a.map(torch.add, b) for a, b in zip(x, y, strict=True)]
    nothing = [a.map(torch.zeros_like) for a in x]
    residue = f(*both) - f(*x) - f(*y) + f(*nothing)
    assert f(*nothing).abs().max() > 0
    assert residue.abs().max() <= 1e-10 * f(*both).abs().max()


def test_a_step_brings_its_numbers_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loss nor metric is read by itself; the mIoU of the progress bar comes along at intervals."""
    shown, transfers = [], []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(StageMetrics, "mean_iou", lambda self: pytest.fail("the confusion matrix went to the host"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a number of its own"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or plain(self))
    on_device = StageMetrics.mean_iou_on_device
    monkeypatch.setattr(StageMetrics, "mean_iou_on_device", lambda self: shown.append(1) or on_device(self))
    model = build_learning_model(STAGES[1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1)
    batches, before = [[build_sample((64, 64))]] * (SHOWN_EVERY + 1), len(transfers)
    train_one_epoch(model, STAGES[1], batches, optimizer, scheduler, build_settings(), on_step=lambda values: None)
    assert len(transfers) - before == len(batches)
    assert len(shown) == 2


def test_refined_branch_starts_as_the_global_one_with_its_buffers() -> None:
    model = build_model()
    before = deepcopy(model.state_dict())
    model.start_refined()
    for name, tensor in model.state_dict().items():
        copied = name.startswith(("refined.backbone.", "refined.head."))
        assert torch.equal(tensor, before[name.replace("refined", "global_") if copied else name]), name


# loss, metric and normalisation


def test_focal_loss_equals_its_formula_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(2, N_CLASS, 4, 5, generator=generator)  # some probabilities are clamped
    target = torch.randint(0, N_CLASS, (2, 4, 5), generator=generator)
    target[0, 1] = IGNORED
    terms = []
    for n, row, column in np.ndindex(*target.shape):
        if target[n, row, column] != IGNORED:
            scores = logits[n, :, row, column].double()
            p = float((scores - scores.logsumexp(0)).exp()[target[n, row, column]])
            p = min(max(p, 1e-7), 1 - 1e-7)
            terms.append(-((1 - p) ** 3) * math.log(p))
    assert max(terms) == pytest.approx(-math.log(1e-7), rel=1e-4)
    assert len(terms) == 35
    assert float(focal_loss(logits, target)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_predictions_under_the_ignored_id_change_neither_loss_nor_gradient_nor_metric() -> None:
    sample = build_sample((16, 16), left_out=0.3)
    target, ignored = sample.label[None], sample.label == IGNORED
    logits = torch.randn(1, N_CLASS, 16, 16, generator=torch.Generator().manual_seed(0))
    other = torch.where(ignored, -3 * logits.roll(1, dims=1), logits)
    losses, grads, counts = [], [], []
    for scores in (logits.clone().requires_grad_(), other.clone().requires_grad_()):
        loss = focal_loss(scores, target)
        loss.backward()
        matrix = ConfusionMatrix(N_CLASS)
        matrix.update(target[0], scores.detach()[0].argmax(0))
        losses.append(loss.detach())
        grads.append(scores.grad)
        counts.append(matrix.counts)
    assert not torch.equal(logits.argmax(1), other.argmax(1))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])
    assert not grads[0][:, :, ignored].any()
    assert grads[0][:, :, ~ignored].any()
    assert torch.equal(counts[0], counts[1])
    assert counts[0].sum() == (~ignored).sum()


@pytest.mark.parametrize("name", ["none", "half", "imagenet"])
def test_normalisation_scales_to_one_and_subtracts_and_divides_per_channel(name: str) -> None:
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
