"""Seams and borders: counted right, and gone where patches are blended."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_header, build_sample, build_settings, forward, shared_model
from pictures import save

from benchmarks import seams
from benchmarks.seams import BoundaryIou, Seams
from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from models import checkpoint
from utils.canvas import UPSAMPLES, ArgmaxSink, ScoreCanvas
from utils.classes import IGNORED
from utils.stages import STAGES
from utils.tiling import BLENDS, PatchGrid

pytestmark = pytest.mark.slow

CHOICES = list(product(BLENDS, UPSAMPLES))


def test_blending_removes_the_lattice_of_a_random_network() -> None:
    """Class borders on patch borders, as a multiple of chance. In blocks every class border is one of cells, as is
    every patch border, so that the multiple is large without any seam."""
    found, grid = forward(shared_model(), 2, build_sample((101, 131)), build_settings())
    ratios = {}
    for blend, upsample in CHOICES:
        counted = Seams()
        ids = ArgmaxSink(grid.image)
        ScoreCanvas(grid, ids, blend=blend, upsample=upsample).add(found.local, slice(0, len(grid)))
        counted.update(ids.ids, grid)
        ratios[blend, upsample] = counted.to_record()["ratio"]
    for blend in ("linear", "gaussian"):
        assert ratios[blend, "nearest"] < 0.7 * ratios["none", "nearest"]
        assert ratios[blend, "bilinear"] < 1.4 < 2 < ratios["none", "bilinear"]


def test_seams_are_counted_against_chance() -> None:
    grid = PatchGrid.cover((100, 100), 60, 20)  # patches at 0 and 40: borders at 40 and 60
    ids = torch.zeros(100, 100, dtype=torch.uint8)
    ids[:, 40:] = 1
    ids[:, 50:] = 2
    found = Seams()
    found.update(ids, grid)
    assert found == Seams(pairs=2 * 99 * 100, lines=2 * 2 * 100, borders=200, seams=100)
    assert found.to_record() == pytest.approx({"share": 0.5, "chance": 2 / 99, "ratio": 0.5 / (2 / 99)})
    one = Seams()
    one.update(ids, PatchGrid.cover((100, 100), 100, 20))
    assert one.to_record() == {"share": 0, "chance": 0, "ratio": 0}


def test_boundary_iou_reads_the_pixels_near_borders_alone() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[:, 20:] = 1
    perfect, shifted = BoundaryIou(2, 3), BoundaryIou(2, 3)
    perfect.update(truth, truth)
    assert perfect.union.tolist() == [120, 120]  # 3 columns on each side; the edge of the image is no border
    assert perfect.mean(()) == 1
    shifted.update(truth, np.roll(truth, 1, axis=1))  # which also wraps one column of class 1 to the left
    assert shifted.hit[1] == 2 * 40
    assert shifted.mean((0,)) == shifted.hit[1] / shifted.union[1]
    ignored = truth.copy()
    ignored[:, 18:22] = IGNORED
    masked = BoundaryIou(2, 3)
    masked.update(ignored, truth)
    assert masked.hit.tolist() == [0, 0]


def test_the_benchmark_measures_every_choice(tmp_path: Path, capsys) -> None:
    synthetic.generate(tmp_path / "data", 6, 96, seed=0, prepared=False)
    weights = tmp_path / "weights.pth"
    checkpoint.save(weights, shared_model(7), build_header(2, classes=DEEP_GLOBE))
    common = ["--checkpoint", weights, "--json", tmp_path / "seams.json", "--device", "cpu"]
    data = ["--data_path", tmp_path / "data", "--split", "train", "--limit", "1"]
    assert seams.main([*map(str, common + data)]) == 0
    record = json.loads((tmp_path / "seams.json").read_text())
    assert [(one["blend"], one["upsample"]) for one in record["runs"]] == CHOICES
    assert all(0 <= one[name]["boundary_iou"] <= 1 for one in record["runs"] for name in STAGES[2].predictions)
    assert record["runs"][0]["global"] == record["runs"][2]["global"]
    text = capsys.readouterr().out
    assert "boundary IoU within 3 pixels" in text
    save(tmp_path / "a.png", (90, 80))
    assert seams.main([*map(str, common), "--input", str(tmp_path / "a.png"), "--mode", "1"]) == 0
    record = json.loads((tmp_path / "seams.json").read_text())
    assert [(one["blend"], one["upsample"]) for one in record["runs"]] == [("none", one) for one in UPSAMPLES]
    assert set(record["runs"][0]["global"]) == {"share", "chance", "ratio"}
