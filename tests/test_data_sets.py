"""The script on other sets than DeepGlobe: their classes, measures and settings, losses, and other classes' weights."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from builders import BACKBONE, N_CLASS, SIDE, build_header, build_thin_model, write_released_checkpoint
from PIL import Image

import train_deep_globe
from dataset.describe import main as describe_main
from dataset.registry import describe
from models import checkpoint
from training import setup
from training.options import build_parser
from utils.classes import Classes
from utils.errors import InputError
from utils.stages import STAGES

SIZES = [(70, 100), (64, 64), (90, 66), (50, 40), (100, 70), (66, 90)]
"""Height and width: some with several patches, one smaller than a patch."""

LOSS = {1: [], 2: ["--loss=ce", "--class_weights", "1", "3"], 3: ["--loss=focal+lovasz", "--gamma=2"]}
"""By mode, the options of the loss."""

TERMS = {
    1: {"focal_global"},
    2: {"ce_local", "ce_ensemble", "fmreg"},
    3: {"focal+lovasz_global", "focal+lovasz_ensemble"},
}


def write_lesions(root: Path) -> None:
    """Dark ellipses on skin; a strip of the first label is ignored."""
    rng = np.random.default_rng(0)
    for k, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        inside = ((y - height / 2) / (height / 3)) ** 2 + ((x - width / 2) / (width / 4)) ** 2 < 1
        image = (
            rng.integers(0, 60, (height, width, 3), np.uint8) + np.where(inside, 40, 160).astype(np.uint8)[..., None]
        )
        label = np.where(inside, 255, 0).astype(np.uint8)
        if k == 0:
            label[:5] = 7
        Image.fromarray(image).save(root / f"L{k}.png")
        Image.fromarray(label).save(root / f"L{k}_lesion.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> runs.Folders:
    """Folders in which a set of one's own was described, trained on in three stages and evaluated."""
    root = tmp_path_factory.mktemp("lesions")
    (root / "pictures").mkdir()
    write_lesions(root / "pictures")
    patterns = ["--images", "{id}.png", "--labels", "{id}_lesion.png", "--names", "skin", "lesion", "--ignore", "7"]
    measures = ["--measures", "jaccard", "thresholded_jaccard", "accuracy", "--val", "0.34", "--quiet"]
    assert describe_main([str(root / "pictures"), *patterns, *measures]) == 0
    folders = runs.Folders(root, root / "pictures" / "dataset.json")
    for mode in (1, 2, 3):
        more = ["--num_epochs=1", "--lr=1e-3", *LOSS[mode]]
        assert train_deep_globe.main([*folders.arguments(mode, *more), "--dataset=folder"]) == 0
    assert train_deep_globe.main(evaluation(folders, f"--save_predictions={root / 'predictions'}")) == 0
    return folders


def evaluation(folders: runs.Folders, *more: str) -> list[str]:
    where = [f"--data_path={folders.data}", f"--model_path={folders.models}", f"--log_path={folders.logs}"]
    return [*where, "--dataset=folder", "--evaluation", "--mode=3", "--path_l2g=three.pth", "--num_workers=0", *more]


def test_the_evaluation_reports_what_its_saved_predictions_show(work) -> None:
    record = json.loads((work.logs / "glnet.json").read_text())
    assert (record["classes"], record["left_out"]) == (["skin", "lesion"], ["skin"])
    jaccards, right, known, hits, unions = [], 0, 0, 0, 0
    items = describe("folder", work.data).find("val")
    assert record["images"] == len(items) == 2
    for item in items:
        label = np.asarray(Image.open(item.label))
        guess = np.asarray(Image.open(work.root / "predictions" / f"{item.id}_mask.png").convert("L"))
        counted = label != 7
        truth, guess = label[counted] == 255, guess[counted] == 255
        hit, union = (truth & guess).sum(), (truth | guess).sum()
        jaccards.append(hit / union if union else 1.0)
        right, known = right + (truth == guess).sum(), known + counted.sum()
        hits, unions = hits + hit, unions + union
    found = record["ensemble"]
    assert found["jaccard"] == pytest.approx(np.mean(jaccards))
    assert found["thresholded_jaccard"] == pytest.approx(np.mean([j * (j >= 0.65) for j in jaccards]))
    assert found["accuracy"] == pytest.approx(right / known)
    assert found["mIoU"] == pytest.approx(hits / unions if unions else 0)


