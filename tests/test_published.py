"""An evaluation and the released weights beside published numbers."""

import json
from pathlib import Path

import pytest
import torch
from builders import BACKBONE, build_header, build_thin_model

from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from evaluation import compare, released_weights
from evaluation.published import PAPER, PUBLISHED, USER, released_scores
from models import checkpoint
from utils.settings import STATISTICS
from utils.stages import STAGES

N_CLASS = len(DEEP_GLOBE)
SIZES = ["--size_g=64", "--size_p=64", "--min_overlap=16", f"--backbone={BACKBONE}"]


def evaluation(**changes) -> dict:
    scores = {"iou": [None, *[0.5] * 6], "mIoU": 0.6912, "mIoU_all": 0.6}
    record = {
        "dataset": "deep_globe",
        "split": "crossvali",
        "device": "cuda",
        "mode": 3,
        "classes": list(DEEP_GLOBE.names),
        "images": 207,
        "peak_memory_mb": 823.0,
        **dict.fromkeys(STAGES[3].predictions, scores),
    }
    return {**record, **changes}


def write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


def rows_of(text: str) -> dict[str, list[str]]:
    lines = (line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|"))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_run_is_shown_beside_published_numbers_with_the_difference_in_points(tmp_path, capsys) -> None:
    assert compare.main([str(write(tmp_path / "eval.json", evaluation())), "--published", "deep_globe"]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    # of the same split
    assert rows["released weights, mode 3"] == ["crossvali", "69.9", "-", "-0.78", USER]
    # of another split, and of an unknown one
    assert rows["GLNet"] == ["test", "71.6", "1865", "(-2.48)", PAPER]
    assert rows["BPT"][0] == "-"
    assert rows["BPT"][3] == "(-7.48)"
    assert len(rows) == 2 + len(PUBLISHED["deep_globe"].results)
    assert "207 images of split crossvali: mIoU 69.12 %, 823 MB" in text
    assert "gpustat" in text
    assert "max_memory_allocated" in text
    assert compare.main([str(write(tmp_path / "eval.json", evaluation(mode=1, split="test")))]) == 0
    names = list(rows_of(capsys.readouterr().out))
    assert names[2:4] == ["global branch alone", "released weights, mode 1"]  # results of the run's mode come first
    older = {name: value for name, value in evaluation().items() if name not in ("dataset", "split", "device")}
    assert compare.main([str(write(tmp_path / "eval.json", older))]) == 0
    text = capsys.readouterr().out
    assert "split unknown" in text
    assert rows_of(text)["GLNet"][3] == "(-2.48)"
    assert [(one.score, one.split, one.source) for one in released_scores(3)] == [
        *((69.9, "crossvali", USER), (71.6, "test", PAPER)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "cannot be read"),
        ("[1, 2]", "no evaluation's JSON"),
        ('{"epoch": 1}', "no evaluation's JSON"),
        (json.dumps(evaluation(mode=4)), "no evaluation's JSON"),
        (json.dumps(evaluation(ensemble=None)), "no evaluation's JSON"),
        (json.dumps(evaluation(classes=["skin", "lesion"])), "has 2 classes, DeepGlobe 7"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, refused, content, message) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    told = refused(compare.main, path)
    assert str(path) in told
    assert message in told
    refused(compare.main, tmp_path / "missing.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up images and the three released files, exported from networks of kilobytes."""
    root = tmp_path_factory.mktemp("released")
    synthetic.generate(root / "data", 16, 80, seed=0, prepared=True)
    (root / "weights").mkdir()
    for mode, name in released_weights.FILES.items():
        model = build_thin_model(N_CLASS, prefix=f"stage{mode}.")
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.fill_(1)
            elif tensor.dim() == 4:
                torch.empty(0).set_(tensor.untyped_storage()).mul_(0.03)  # its entries share memory
        checkpoint.save(root / "ours.pth", model, build_header(mode, N_CLASS))
        checkpoint.export(root / "ours.pth", root / "weights" / name)
    return root


def run(work: Path, *more: str, folder: str = "weights") -> int:
    where = [str(work / folder), f"--data_path={work / 'data'}", "--device=cpu", "--num_workers=0"]
    return released_weights.main([*where, *SIZES, *more])


def test_every_mode_is_evaluated_under_every_normalisation(work, capsys, tmp_path) -> None:
    assert run(work, f"--json={tmp_path / 'scores.json'}") == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "scores.json").read_text())
    assert (record["split"], record["images"]) == ("crossvali", 4)
    for mode, stage in STAGES.items():
        found = record["modes"][str(mode)]
        assert list(found) == list(STATISTICS)
        assert all(set(scores) == set(stage.predictions) for scores in found.values())
        (line,) = (line for line in lines if line.startswith(f"{mode:4}  {stage.headline}"))
        assert line.split()[2:5] == [f"{100 * scores[stage.headline]['mIoU']:.2f}" for scores in found.values()]
        assert all(f"{one.score} ({one.split}" in line for one in released_scores(mode))
    assert len({json.dumps(scores) for scores in record["modes"]["1"].values()}) > 1


def test_a_limit_and_missing_files_are_told(work, capsys, tmp_path) -> None:
    (work / "first").mkdir()
    name = released_weights.FILES[1]
    (work / "first" / name).hardlink_to(work / "weights" / name)
    assert run(work, "--limit=1", "--split=train", folder="first") == 0
    text = capsys.readouterr().out
    assert "1 of 12 images of train" in text
    assert "not comparable" in text
    assert f"   3  not evaluated: {released_weights.FILES[3]} missing" in text


@pytest.mark.parametrize(
    ("more", "folder", "message"),
    [
        ([], "data", "none of the released files"),
        (["--split=offical_crossvali"], "weights", "has no labels"),
        (["--limit=0"], "weights", "--limit 0 must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(work, capsys, more, folder, message) -> None:
    assert run(work, *more, folder=folder) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
