"""Images of any name are segmented, and named, whatever the terminal shows and GDAL takes."""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from builders import build_header
from pictures import run, save, summary

from evaluation import html_report
from training import model_card
from training.state import RunFiles, RunState
from utils.stages import STAGES

ODD = ["-a", "(b)", "[c]", "#d", ";e", "gpkg_h", "sqlite_i", "ogr_empty_table", "'j", 'k"l', "$m", "größe", "n.o"]


@pytest.mark.parametrize("kind", ["gpkg", "geojson"])
def test_layers_of_odd_names_are_made(checkpoint, tmp_path, kind) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    (tmp_path / "images").mkdir()
    for name in ODD:
        save(tmp_path / "images" / f"{name}.png", (20, 30))
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "images", output=out, options=["--polygons", kind]) == 0
    counts = {Path(one["image"]).stem: one["features"] for one in summary(out)["images"]}
    assert set(counts) == set(ODD)
    for name, count in counts.items():
        plain = shutil.copy(out / f"{name}.{kind}", tmp_path / f"plain.{kind}")  # GDAL opens no name with a semicolon
        info = pyogrio.read_info(plain, force_feature_count=True)
        assert info["features"] == count > 0
    assert pyogrio.list_layers(out / f"größe.{kind}")[0][0] == "größe"


@pytest.mark.parametrize("journal", ["-wal", "-journal"])
def test_a_package_that_another_program_has_open_is_not_replaced(checkpoint, tmp_path, journal) -> None:
    pytest.importorskip("pyogrio")
    for name in "ab":
        save(tmp_path / f"{name}.png", (20, 30))
    images, out = (tmp_path / "a.png", tmp_path / "b.png"), tmp_path / "out"
    assert run(checkpoint, *images, output=out, options=["--polygons", "gpkg"]) == 0
    before = (out / "a.gpkg").read_bytes()
    (out / f"a.gpkg{journal}").write_bytes(b"changes")
    assert run(checkpoint, *images, output=out, options=["--polygons", "gpkg"]) == 0  # it is kept
    assert run(checkpoint, *images, output=out, options=["--polygons", "gpkg", "--overwrite"]) == 1
    (failure,) = summary(out)["failures"]
    assert failure.startswith(
        f"{out / 'a.gpkg'} cannot be written: another program has it open, or left a.gpkg{journal}"
    )
    assert (out / "a.gpkg").read_bytes() == before
    (out / f"a.gpkg{journal}").unlink()
    assert run(checkpoint, *images, output=out, options=["--polygons", "gpkg", "--overwrite"]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_ends_nothing(checkpoint, tmp_path, monkeypatch, encoding) -> None:
    names = ["日本.png", "größe.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"no\xff.png"))
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_bytes(b"no image")
    save(tmp_path / "images" / "a.png", (20, 30))
    screens = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    assert run(checkpoint, tmp_path / "images", output=tmp_path / "out") == 1
    screens[0].flush()
    said = screens[0].buffer.getvalue().decode(encoding)
    assert said.count("skipped: ") == len(names)
    assert ("日本.png" if encoding == "utf-8" else r"\u65e5\u672c.png") in said
    assert len(summary(tmp_path / "out")["failures"]) == len(names)


def test_reports_hold_names_that_are_no_text(tmp_path, monkeypatch) -> None:
    name = os.fsdecode(b"no\xff")
    monkeypatch.setattr(html_report, "report_page", lambda report: report)
    html_report.write_report(tmp_path, f"the worst is {name}")
    options = {"ema": 0, "dataset": name, "num_epochs": 1, "log_path": "runs", "task_name": "card"}
    options |= dict.fromkeys(("split_lists", "hold_out", "init_from")) | {"backbone_weights": "none"}
    images = [("train", 1), ("val", 1)]
    files, stage = RunFiles.of(tmp_path, "card"), STAGES[1]
    model_card.write_card(files, stage, build_header(1), RunState("", epoch=1), options, images=images, epochs={})
    for path in (tmp_path / html_report.NAME, tmp_path / "card.md"):
        assert r"no\udcff" in path.read_text(encoding="utf-8")