def test_measures_and_the_terms_of_the_chosen_loss_are_in_the_records(work) -> None:
    """Classes and measures are in every checkpoint, too."""
    for mode, terms in TERMS.items():
        name = runs.NAMES[mode]
        header = checkpoint.read(work.models / f"{name}.pth").header
        assert header.classes == describe("folder", work.data).classes
        assert header.classes.measures == ("jaccard", "thresholded_jaccard", "accuracy")
        (line,) = work.epochs(name)
        scalars = runs.read_events(work.logs / name).Tags()["scalars"]
        for part in ("train", "validation"):
            for prediction in STAGES[mode].predictions:
                assert 0 <= line[part][prediction]["jaccard"] <= 1
                assert f"jaccard/{prediction}_{part}" in scalars
        tags = {f"loss/{term.replace('+', '_')}" for term in (*terms, "total")}
        assert {tag for tag in scalars if tag.startswith("loss/")} == tags


def test_another_number_of_classes_is_refused_and_another_name_told(work, tmp_path, capsys, caplog) -> None:
    caplog.set_level("INFO")
    record = json.loads(work.data.read_text()) | {"root": str(work.data.parent)}
    record["classes"][1]["name"] = "naevus"
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    assert train_deep_globe.main(evaluation(work, f"--data_path={tmp_path}", "--task_name=named")) == 0
    assert "three.pth was made with the classes skin, lesion; here skin, naevus" in caplog.text
    capsys.readouterr()
    record["classes"].append({"name": "hair", "value": 9})
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    assert train_deep_globe.main(evaluation(work, f"--data_path={tmp_path}")) == 2
    told = capsys.readouterr().err
    assert "three.pth was made with 2 classes (skin, lesion), but" in told
    assert "has 3 (skin, naevus, hair)" in told


def test_check_data_reads_a_set_of_ones_own(work, capsys) -> None:
    arguments = ["--dataset=folder", f"--data_path={work.data}", "--check_data", "--num_workers=0"]
    assert train_deep_globe.main(arguments) == 0
    told = capsys.readouterr().out
    assert "Read: 4 of train, 2 of val" in told
    assert "lesion" in told
    assert "Left out: " in told


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


@pytest.mark.parametrize(("name", "size_p", "batch_size"), [("inria", 536, 4), ("isic", 508, 6)])
def test_the_sets_settings_are_the_defaults(tmp_path, name, size_p, batch_size) -> None:
    described, options = describe(name, tmp_path), parse(f"--backbone={BACKBONE}")
    options, header = setup.resolve(options, {}, described)
    assert (header.size_p, options.batch_size, options.split) == (size_p, batch_size, "val")
    assert header.classes == described.classes
    given = parse(f"--backbone={BACKBONE}", "--size_p=100", "--batch_size=3", "--split=test")
    given, header = setup.resolve(given, {}, described)
    assert (header.size_p, given.batch_size, given.split) == (100, 3, "test")
    with pytest.raises(InputError, match=r"--n_class 4: .* has 2 classes"):
        setup.resolve(parse("--n_class=4"), {}, described)
    # what the checkpoint records goes before; of the file that stage 1 starts from, backbone and normalisation alone
    files = {"path_g": checkpoint.Checkpoint(tmp_path / "g.pth", build_header(1, classes=described.classes), {})}
    assert setup.resolve(parse("--mode=2"), files, described)[1].size_p == SIDE
    files = {"init_from": checkpoint.Checkpoint(tmp_path / "a.pth", build_header(3, normalize="half"), {})}
    _, header = setup.resolve(parse(), files, described)
    assert (header.backbone, header.normalize, header.size_p) == (BACKBONE, "half", size_p)
    assert header.classes == described.classes


@pytest.mark.parametrize("made", ["stage 1", "stage 2", "stage 3", "released 1"])
def test_stage_1_keeps_all_but_heads_and_ensemble_of_other_classes(tmp_path, caplog, made) -> None:
    caplog.set_level("INFO")
    path, stage = tmp_path / "a.pth", int(made[-1])
    if made.startswith("released"):
        source = write_released_checkpoint(path, stage).state_dict()
    else:
        source = build_thin_model(prefix=made).state_dict()
        checkpoint.save(path, build_thin_model(prefix=made), build_header(stage))
    classes = Classes.generic(N_CLASS + 1)
    header = build_header(1, classes=classes, backbone_weights="none")
    torch.manual_seed(0)
    model = setup.build_training_model(header, {})
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = STAGES[3].uses if made.startswith("released") else STAGES[stage].uses
    torch.manual_seed(0)
    model = setup.build_training_model(header, {"init_from": checkpoint.read(path)})
    for name, tensor in model.state_dict().items():
        kept = name.split(".")[0] in held and ".head." not in name and not name.startswith("ensemble.")
        expected = source if kept else new
        if made.startswith("released") and name.startswith("refined.backbone."):
            continue  # released files of stage 1 have none
        assert torch.equal(tensor, expected[name]), name
    assert f"Starting from {path}: backbones and pyramids are kept; heads and ensemble are new, for 6" in caplog.text
