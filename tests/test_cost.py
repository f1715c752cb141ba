"""Operations of a step are those of its convolutions; hours follow from them."""

import pytest
from torch import nn

from benchmarks import cost, memory
from benchmarks.__main__ import main
from benchmarks.cost import count_operations, encoder_size, stage_hours
from benchmarks.memory import count_inference
from models.timm_backbone import TimmBackbone, layout_of

SMALL = {"side": 128, "size_g": 64, "size_p": 64, "backbone": "resnet18"}


def test_a_stage_with_more_branches_computes_more() -> None:
    found = {mode: count_operations(mode, training=False, **SMALL) for mode in (1, 2, 3)}
    assert 0 < found[1] < found[2] < found[3]
    assert count_operations(1, training=True, **SMALL) > 2 * found[1]  # forward, and gradients of weights and of maps


def test_a_multiply_add_counts_two(monkeypatch) -> None:
    class OneConvolution:
        def __init__(self, *_: object) -> None:
            self.layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)

        def __call__(self, sample) -> None:
            self.layer(sample.global_image[None].float())

    monkeypatch.setattr(memory, "Inference", OneConvolution)
    assert count_operations(1, training=False, **SMALL) == 2 * 64 * 64 * 3 * 8 * 9


def test_hours_are_operations_over_the_rate() -> None:
    assert stage_hours(2e12, 1e12, images=300, validation=120, epochs=50, tflops=10) == pytest.approx(1.0)


def test_memory_and_operations_of_encoders_of_timm_are_counted() -> None:
    pytest.importorskip("test_encoders")  # registers the network, whose constructor reads numbers from tensors
    name = "timm/small_swin"
    layout_of(name)  # as the commands do first
    assert count_inference(1, "fp32", side=96, size=64, backbone=name)["device"] > 0
    found = encoder_size(name, 64)
    assert found["parameters"] == sum(p.numel() for p in TimmBackbone(name).parameters()) / 1e6
    assert found["gmac"] > 0


def test_the_table_has_a_row_for_each_stage_of_each_encoder(monkeypatch, capsys) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(cost, "count_operations", lambda *_, training, **__: 2e12 if training else 1e12)
    monkeypatch.setattr(cost, "count_training", lambda mode, *_: {"device": 100.0 * mode})
    monkeypatch.setattr(cost, "count_inference", lambda *_, **__: {"device": 50.0})
    names = ["timm/test_convnext", "resnet18"]
    assert main(["cost", "--memory", "--num_epochs=1", "--backbone", *names]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[name, stage] for name in names for stage in ("1", "2", "3", "all")]
    assert [row[8:] for row in rows[:4]] == [["100", "-"], ["200", "-"], ["300", "50"], ["-", "-"]]
    assert main(["cost", "--backbone", "timm/vit_tiny_patch16_224"]) == 2
    assert main(["no_benchmark"]) == 2
