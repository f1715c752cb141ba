"""Activations that are computed again in the backward pass: the same training step, bit by bit."""

from copy import deepcopy

import pytest
import torch
from builders import N_CLASS, build_model, build_sample, gradients, train_epoch
from torch import Tensor, nn

from models.glnet import GLNet
from utils.stages import STAGES


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
