"""The benchmark of other networks: all segment the same image, each in its precision, and are counted and timed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.baselines import build_network, padded

pytest.importorskip("segmentation_models_pytorch")

pytestmark = pytest.mark.slow


def test_networks_are_counted_and_timed(tmp_path: Path) -> None:
    arguments = ["--side=72", "--size=64", "--rounds=1", "--device=cpu", "--precisions=bf16", f"--output={tmp_path}"]
    assert peers.main([*arguments, "--networks", "GLNet, mode 1", "U-Net"]) == 0
    rows = {row["network"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert set(rows) == {"GLNet, mode 1", "U-Net"}
    for row in rows.values():
        assert row["gmac"] > 0 and row["bf16"]["mb"] > 0 and len(row["bf16"]["seconds"]) == 1
    table = (tmp_path / "peers.md").read_text()
    assert "| network | GMAC | bf16, s | of U-Net | MB |" in table and "| 1.00 |" in table


def test_a_network_in_bfloat16_holds_half_and_gives_float32() -> None:
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        found = {precision: peers.build("DeepLabV3", "resnet50", precision)(x) for precision in ("fp32", "bf16")}
        halved = peers.build("DeepLabV3", "resnet50", "bf16")
    assert all(logits.shape == (1, 7, 64, 64) and logits.dtype == torch.float32 for logits in found.values())
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}


def test_sides_are_padded_and_cropped() -> None:
    network = build_network("unet", "resnet18", 3).eval()
    x = torch.rand(1, 3, 40, 64)
    with torch.inference_mode():
        logits = padded(network, x)
        whole = network(torch.cat([x, torch.zeros(1, 3, 24, 64)], dim=2))
    assert logits.shape == (1, 3, 40, 64) and torch.equal(logits, whole[:, :, :40])
