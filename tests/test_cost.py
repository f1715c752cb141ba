"""Operations of a step are those of its convolutions; hours follow from them."""

import pytest
from torch import nn

from benchmarks import fake_accelerator
from benchmarks.cost import Geometry, inference_operations, stage_hours, training_operations

SMALL = Geometry(side=128, size_g=64, size_p=64, backbone="resnet18")


def test_a_stage_with_more_branches_computes_more() -> None:
    found = {mode: inference_operations(mode, SMALL) for mode in (1, 2, 3)}
    assert 0 < found[1] < found[2] < found[3]
    assert training_operations(1, SMALL) > 2 * found[1]  # forward, and gradients of weights and of maps


def test_a_multiply_add_counts_two(monkeypatch) -> None:
    class OneConvolution:
        def __init__(self, *_: object) -> None:
            self.layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)

        def __call__(self, sample) -> None:
            self.layer(sample.global_image[None].float())

    monkeypatch.setattr(fake_accelerator, "Inference", OneConvolution)
    assert inference_operations(1, SMALL) == 2 * 64 * 64 * 3 * 8 * 9


def test_hours_are_operations_over_the_rate() -> None:
    assert stage_hours(2e12, 1e12, images=300, validation=120, epochs=50, tflops=10) == pytest.approx(1.0)
