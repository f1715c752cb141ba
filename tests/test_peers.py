"""The benchmark of other networks: all segment the same image, each in its precision, and are counted and timed."""

import json

import pytest
import torch

from benchmarks import peers
from benchmarks.__main__ import main
from experiments.baselines import build_network, padded

pytest.importorskip("segmentation_models_pytorch")

pytestmark = pytest.mark.slow


def test_networks_are_counted_and_timed(tmp_path, capsys) -> None:
    arguments = ["--side=72", "--size_p=64", "--rounds=1", "--device=cpu", "--precisions=bf16"]
    more = ["--networks", "GLNet, mode 1", "U-Net", "--json", str(tmp_path / "peers.json")]
    assert main(["peers", *arguments, *more]) == 0
    rows = {row["network"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert set(rows) == {"GLNet, mode 1", "U-Net"}
    for row in rows.values():
        assert row["gmac"] > 0 and row["mb"] > 0 and row["seconds"] > 0
    table = capsys.readouterr().out
    assert "| network | precision | GMAC | seconds | of U-Net | MB |" in table
    assert rows["U-Net"]["ratio"] == 1 and "| U-Net | bf16 |" in table


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


def test_large_images_are_timed_and_their_results_kept(tmp_path) -> None:
    pytest.importorskip("rasterio")
    network = ["--mode=3", "--pyramid_width=8", "--size_g=64", "--size_p=64", "--scene_size=128"]
    written = ["--results", str(tmp_path / "out"), "--json", str(tmp_path / "large.json")]
    assert main(["large_images", "--gigapixels=4e-5", *network, *written, "--device=cpu", "--", "--cog"]) == 0
    (row,) = json.loads((tmp_path / "large.json").read_text())["rows"]
    assert row["side"] == 200 and row["patches"] == 4 * 16  # of four scenes
    assert sorted(file.name for file in (tmp_path / "out" / "out200").iterdir()) == ["200_mask.tif", "summary.json"]
