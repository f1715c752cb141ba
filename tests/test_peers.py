"""The benchmark of other networks: all segment the same image, each in its precision, and are counted and timed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.baselines import build_network, padded


def test_all_networks_are_counted_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    sizes = ["--side", "100", "--size", "72", "--rounds", "1", "--device", "cpu"]
    assert peers.main([*sizes, "--networks", "GLNet, mode 2", "U-Net", "DeepLabV3", "--output", str(tmp_path)]) == 0
    rows = {row["network"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert set(rows) == {"GLNet, mode 2", "U-Net", "DeepLabV3"}
    for row in rows.values():
        assert row["gmac"] > 0 and all(len(row[name]["seconds"]) == 1 for name in ("fp32", "bf16"))
        assert 0.4 < row["bf16"]["mb"] / row["fp32"]["mb"] < 0.7  # nearly all of it halves
    table = (tmp_path / "peers.md").read_text()
    assert "| U-Net |" in table and "| 1.00 |" in table


def test_sides_are_padded_and_cropped() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    network = build_network("unet", "resnet18", 3).eval()
    x = torch.rand(1, 3, 40, 64)
    with torch.inference_mode():
        logits = padded(network, x)
        whole = network(torch.cat([x, torch.zeros(1, 3, 24, 64)], dim=2))
    assert logits.shape == (1, 3, 40, 64) and torch.equal(logits, whole[:, :, :40])
