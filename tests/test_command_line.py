"""Wrong combinations of options stop at once: exit code 2, one line that names the option, nothing written.

On other sets than DeepGlobe: their classes, measures and settings, losses, and other classes' weights.
"""

import argparse
import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from builders import BACKBONE, N_CLASS, SIDE, build_header, write_item, write_released_checkpoint, write_thin_checkpoint
from PIL import Image

import train_deep_globe
from dataset import synthetic
from dataset.describe import main as describe_main
from dataset.registry import describe
from evaluation.run import refuse_data_folder
from models import checkpoint
from training import setup
from training.options import build_parser
from utils.classes import Classes
from utils.errors import InputError
from utils.stages import STAGES

MODES = {  # everything that training in a mode needs
    1: ["--mode=1", "--backbone_weights=none"],
    2: ["--mode=2", "--path_g=g.pth"],
    3: ["--mode=3", "--path_g=g.pth", "--path_g2l=g2l.pth"],
}
EVALUATION = ["--evaluation", "--mode=3", "--path_l2g=l2g.pth"]
DATA = "--data_path=data"

REFUSED = {  # arguments, and what the line must say
    "mode 2 without the file of mode 1": (["--mode=2"], "--path_g FILE"),
    "mode 3 without the file of mode 2": (["--mode=3", "--path_g=g.pth"], "--path_g2l FILE"),
    "evaluation of mode 1 without its file": (["--evaluation", "--mode=1", "--path_g2l=g2l.pth"], "--path_g FILE"),
    "evaluation of mode 2 without its file": (["--evaluation", "--mode=2", "--path_g=g.pth"], "--path_g2l FILE"),
    "evaluation of mode 3 without its file": (["--evaluation", "--mode=3", "--path_g2l=g2l.pth"], "--path_l2g FILE"),
    "released mode 3 without the context": (["--evaluation", "--mode=3", "--path_l2g=released.pth"], "--path_g"),
    "size_g not divisible by 4": ([*MODES[1], "--size_g=510"], "--size_g 510 .*508 or 512"),
    "size_p not divisible by 4": ([*MODES[1], "--size_p=66"], "--size_p 66 .*64 or 68"),
    "overlap as long as the patch": ([*MODES[1], "--size_p=64", "--min_overlap=64"], "--min_overlap 64 .*--size_p 64"),
    "classes unlike the checkpoint": ([*MODES[2], "--n_class=7"], rf"--n_class 7: .*g\.pth was made with {N_CLASS}"),
    "backbone unlike the checkpoint": ([*MODES[2], "--backbone=resnet50"], r"--backbone resnet50: .*g\.pth .*resnet18"),
    "missing checkpoint": (["--mode=2", "--path_g=none.pth"], r"models/none\.pth: no such checkpoint"),
    "missing checkpoint to evaluate": (["--evaluation", "--path_g=none.pth"], r"models/none\.pth: no such checkpoint"),
    "file of another stage to start from": (["--mode=2", "--path_g=g2l.pth", DATA], r"g2l\.pth .*stage 2 .*--path_g2l"),
    "file of another stage as context": (
        ["--mode=3", "--path_g=g2l.pth", "--path_g2l=g2l.pth", DATA],
        r"g2l\.pth .*stage 2 .*--path_g2l",
    ),
    "file of another stage to evaluate": (
        ["--evaluation", "--mode=2", "--path_g2l=l2g.pth", DATA],
        r"l2g\.pth .*stage 3 .*--path_l2g",
    ),
    "predictions without evaluation": ([*MODES[1], "--save_predictions=pictures"], "--save_predictions .*--evaluation"),
    "task named as the file it starts from": ([*MODES[2], "--task_name=g"], r"--task_name g .*g\.pth"),
    "task that is no file name": ([*MODES[1], "--task_name=a/b"], "--task_name 'a/b'"),
    "weights of other classes in mode 2": ([*MODES[2], "--init_from=g.pth"], "--init_from g.pth .*mode 1 .*mode 2"),
    "weights of other classes to evaluate": ([*EVALUATION, "--init_from=g.pth"], "--init_from g.pth .*evaluation"),
    "missing weights of other classes": (["--mode=1", "--init_from=none.pth"], r"none\.pth: no such checkpoint"),
    "weights of another backbone": (
        ["--mode=1", "--init_from=models/g.pth", "--backbone=resnet50"],
        r"--backbone resnet50: models/g\.pth was made with resnet18",
    ),
    "lists of a published split": ([*MODES[1], "--split_lists=."], "--split_lists goes with inria, isic and dubai"),
    "too few class weights": ([*MODES[1], "--class_weights=1"], "--class_weights gives 1 numbers for 7 classes"),
    "classes of another set": (
        [*EVALUATION, "--dataset=isic", "--data_path=data"],
        rf"l2g\.pth was made with {N_CLASS} classes .* ISIC lesion segmentation has 2 \(skin, lesion\)",
    ),
    "coarse to fine of many classes": ([*MODES[2], "--coarse_to_fine", DATA], "--coarse_to_fine .*5 classes"),
    "device that is not there": ([*MODES[1], "--device=cuda:99"], "--device cuda:99"),
    "missing data": ([*MODES[1], "--data_path=nowhere"], "nowhere is no folder"),
    "split that the set lacks": (
        [*EVALUATION, "--split=validation", "--data_path=data", "--n_class=5"],
        "--split validation: DeepGlobe has train, crossvali, test, offical_crossvali",
    ),
    "another image's maps in training": ([*MODES[2], "--share=other"], "--share other goes with --evaluation"),
    "window without their number": ([*MODES[1], "--window=64"], "--window SIZE and --windows N go together"),
    "windows without their size": ([*MODES[1], "--windows=2"], "--window SIZE and --windows N go together"),
    "small window": ([*MODES[1], "--window=8", "--windows=2"], "--window 8 must be at least 32"),
    "windows to evaluate": ([*EVALUATION, "--window=64", "--windows=2"], "--window goes with training"),
    "augmentation to evaluate": ([*EVALUATION, "--augment"], "--augment goes with training"),
    "blending in training": ([*MODES[1], "--blend=linear"], "--blend linear goes with --evaluation"),
    "enlarging in training": ([*MODES[1], "--upsample=bilinear"], "--upsample bilinear goes with --evaluation"),
    "empty data": ([*MODES[1], "--data_path=empty"], "empty has no DeepGlobe images"),
    "missing backbone file": (["--mode=1", "--backbone_weights=none.pth", "--data_path=data"], "--backbone_weights"),
    **{
        f"{name} {value}": ([*MODES[1], f"--{name}={value}"], f"--{name} {value}")
        for name, value in [
            *(("batch_size", 0), ("sub_batch_size", -1), ("num_epochs", 0), ("n_class", -7), ("size_g", -508)),
            *(("size_p", 0), ("lr", "nan"), ("lamb_fmreg", -1.0), ("gamma", -1.0), ("num_workers", -1)),
            *(("min_overlap", -1), ("box_margin", -0.1), ("box_margin", 11.0), ("seed", -1)),
        ]
    },
}

