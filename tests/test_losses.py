"""Every loss against hand-computed values, the ignored id, class weights, the choice by name, `--loss_size full`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import MIN_OVERLAP, SIDE, build_model, build_sample, build_settings, forward, take_step, write_item
from golden_network import arrays
from torch import Tensor

from dataset.base import SegmentationDataset
from models.glnet import GLNet
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.loss import LOSSES, build_loss, check_class_weights, cross_entropy, focal_loss, lovasz_softmax
from utils.resize import shrink_label
from utils.stages import STAGES
from utils.tiling import PatchGrid

WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def random_batch(n_class: int = 3) -> tuple[Tensor, Tensor]:
    """Logits (2, K, 5, 4) and ids without an ignored one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, n_class, 5, 4, generator=generator)
    return logits, torch.randint(0, n_class, (2, 5, 4), generator=generator)


def test_lovasz_equals_the_released_value() -> None:
    golden = arrays("losses")
    loss = lovasz_softmax(torch.from_numpy(golden["logits"]), torch.from_numpy(golden["target"]))
    assert float(loss) == pytest.approx(float(golden["lovasz"]), rel=1e-6)


def test_lovasz_of_certain_answers_is_one_minus_iou_and_of_an_absent_class_its_highest_probability() -> None:
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


def test_weighted_focal_loss_equals_the_hand_computed_one() -> None:
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


def terms_of(model: GLNet, mode: int, sample, **changes) -> dict[str, Tensor]:
    """The loss terms of a step, with norm layers in evaluation."""
    model.learn(STAGES[mode].trains)
    return take_step(model.eval(), mode, [sample], sub_batch_size=9, **changes)[0]


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_logits_are_enlarged_bilinearly_to_labels_of_the_input_s_size(mode) -> None:
    settings = build_settings()
    found = terms_of(build_model(), mode, FULL, full_labels=True)
    logits = forward(build_model(), mode, SAMPLE, settings)[0]
    boxes = PatchGrid.cover(SIZE, SIDE, MIN_OVERLAP).boxes()
    targets = {"global": FULL.global_label[None], "local": torch.stack([box.of(SAMPLE.label) for box in boxes])}
    targets["ensemble"] = targets["local"]
    for name in STAGES[mode].supervised:
        scores = logits.global_ if name == "global" else getattr(logits, name)
        larger = F.interpolate(scores, targets[name].shape[1:], mode="bilinear", align_corners=False)
        expected = focal_loss(larger, targets[name])
        assert found[f"focal_{name}"] == pytest.approx(float(expected), rel=1e-4), name
        assert float(found[f"focal_{name}"]) != float(terms_of(build_model(), mode, SAMPLE)[f"focal_{name}"])


def test_the_shrunk_label_is_as_large_as_the_shrunk_image(tmp_path) -> None:
    label = (torch.arange(600).view(20, 30) % 5).byte()
    item = write_item(tmp_path, "a", np.zeros((20, 30, 3)), label.numpy())
    data = SegmentationDataset([item], Classes.generic(5), 16)
    assert torch.equal(data[0].global_label, shrink_label(label, (4, 4)))
    data.full_labels = True
    assert torch.equal(data[0].global_label, shrink_label(label, (16, 16)))
