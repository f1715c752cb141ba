"""The shell scripts, run as a user runs them: three stages and the evaluation on a tiny set, from another directory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from dataset.registry import describe
from models.checkpoint import export
from training.log import RULE
from utils.metrics import ConfusionMatrix
from utils.stages import PREDICTIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("global", "global2local", "local2global")
SCRIPTS = (*(f"train_deep_globe_{stage}.sh" for stage in STAGES), "eval_deep_globe.sh")
TASKS = tuple(f"fpn_deepglobe_{stage}" for stage in STAGES)
SIZE = 128
NETWORK = ("--backbone=resnet18", "--size_g=64", "--size_p=64", "--min_overlap=16")
TRAINING = ("--num_epochs=1", "--batch_size=2", "--num_workers=0")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `command` in `folder`, with relative paths that only hold there."""
    paths = {"DATA_PATH": "data", "MODEL_PATH": "models", "LOG_PATH": "logs", "PYTHON": sys.executable}
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=300
    )


def run_script(name: str, *arguments: str, folder: Path, **environment: str) -> str:
    done = run([str(ROOT / name), *arguments], folder, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def scores(record: dict) -> dict:
    return {name: record[name] for name in PREDICTIONS}


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder in which all scripts ran; it goes when the tests are over, for its files are large."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "data", 4, SIZE, seed=0)
        (folder / "models").mkdir()
        for ending in (".pth", ".best.pth"):
            (folder / "models" / f"{TASKS[0]}{ending}").write_text(f"an older run's {ending}")
        run_script(SCRIPTS[0], *NETWORK, "--backbone_weights=none", *TRAINING, folder=folder)
        run_script(SCRIPTS[1], *TRAINING, folder=folder)
        run_script(SCRIPTS[2], *TRAINING, folder=folder)
        table = run_script(SCRIPTS[3], "--num_workers=0", "--save_predictions=pictures", folder=folder)
        (folder / "table.txt").write_text(table)
        yield folder


def test_every_stage_leaves_its_last_and_its_best_checkpoint_and_keeps_older_ones(work) -> None:
    names = {path.name for path in (work / "models").iterdir()}
    expected = {f"{task}{ending}" for task in TASKS for ending in (".pth", ".best.pth")}
    assert names == expected | {f"{TASKS[0]}.previous.pth", f"{TASKS[0]}.best.previous.pth"}
    for ending in (".pth", ".best.pth"):
        older = work / "models" / f"{TASKS[0]}{ending}"
        assert older.with_suffix(".previous.pth").read_text() == f"an older run's {ending}"
    for task in TASKS:
        lines = (work / "logs" / f"{task}.log").read_text().splitlines()
        assert (len(lines), lines[-1]) == (10, RULE)
        assert list((work / "logs" / task).rglob("events.out.tfevents.*"))


def test_saved_predictions_are_class_colours_and_give_the_written_scores(work) -> None:
    data = describe("deep_globe", work / "data").open("crossvali", 64)
    matrix = ConfusionMatrix(len(DEEP_GLOBE))
    assert {path.name for path in (work / "pictures").iterdir()} == {f"{item.id}_mask.png" for item in data.items}
    for sample in data:
        picture = Image.open(work / "pictures" / f"{sample.id}_mask.png")
        assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
        hits = np.asarray(picture)[None] == np.array(DEEP_GLOBE.palette)[:, None, None]  # (7, H, W, 3)
        hits = hits.all(axis=3)
        assert hits.any(axis=0).all()
        matrix.update(sample.label, sample.label.new_tensor(hits.argmax(axis=0)))
    written = json.loads((work / "logs" / "eval.json").read_text())
    np.testing.assert_allclose(matrix.iou(), np.array(written["ensemble"]["iou"], dtype=float))
    assert (written["mode"], written["images"], written["classes"]) == (3, 1, list(DEEP_GLOBE.names))
    assert written["seconds_per_image"] > 0 and written["peak_memory_mb"] > 0
    for name in PREDICTIONS:
        mean = sum(value or 0 for value in written[name]["iou"][1:]) / 6
        assert written[name]["mIoU"] == pytest.approx(mean)
        assert f"{100 * mean:.2f}" in (work / "table.txt").read_text()


def test_the_three_released_files_alone_give_the_same_scores(work) -> None:
    """Also when the scripts' own files are not there: only what the exporter wrote."""
    files = [[work / folder / f"{task}.pth" for folder in ("models", "released")] for task in TASKS]
    for source, target in files[:2]:
        export(source, target)
    done = run([sys.executable, "-m", "models.checkpoint", "export", *map(str, files[2])], ROOT)
    assert done.returncode == 0, done.stderr
    run_script(SCRIPTS[3], *NETWORK, "--num_workers=0", folder=work, MODEL_PATH="released", LOG_PATH="released_logs")
    records = [json.loads((work / logs / "eval.json").read_text()) for logs in ("logs", "released_logs")]
    assert scores(records[0]) == scores(records[1])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("exists", [True, False])
def test_without_data_a_script_stops_and_tells_how_to_get_them(tmp_path, script, exists) -> None:
    if exists:
        (tmp_path / "data").mkdir()
    before = set(tmp_path.rglob("*"))
    done = run([str(ROOT / script)], tmp_path)
    assert done.returncode != 0
    assert "There are no images in data" in done.stderr
    for advice in ("DATA_PATH", "DeepGlobe", "dataset.synthetic", "demo.sh"):
        assert advice in done.stderr
    assert set(tmp_path.rglob("*")) == before


def test_a_script_ends_with_the_exit_code_of_what_it_runs(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1_sat.jpg").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    python.chmod(0o755)
    sets = ("inria", "isic", "dubai", "pages")
    others = [(f"train_{name}.sh", stage) for name in sets for stage in ("1", "2", "3", "eval")]
    for script, *stage in (*((script,) for script in SCRIPTS), *others):
        done = run([str(ROOT / script), *stage, "--batch_size=3", "a b"], tmp_path, PYTHON=str(python))
        assert done.returncode == 7
        # what the caller gives comes last, so that it wins, and unsplit
        assert done.stdout.splitlines()[-2:] == ["--batch_size=3", "a b"]


@pytest.mark.parametrize("name", ["inria", "isic", "dubai", "pages"])
def test_a_script_with_its_stage_as_argument_passes_what_that_stage_needs(tmp_path, name) -> None:
    (tmp_path / "data.json").touch()
    echo = {"PYTHON": "/bin/echo", "DATA_PATH": "data.json", "BACKBONE": "resnet18"}
    script, stages = f"train_{name}.sh", ("1", "2", "3", "eval")
    told = {stage: run_script(script, stage, "--lr=3", folder=tmp_path, **echo).split() for stage in stages}
    for stage, words in told.items():
        assert words[1:5] == ["--dataset", "folder" if name == "pages" else name, "--data_path", "data.json"]
        task = f"eval_{name}" if stage == "eval" else f"fpn_{name}_{STAGES[int(stage) - 1]}"
        assert words[words.index("--mode") + 1] == stage.replace("eval", "3")
        assert words[words.index("--task_name") + 1] == task
        assert words[-1] == "--lr=3"
        if name == "dubai":  # trained on windows, evaluated on whole scenes
            assert ("--window" in words) == (stage != "eval")
            assert ("--size_p" in words) == (stage == "1")  # later stages take it from the checkpoint
        if name in ("dubai", "pages"):
            assert ("resnet18" in words) == (stage == "1")
    files = ["--path_g", f"fpn_{name}_global.pth", "--path_g2l", f"fpn_{name}_global2local.pth"]
    assert [word for word in told["3"] if word in files][:4] == files
    if name in ("dubai", "pages"):  # averaged weights, which come later, win
        assert f"fpn_{name}_global2local.ema.pth" in told["3"]
    assert f"fpn_{name}_local2global.pth" in told["eval"]
    for arguments in ([], ["4"], ["--help"]):
        refused = run([str(ROOT / script), *arguments], tmp_path, **echo)
        assert refused.returncode == 2
        assert "STAGE is" in refused.stderr


def test_the_pages_script_makes_a_set_of_xml_from_another_folder(tmp_path) -> None:
    echo = {"PYTHON": "/bin/echo", "DATA_PATH": "data.json"}
    prepared = run_script("train_pages.sh", "prepare", "books", "--val", "b", folder=tmp_path, **echo).split()
    assert prepared[:4] == ["-m", "dataset.alto", "--output", "data.json"]
    assert prepared[-3:] == ["books", "--val", "b"]
    (tmp_path / "books").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "books" / "f1.png")
    block = '<TextBlock TAGREFS="T"><Shape><Polygon POINTS="0 0 4 0 4 4"/></Shape></TextBlock>'
    alto = f'<alto><Tags><OtherTag ID="T" LABEL="MainZone"/></Tags><Layout><Page>{block}</Page></Layout></alto>'
    (tmp_path / "books" / "f1.xml").write_text(alto)
    assert "Written: pages" in run_script("train_pages.sh", "prepare", "books", folder=tmp_path, DATA_PATH="pages")
    assert (tmp_path / "pages" / "train.txt").read_text() == "f1\n"
