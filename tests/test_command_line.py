"""Wrong combinations of options stop at once: exit code 2, one line that names the option, nothing written."""

import re
from pathlib import Path

import pytest
from builders import N_CLASS, SIDE, write_released_checkpoint, write_thin_checkpoint

import train_deep_globe
from dataset import synthetic
from dataset.registry import describe
from evaluation.run import refuse_data_folder
from utils.errors import InputError

MODES = {  # everything that training in a mode needs
    1: ["--mode=1", "--backbone_weights=none"],
    2: ["--mode=2", "--path_g=g.pth"],
    3: ["--mode=3", "--path_g=g.pth", "--path_g2l=g2l.pth"],
}
EVALUATION = ["--evaluation", "--mode=3", "--path_l2g=l2g.pth"]

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
    "file of another stage to start from": (
        ["--mode=2", "--path_g=g2l.pth", "--data_path=data"],
        r"g2l\.pth .*stage 2 .*--path_g2l",
    ),
    "file of another stage as context": (
        ["--mode=3", "--path_g=g2l.pth", "--path_g2l=g2l.pth", "--data_path=data"],
        r"g2l\.pth .*stage 2 .*--path_g2l",
    ),
    "file of another stage to evaluate": (
        ["--evaluation", "--mode=2", "--path_g2l=l2g.pth", "--data_path=data"],
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
    "coarse to fine of many classes": (
        [*MODES[2], "--coarse_to_fine", "--data_path=data"],
        "--coarse_to_fine .*5 classes",
    ),
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
    (root / "models").mkdir()
    (root / "empty").mkdir()
    for layout in ("train", "crossvali"):
        (root / "data" / layout / "Sat").mkdir(parents=True)
        (root / "data" / layout / "Label").mkdir()
        (root / "data" / layout / "Sat" / "1_sat.jpg").touch()
        (root / "data" / layout / "Label" / "1_mask.png").touch()
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
    code = train_deep_globe.main(["--data_path=empty", "--model_path=models", "--log_path=logs", *arguments])
    told = capsys.readouterr()
    assert code == 2
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert re.search(message, told.err), told.err
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
    data = describe("deep_globe", synthetic_data(tmp_path / "data")).open("train", SIDE)
    refuse_data_folder(tmp_path / "predictions", data)
    with pytest.raises(InputError, match=r"--save_predictions .* overwrite the labels"):
        refuse_data_folder(tmp_path / "predictions" / ".." / "data", data)


def synthetic_data(folder: Path) -> Path:
    synthetic.generate(folder, 3, 64, seed=0, prepared=False)
    return folder
