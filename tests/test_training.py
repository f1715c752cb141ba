"""What training and evaluation must hold to, whatever the weights: steps, stages, optimizer, averages; every loss."""

import math
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import builders
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import N_CLASS, SIDE, build_model, build_sample, build_settings, gradients, learning_model, shared_model
from golden_network import arrays
from torch import Tensor, nn

from dataset.base import Sample, SegmentationDataset
from engine.patches import TrainingPatches
from evaluation.run import evaluate_images
from helper import SHOWN_EVERY, EpochState, StageMetrics
from models.glnet import GLNet
from models.sharing import Mosaic, crop_global, crop_pyramid
from training.average import WeightAverage, learned_state
from training.optimizer import build_optimizer, build_schedule, poly
from training.run import TrainingRun
from training.state import RunState, TrainerState
from utils.classes import IGNORED, Classes
from utils.distributed import ALONE
from utils.errors import InputError
from utils.loss import LOSSES, build_loss, check_class_weights, cross_entropy, focal_loss, lovasz_softmax
from utils.resize import shrink_label
from utils.settings import STATISTICS, Settings
from utils.stages import STAGES
from utils.tiling import PatchGrid

SEVERAL_SIZES = [(100, 150), (64, 64), (40, 90), (130, 50), (33, 60)]
"""Several patches; exactly one; lower, narrower and smaller than a patch."""

BATCHES = [[build_sample((64, 64), k)] for k in range(3)]
each_mode = pytest.mark.parametrize("mode", [1, 2, 3])


def branch_of(name: str) -> str:
    return name.split(".")[0]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@each_mode
