"""Coarse to fine from the command line: what is recorded, and evaluation and prediction that agree."""

import json

import numpy as np
import pytest
import runs
import torch
from builders import SIDE, build_header, build_model
from PIL import Image
from test_data_sets import evaluation, write_lesions

import predict
import train_deep_globe
from dataset.describe import main as describe_main
from dataset.registry import describe
from models import checkpoint

pytestmark = pytest.mark.slow

FOUND = 0.01
"""The part of all cells that the global branch finds to be foreground."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> runs.Folders:
    """A set of one's own, and random checkpoints whose global branch finds a few cells of its images."""
    root = tmp_path_factory.mktemp("coarse_to_fine")
    for folder in ("pictures", "models"):
        (root / folder).mkdir()
    write_lesions(root / "pictures")
    patterns = ["--images", "{id}.png", "--labels", "{id}_lesion.png", "--names", "skin", "lesion", "--ignore", "7"]
    assert describe_main([str(root / "pictures"), *patterns, "--val", "0.5", "--quiet"]) == 0
    folders = runs.Folders(root, root / "pictures" / "dataset.json")
    described = describe("folder", folders.data)
    model, data = build_model(2), described.open("val", SIDE)
    with torch.inference_mode():
        x = torch.stack([sample.global_image for sample in data]).float() / 255
        logits = model.global_(x)[0]
        model.global_.head.bias[0] += (logits[:, 1] - logits[:, 0]).flatten().quantile(1 - FOUND)
    for stage, name in runs.NAMES.items():
        header = build_header(stage, classes=described.classes, coarse_to_fine=stage > 1, box_margin=0.25)
        checkpoint.save(folders.models / f"{name}.pth", model, header)
    return folders


def test_prediction_follows_the_checkpoint_and_equals_evaluation(work, tmp_path, capsys) -> None:
    assert train_deep_globe.main(evaluation(work, f"--save_predictions={tmp_path / 'masks'}")) == 0
    table = capsys.readouterr().out
    record = json.loads((work.logs / "glnet.json").read_text())
    assert 0.1 < record["not_looked_at"] < 1
    assert 0 < record["not_computed"] < 1
    assert f"not looked at      {100 * record['not_looked_at']:.2f} % of pixels" in table
    names = [item.id for item in describe("folder", work.data).open("val", SIDE).items]
    images = [str(work.data.with_name(f"{name}.png")) for name in names]
    common = ["--checkpoint", str(work.models / "three.pth"), "--device=cpu", "--input", *images]
    assert predict.main(["--output", str(tmp_path / "predicted"), "--colors", *common]) == 0
    summary = json.loads((tmp_path / "predicted" / "summary.json").read_text())
    assert summary["coarse_to_fine"]
    assert summary["total"]["not_looked_at"] == pytest.approx(record["not_looked_at"])
    assert "per cent of their pixels not looked at" in capsys.readouterr().out
    for name in names:
        masks = [np.asarray(Image.open(tmp_path / kind / f"{name}_mask.png")) for kind in ("masks", "predicted")]
        assert np.array_equal(*masks)
    shares = [one["not_looked_at"] for one in summary["images"]]
    assert predict.main(["--output", str(tmp_path / "plain"), "--no-coarse_to_fine", *common]) == 0
    plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert (plain["coarse_to_fine"], plain["total"]["not_looked_at"]) == (False, None)
    wide = ["--box_margin=10", "--tta=flip", "--scene_size=64", "--probabilities"]
    assert predict.main(["--output", str(tmp_path / "wide"), *wide, *common]) == 0
    again = json.loads((tmp_path / "wide" / "summary.json").read_text())
    assert sum(one["not_looked_at"] for one in again["images"]) < sum(shares)
    with np.load(tmp_path / "wide" / f"{names[0]}_probabilities.npz") as file:
        assert np.isfinite(file["probabilities"]).all()


def test_training_takes_and_records_the_options(work, tmp_path) -> None:
    folders = work.beside(tmp_path)
    given = ["--dataset=folder", "--num_epochs=1", "--coarse_to_fine"]
    assert train_deep_globe.main([*folders.arguments(2, *given, "--box_margin=0.5"), "--task_name=two_more"]) == 0
    header = checkpoint.read(folders.models / "two_more.pth").header
    assert (header.stage, header.coarse_to_fine, header.box_margin) == (2, True, 0.5)
