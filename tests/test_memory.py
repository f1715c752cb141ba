"""Peak memory, counted on fake tensors: a change that needs more than these budgets fails."""

import pytest

pytest.importorskip("torch._subclasses.fake_tensor")

from benchmarks.memory import count_inference, count_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Accessing the data pointer")]


@pytest.mark.parametrize(
    ("side", "sub_batch", "precision", "budget"),
    [(1000, 1, "fp32", 620), (1000, 1, "bf16", 310), (2448, 6, "fp32", 880), (2448, 6, "bf16", 440)],
)
def test_inference_stays_within_its_budget(side, sub_batch, precision, budget) -> None:
    """The budget is that of a 2448 x 2448 image; one patch after another takes as much for a smaller one."""
    found = count_inference(sub_batch, precision, side=side)
    assert 50 < found["device"] < budget  # the weights alone take more than the lower bound
    assert found["host"] < 400


@pytest.mark.parametrize(("mode", "images", "gigabytes"), [(1, 6, 3.4), (2, 1, 4.2), (3, 6, 4.7)])
def test_a_training_step_with_2448_images_stays_within_its_budget(mode, images, gigabytes) -> None:
    """Of six images; mode 2 computes one after the other, so that one is enough to count it."""
    found = count_training(mode, "fp32", batch=images)
    assert 0.5 < found["device"] / 1024 < gigabytes  # weights and moments take more than half


def test_only_the_kept_local_maps_of_stage_three_are_on_the_host() -> None:
    found = count_training(mode=3, precision="fp32", side=1000, batch=2)
    images = 2 * (4 * 1000**2 + 508**2 * 3 + 127**2)
    kept = 2 * (9 + 1) * 128 * sum(side**2 for side in (127, 64, 32, 16)) * 4  # ps2 of nine patches and of the image
    assert images < found["host"] * 2**20 < 1.1 * (kept + images + 2**20)