UNPARSED = [  # arguments that argparse itself refuses, and the option that it names
    (["--mode=4"], "--mode"),
    (["--mode=one"], "--mode"),
    (["--dataset=cityscapes"], "--dataset"),
    (["--loss=dice"], "--loss"),
    (["--backbone=vgg16"], "--backbone"),
    (["--normalize=minmax"], "--normalize"),
    (["--epochs=3"], "--epochs=3"),
    (["--eval"], "--eval"),
    (["--share_maps"], "--share_maps is now --share own"),
    (["--no-share_maps"], "--no-share_maps is now --share none"),
    (["--warmup=5"], "--warmup was removed: the rate falls from the first step on"),
    (["--lr=1e-3", "--tf32"], "--tf32 was removed: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each stage, a released one of stage 3, a folder without images and one with two."""
    root = tmp_path_factory.mktemp("command_line")
    for name in ("models", "empty"):
        (root / name).mkdir()
    for split, name in product(("train", "crossvali"), ("Sat/1_sat.jpg", "Label/1_mask.png")):
        (root / "data" / split / name).parent.mkdir(parents=True)
        (root / "data" / split / name).touch()
    for stage, name in ((1, "g"), (2, "g2l"), (3, "l2g")):
        write_thin_checkpoint(root / "models" / f"{name}.pth", stage)
    write_released_checkpoint(root / "models" / "released.pth", 3)
    return root


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_combination_stops_with_one_line_and_writes_nothing(folder, monkeypatch, capsys, case) -> None:
    arguments, message = REFUSED[case]
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert train_deep_globe.main(["--data_path=empty", "--model_path=models", "--log_path=logs", *arguments]) == 2
    told = capsys.readouterr()
    assert re.fullmatch(f"error: .*{message}.*\n", told.err), told.err
    assert told.out == ""
    assert contents(folder) == before


@pytest.mark.parametrize(("arguments", "option"), UNPARSED)
def test_an_unknown_option_or_choice_stops_with_its_name(tmp_path, monkeypatch, capsys, arguments, option) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_deep_globe.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert option in last
    assert not list(tmp_path.iterdir())


def test_help_explains_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        train_deep_globe.main(["--help"])
    assert stop.value.code == 0
    _, *entries = capsys.readouterr().out.split("\n  --")
    explained = {entry.split()[0]: entry for entry in entries}
    for name, default in {"size_g": "508", "size_p": "508", "n_class": "7", "lamb_fmreg": "0.15", "mode": "1"}.items():
        assert f"{default})" in explained[name], name


def test_predictions_never_fall_on_the_labels(tmp_path) -> None:
    synthetic.generate(tmp_path / "data", 3, 64, seed=0, prepared=False)
    data = describe("deep_globe", tmp_path / "data").open("train", SIDE)
    refuse_data_folder(tmp_path / "predictions", data)
    with pytest.raises(InputError, match=r"--save_predictions .* overwrite the labels"):
        refuse_data_folder(tmp_path / "predictions" / ".." / "data", data)


SIZES = [(70, 100), (64, 64), (90, 66), (50, 40), (100, 70), (66, 90)]
"""Height and width: some with several patches, one smaller than a patch."""


def describe_lesions(root: Path, *options: str) -> runs.Folders:
    """Describe a set of dark ellipses on skin; a strip of the first label is ignored."""
    folder, rng = root / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for k, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        inside = ((y - height / 2) / (height / 3)) ** 2 + ((x - width / 2) / (width / 4)) ** 2 < 1
        pixels, label = rng.integers(0, 60, (height, width, 3)), np.where(inside, 255, 0)
        label[: 0 if k else 5] = 7
        write_item(folder, f"L{k}", pixels + np.where(inside, 40, 160)[..., None], label)
    patterns = ["--images", "{id}.png", "--labels", "{id}_label.png", "--names", "skin", "lesion", "--ignore", "7"]
    assert describe_main([str(folder), *patterns, "--quiet", *options]) == 0
    return runs.Folders(root, folder / "dataset.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> runs.Folders:
    """Folders in which a set of one's own was described, trained on in three stages and evaluated."""
    measures = ["--measures", "jaccard", "thresholded_jaccard", "accuracy", "--val", "0.34"]
    folders = describe_lesions(tmp_path_factory.mktemp("lesions"), *measures)
    losses = {1: [], 2: ["--loss=ce", "--class_weights", "1", "3"], 3: ["--loss=focal+lovasz", "--gamma=2"]}
    for mode, loss in losses.items():
        arguments = folders.arguments(mode, "--num_epochs=1", "--lr=1e-3", *loss, "--dataset=folder")
        assert train_deep_globe.main(arguments) == 0
    assert train_deep_globe.main(evaluation(folders, f"--save_predictions={folders.root / 'predictions'}")) == 0
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
    terms = {1: ("focal_global",), 2: ("ce_local", "ce_ensemble", "fmreg")}
    terms[3] = ("focal+lovasz_global", "focal+lovasz_ensemble")
    for mode, name in runs.NAMES.items():
        header = checkpoint.read(work.models / f"{name}.pth").header
        assert header.classes == describe("folder", work.data).classes
        assert header.classes.measures == ("jaccard", "thresholded_jaccard", "accuracy")
        (line,) = work.epochs(name)
        scalars = runs.read_events(work.logs / name).Tags()["scalars"]
        for part in ("train", "validation"):
            for prediction in STAGES[mode].predictions:
                assert 0 <= line[part][prediction]["jaccard"] <= 1
                assert f"jaccard/{prediction}_{part}" in scalars
        tags = {f"loss/{term.replace('+', '_')}" for term in (*terms[mode], "total")}
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
    assert all(part in told for part in ("Read: 4 of train, 2 of val", "lesion", "Left out: "))


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
    released = made.startswith("released")
    source = (write_released_checkpoint if released else write_thin_checkpoint)(path, stage).state_dict()
    header = build_header(1, classes=Classes.generic(N_CLASS + 1), backbone_weights="none")
    held, states = STAGES[3 if released else stage].uses, []
    for files in ({}, {"init_from": checkpoint.read(path)}):
        torch.manual_seed(0)
        states.append(setup.build_training_model(header, files).state_dict())
    new, found = states
    for name, tensor in found.items():
        kept = name.split(".")[0] in held and ".head." not in name and not name.startswith("ensemble.")
        if not (released and name.startswith("refined.backbone.")):  # released files of stage 1 have none
            assert torch.equal(tensor, (source if kept else new)[name]), name
    assert f"Starting from {path}: backbones and pyramids are kept; heads and ensemble are new, for 6" in caplog.text