def test_one_image_after_another_equals_each_alone(mode) -> None:
    model, found = shared_model(), {}
    samples = [build_sample(size, seed, str(seed)) for seed, size in enumerate([(100, 90), (70, 120), (40, 50)])]
    predictor, metrics = builders.build_predictor(model, mode, build_settings()), StageMetrics(STAGES[mode], N_CLASS)
    evaluate_images(predictor, [samples[:2], samples[2:]], metrics, on_image=lambda s, ids: found.update({s.id: ids}))
    for sample in reversed(samples):
        alone = builders.segment_scores(model, mode, sample, build_settings())
        assert_equal(found[sample.id], {name: scores.argmax(0).to(torch.uint8) for name, scores in alone.items()})


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
    once, often = (learning_model(3) for _ in range(2))
    builders.take_step(once, 3, batch, sub_batch_size=3)
    backward_per_sub_batch(often, batch, build_settings(sub_batch_size=3))
    expected = gradients(often)
    assert gradients(once).keys() == expected.keys()
    for name, gradient in gradients(once).items():  # as a whole: entries near zero may differ by more
        assert expected[name].norm() > 0 and (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert_equal(dict(once.named_buffers()), dict(often.named_buffers()))


@each_mode
def test_a_stage_changes_all_of_its_branches_and_nothing_else_and_what_learns_survives_switching(mode) -> None:
    stage, model = STAGES[mode], learning_model(mode)
    before = deepcopy(model.state_dict())
    builders.train_epoch(model, mode, [[build_sample((64, 90), 0)], [build_sample((70, 64), 1)]])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (branch_of(name) in stage.trains), name
    assert set(map(branch_of, gradients(model))) == set(stage.trains)
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    for name, child in model.named_children():
        learns = name in stage.trains
        norms = [m for m in child.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == (0 if name == "ensemble" else 20)
        assert {m.training for m in norms} <= {learns}
        assert {p.requires_grad for p in child.parameters()} == {learns}


@each_mode
def test_a_batch_has_images_of_several_sizes_and_one_without_labels_gives_neither_loss_nor_gradient(mode) -> None:
    model, batch = learning_model(mode), [build_sample(size, seed) for seed, size in enumerate(SEVERAL_SIZES)]
    terms, metrics = builders.take_step(model, mode, batch)
    labelled = sum(int((sample.label != IGNORED).sum()) for sample in batch)
    assert all(math.isfinite(value) and value > 0 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert [int(matrix.counts.sum()) for matrix in metrics.matrices.values()] == [labelled] * len(metrics.matrices)
    model.zero_grad()
    terms, metrics = builders.take_step(
        model, mode, [build_sample((64, 90), left_out=1)], lamb_fmreg=0.0
    )  # no regulariser
    assert all(value == 0 for value in terms.values())
    assert gradients(model) and not any(gradient.any() for gradient in gradients(model).values())
    assert all(matrix.counts.sum() == 0 for matrix in metrics.matrices.values())


def test_the_regulariser_counts_as_much_as_its_weight_says() -> None:
    sample = build_sample((64, 90))
    one, other = (builders.take_step(learning_model(2), 2, [sample], lamb_fmreg=weight)[0] for weight in (1.0, 0.15))
    assert float(other["fmreg"]) == pytest.approx(0.15 * float(one["fmreg"]), rel=1e-5)
    assert float(other["focal_local"]) == pytest.approx(float(one["focal_local"]), rel=1e-5)


def test_a_step_brings_its_numbers_to_the_host_in_one_transfer(monkeypatch) -> None:
    """Neither loss nor metric is read by itself; the mIoU of the progress bar comes along at intervals."""
    shown, transfers = [], []
    plain, on_device = torch.Tensor.tolist, StageMetrics.mean_iou_on_device
    monkeypatch.setattr(StageMetrics, "mean_iou", lambda self: pytest.fail("the confusion matrix went to the host"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a number of its own"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or plain(self))
    monkeypatch.setattr(StageMetrics, "mean_iou_on_device", lambda self: shown.append(1) or on_device(self))
    model, batches = learning_model(1), [[build_sample((64, 64))]] * (SHOWN_EVERY + 1)
    before = len(transfers)
    optimizer = torch.optim.SGD(model.global_.parameters(), lr=0.0)  # Adam's steps read numbers
    builders.train_epoch(model, 1, batches, optimizer)
    assert (len(transfers) - before, len(shown)) == (len(batches), 2)


def test_normalisation_scales_to_one_and_subtracts_and_divides_per_channel() -> None:
    expected = {
        "none": ([0, 0, 0], [1, 1, 1]),
        "half": ([0.5] * 3, [0.5] * 3),
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }
    assert expected.keys() == STATISTICS.keys()
    image = build_sample((8, 9)).image
    for name, statistics in expected.items():
        mean, std = (np.array(values)[:, None, None] for values in statistics)
        found = build_settings(statistics=STATISTICS[name]).to_input(image[None])
        assert (found.dtype, image.dtype) == (torch.float32, torch.uint8)
        np.testing.assert_allclose(found[0].numpy(), (image.numpy() / 255 - mean) / std, atol=1e-6)


def assert_same_step(models: tuple[GLNet, GLNet], mode: int, precision: str) -> None:
    """Weights, buffers and gradients after a step on two images of several patches, with recomputing and without."""
    states, batch = [], [build_sample((100, 150), seed) for seed in (0, 1)]
    for model, recomputed in zip(models, (False, True), strict=True):
        torch.manual_seed(0)
        model.learn(STAGES[mode].trains)
        builders.train_epoch(model, mode, [batch], precision=precision, checkpoint_activations=recomputed)
        states.append({**model.state_dict(), **{f"{name}.grad": x for name, x in gradients(model).items()}})
    assert_equal(*states)


@pytest.mark.parametrize(("mode", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_step_that_recomputes_activations_equals_one_that_keeps_them(mode, precision) -> None:
    models, calls = (build_model(), build_model()), ([], [])
    for model, made in zip(models, calls, strict=True):
        layer = getattr(model, STAGES[mode].trains[0]).backbone.layer4[0].conv1
        layer.register_forward_hook(lambda *_, made=made: made.append(None))
    assert_same_step(models, mode, precision)
    assert len(calls[1]) == 2 * len(calls[0]) > 0
    assert all("builders.forward" not in vars(module) for module in models[1].modules())  # as before the step


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_convnext", "timm/small_swin"])
def test_encoders_of_timm_do_so_too(name) -> None:
    pytest.importorskip("test_encoders")  # registers the small Swin
    model = GLNet(N_CLASS, name)
    assert_same_step((model, deepcopy(model)), 1, "fp32")


def test_optimizer_and_schedule_are_the_released_ones() -> None:
    model = learning_model(1)
    optimizer = build_optimizer(model, 1e-3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"]) == (1e-3, 5e-4)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    schedule = build_schedule(optimizer, 7)
    assert [schedule.lr_lambdas[0](t) for t in range(9)] == [poly(t, 7) for t in range(9)]


def test_a_changed_rate_holds_after_a_resume() -> None:
    def trainer(lr: float) -> TrainerState:
        model = learning_model(1)
        optimizer = build_optimizer(model, lr)
        run, epoch = RunState("now"), EpochState(StageMetrics(STAGES[1], model.n_class))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainerState(model, optimizer, build_schedule(optimizer, 10), scaler, run, epoch)

    before, after = trainer(1e-3), trainer(1e-2)
    builders.train_epoch(before.model, 1, BATCHES, before.optimizer, scheduler=before.scheduler)
    after.restore(deepcopy(before.capture(ALONE, {}, {})), "a.resume.pth", ALONE, anew=True)
    after.reschedule(3)
    rate = 1e-2 * poly(3, 10)
    assert after.scheduler.get_last_lr() == [rate] == [group["lr"] for group in after.optimizer.param_groups]
    for one, other in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(one, other)
        if one.requires_grad:
            assert torch.equal(before.optimizer.state[one]["exp_avg"], after.optimizer.state[other]["exp_avg"])


def test_the_average_follows_every_step_and_what_it_is_taken_of_stays() -> None:
    model, states = learning_model(1), []
    optimizer = build_optimizer(model, 1e-3)
    average = WeightAverage(model, 0.15, optimizer)
    assert set(map(branch_of, average.values)) == set(STAGES[1].trains)
    assert any("running_var" in name for name in average.values)
    expected = {name: x.clone() for name, x in learned_state(model).items()}
    optimizer.register_step_post_hook(lambda *_: states.append({k: x.clone() for k, x in learned_state(model).items()}))
    builders.train_epoch(model, 1, BATCHES, optimizer)
    for decay, state in zip((0.1, 0.15, 0.15), states, strict=True):  # 1 / 10, then the given one
        for name, x in expected.items():
            expected[name] = x.lerp(state[name], 1 - decay) if x.is_floating_point() else state[name]
    before = deepcopy(model.state_dict())
    assert_equal(average.values, expected)
    with pytest.raises(RuntimeError), average.applied():
        assert_equal(model.state_dict(), {**before, **expected})
        raise RuntimeError
    assert_equal(model.state_dict(), before)
    assert_equal(average.values, expected)
    with torch.no_grad():
        model.global_.head.bias.fill_(float("nan"))
    updates = average.updates
    builders.train_epoch(model, 1, BATCHES, optimizer)
    assert average.updates == updates == 3  # a skipped step does not move it


@pytest.mark.parametrize(
    ("every", "patience", "epochs", "validated", "last"),
    [
        (1, 0, 3, [1, 2, 3], 3),
        (2, 0, 5, [2, 4, 5], 5),
        (2, 1, 9, [2, 4], 4),
        (2, 3, 9, [2, 4, 6], 6),
        (9, 1, 4, [4], 4),
    ],
)
def test_early_stopping_waits_for_a_validation(every, patience, epochs, validated, last) -> None:
    """The first validation is the best one."""
    run, found = object.__new__(TrainingRun), []
    options = SimpleNamespace(val_every=every, early_stopping=patience, num_epochs=epochs)
    run.plan = SimpleNamespace(options=options)
    run.state = SimpleNamespace(run=RunState("now"))
    state = run.state.run
    while state.epoch < epochs and not run._stalled():
        due = run._validation_due()
        state.epoch += 1
        state.unvalidated = 0 if due else state.unvalidated + 1
        if due:
            found.append(state.epoch)
            state.best_epoch = found[0]
    assert (found, state.epoch) == (validated, last)


WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def random_batch(n_class: int = 3) -> tuple[Tensor, Tensor]:
    """Logits (2, K, 5, 4) and ids without an ignored one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, n_class, 5, 4, generator=generator)
    return logits, torch.randint(0, n_class, (2, 5, 4), generator=generator)


def test_lovasz_is_the_released_one_of_certain_answers_one_minus_iou_and_of_an_absent_class_its_maximum() -> None:
    golden = arrays("losses")
    loss = lovasz_softmax(torch.from_numpy(golden["logits"]), torch.from_numpy(golden["target"]))
    assert float(loss) == pytest.approx(float(golden["lovasz"]), rel=1e-6)
    target = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    guess = torch.tensor([[[0, 0, 1, 1, 1, 1]]])
    logits = 100.0 * F.one_hot(guess, 3).permute(0, 3, 1, 2)
    # IoU 2/3 and 3/4; the third class is neither true nor predicted, and costs nothing
    assert float(lovasz_softmax(logits, target)) == pytest.approx((1 / 3 + 1 / 4 + 0) / 3, abs=1e-6)
    logits, target = random_batch()[0], torch.zeros(2, 5, 4, dtype=torch.long)
    found = float(lovasz_softmax(logits, target, class_weights=torch.tensor([0.0, 0.0, 1.0])))
    assert found == pytest.approx(float(logits.softmax(1)[:, 2].max()), rel=1e-6)


def test_cross_entropy_equals_torchs_and_focal_loss_of_gamma_0_with_and_without_weights() -> None:
    logits, target = random_batch()
    target[1, 2:] = IGNORED
    for weights in (None, WEIGHTS):
        expected = float(F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORED))
        assert float(cross_entropy(logits, target, class_weights=weights)) == pytest.approx(expected, rel=1e-6)
        assert float(build_loss("ce", class_weights=weights)(logits, target)) == pytest.approx(expected, rel=1e-6)
        assert float(build_loss("focal", 0.0, weights)(logits, target)) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(build_loss()(logits, target), focal_loss(logits, target))  # the default
    both = build_loss("focal+lovasz", 2.0)(logits, target)
    assert torch.equal(both, focal_loss(logits, target, 2.0) + lovasz_softmax(logits, target))
    # weighted focal loss by hand
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])).T[None, :, None]  # (1, 3, 1, 2)
    target = torch.tensor([[[0, 1]]])
    terms = [-(0.5**3) * math.log(0.5), -(0.3**3) * math.log(0.7)]
    expected = (1 * terms[0] + 2 * terms[1]) / (1 + 2)
    assert float(build_loss("focal", class_weights=WEIGHTS)(logits, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_and_the_scale_of_weights_change_nothing(name) -> None:
    """Where nothing is left to learn from, the loss is 0 and its gradient zeros."""
    logits, target = random_batch()
    for weights in (None, WEIGHTS):
        scaled = build_loss(name, class_weights=5 * (torch.ones(3) if weights is None else weights))
        plain = build_loss(name, class_weights=weights)(logits, target)
        assert float(scaled(logits, target)) == pytest.approx(float(plain), rel=1e-6)
    loss = build_loss(name, class_weights=WEIGHTS)
    expected = loss(logits[:1], target[:1])
    target[1] = IGNORED
    logits.requires_grad_()
    found = loss(logits, target)
    found.backward()
    assert found.item() == pytest.approx(float(expected), rel=1e-6)
    assert not logits.grad[1].any() and logits.grad[0].any()
    for weights in (None, WEIGHTS, torch.tensor([1.0, 0.0, 0.0])):
        logits.grad = None
        found = build_loss(name, class_weights=weights)(logits, torch.full((2, 5, 4), IGNORED, dtype=torch.uint8))
        found.backward()
        assert found.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"--loss dice is none of focal, ce, lovasz, focal\+lovasz"):
        build_loss("dice")
    with pytest.raises(InputError, match=r"--gamma -1.0 is negative"):
        build_loss(gamma=-1.0)
    names = ("skin", "lesion")
    with pytest.raises(InputError, match="--class_weights gives 3 numbers for 2 classes; give one each: skin, lesion"):
        check_class_weights([1, 2, 3], names)
    for values in ([0, 0], [1, -1], [1, math.nan]):
        with pytest.raises(InputError, match=r"--class_weights .* 0 or more, and one of them above 0"):
            check_class_weights(values, names)
    assert check_class_weights([1, 3], names).tolist() == [1, 3]


SIZE = (100, 64)
SAMPLE = build_sample(SIZE)
FULL = SAMPLE._replace(global_label=shrink_label(SAMPLE.label, (SIDE, SIDE)))


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_logits_are_enlarged_bilinearly_to_labels_of_the_input_s_size(mode) -> None:
    def terms_of(sample: Sample, **changes) -> dict[str, Tensor]:
        """The loss terms of a step, with norm layers in evaluation."""
        model = build_model()
        model.learn(STAGES[mode].trains)
        return builders.take_step(model.eval(), mode, [sample], sub_batch_size=9, **changes)[0]

    found, plain = terms_of(FULL, full_labels=True), terms_of(SAMPLE)
    logits = builders.forward(build_model(), mode, SAMPLE, build_settings())[0]
    boxes = PatchGrid.cover(SIZE, SIDE, builders.MIN_OVERLAP).boxes()
    local = torch.stack([box.of(SAMPLE.label) for box in boxes])
    targets = {"global": FULL.global_label[None], "local": local, "ensemble": local}
    for name in STAGES[mode].supervised:
        scores = logits.global_ if name == "global" else getattr(logits, name)
        larger = F.interpolate(scores, targets[name].shape[1:], mode="bilinear", align_corners=False)
        expected = focal_loss(larger, targets[name])
        assert found[f"focal_{name}"] == pytest.approx(float(expected), rel=1e-4), name
        assert float(found[f"focal_{name}"]) != float(plain[f"focal_{name}"])


def test_the_shrunk_label_is_as_large_as_the_shrunk_image(tmp_path) -> None:
    label = (torch.arange(600).view(20, 30) % 5).byte()
    item = builders.write_item(tmp_path, "a", np.zeros((20, 30, 3)), label.numpy())
    data = SegmentationDataset([item], Classes.generic(5), 16)
    for data.full_labels, side in ((False, 4), (True, 16)):
        assert torch.equal(data[0].global_label, shrink_label(label, (side, side)))
