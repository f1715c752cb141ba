"""The curve of `--refine_share`: its ends are the plain evaluation and the global prediction."""

import json
from pathlib import Path

import pytest
from builders import build_header, build_model, write_thin_checkpoint

import train_deep_globe
from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from experiments import refine
from models import checkpoint
from utils.stages import PREDICTIONS

pytestmark = pytest.mark.slow

STAGE = 2
COMMON = ["--sub_batch_size=4", "--device=cpu", "--num_workers=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refine")
    synthetic.generate(root / "data", 5, 160, seed=0, prepared=True)
    model = build_model(len(DEEP_GLOBE))
    for name in ("a", "b"):
        checkpoint.save(root / f"{name}.pth", model, build_header(STAGE, classes=DEEP_GLOBE))
        model.ensemble.weight.data.mul_(-1)
    return root


def arguments(folder: Path, *more: str) -> list[str]:
    return [f"--mode={STAGE}", f"--data_path={folder / 'data'}", f"--output={folder}", *COMMON, *more]


@pytest.fixture(scope="module")
def record(folder: Path) -> dict:
    files = [str(folder / name) for name in ("a.pth", "b.pth")]
    shares = ["--shares", "1", "0", "0.3", "0.6"]
    assert refine.main(arguments(folder, "--name=tiny", *shares, "--checkpoints", *files)) == 0
    return json.loads((folder / "refine_tiny.json").read_text())


def runs_of(record: dict, file: str) -> dict[float, dict]:
    return {run["refine_share"]: run for run in record["runs"] if Path(run["checkpoint"]).name == file}


@pytest.mark.parametrize("file", ["a.pth", "b.pth"])
def test_share_1_is_the_plain_evaluation_exactly_and_share_0_the_global_prediction(folder, record, file) -> None:
    more = ["--evaluation", f"--path_g2l={file}", "--task_name=plain"]
    where = [f"--model_path={folder}", f"--log_path={folder}", f"--data_path={folder / 'data'}"]
    assert train_deep_globe.main([f"--mode={STAGE}", *where, *COMMON, *more]) == 0
    plain = json.loads((folder / "plain.json").read_text())
    found = runs_of(record, file)
    for name in (*PREDICTIONS, "classes", "images"):
        assert found[1][name] == plain[name], name
    assert found[0]["local"] == found[0]["ensemble"] == found[0]["global"]
    for share in (0, 1):
        assert found[share]["not_looked_at"] == found[share]["not_computed"] == 1 - share


def test_rows_are_means_and_deviations_over_checkpoints(record) -> None:
    """A larger share leaves less out."""
    assert [row["refine_share"] for row in record["rows"]] == [0, 0.3, 0.6, 1]
    for key in ("not_looked_at", "not_computed"):
        means = [row["mean"][key] for row in record["rows"]]
        assert means == sorted(set(means), reverse=True)
    for row in record["rows"]:
        assert row["mean"]["seconds_per_image"] > 0 and row["mean"]["process_seconds_per_image"] > 0
    found = [runs_of(record, file)[1]["ensemble"]["mIoU"] for file in ("a.pth", "b.pth")]
    assert found[0] != found[1]
    row = record["rows"][-1]
    assert row["mean"]["ensemble"] == pytest.approx(sum(found) / 2)
    assert row["spread"]["ensemble"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
    assert row["spread"]["global"] == 0


def test_the_table_has_the_command_and_a_row_for_each_share(folder, record) -> None:
    text = (folder / "refine_tiny.md").read_text()
    assert f"`{record['command']}`" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["0", "0.3", "0.6", "1"]
    assert all(len(row) == 1 + len(refine.COLUMNS) for row in rows)
    assert rows[0][4] == "100.0 ± 0.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoints", "one.pth"], "was made by stage 1"),
        (["--checkpoints", "a.pth", "--split", "offical_crossvali"], "has no labels"),
        (["--checkpoints", "a.pth", "--shares", "0.5", "1.5"], "--shares 1.5 must be from 0 to 1"),
        (["--checkpoints", "a.pth", "--name", "a/b"], "--name 'a/b' must be usable as a file name"),
        (["--name", "new"], "--checkpoints"),
    ],
)
def test_what_has_no_curve_is_refused_in_one_line(folder, options, message, monkeypatch, refused) -> None:
    write_thin_checkpoint(folder / "one.pth", 1, len(DEEP_GLOBE))
    monkeypatch.chdir(folder)
    assert message in refused(refine.main, *arguments(folder, *options))
