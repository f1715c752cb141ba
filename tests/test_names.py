"""Images of any name are found, planned, segmented and named, whatever the terminal shows and GDAL takes."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import describe_set
from files import write_raster
from pictures import run, save, summary
from PIL import Image

from dataset.registry import describe
from evaluation import html_report
from imaging import image_file
from imaging.probe import IMAGE_SUFFIXES, RARE_SUFFIXES
from prediction import run as prediction_run
from prediction.outputs import OutputOptions
from prediction.run import PredictionRun, find_images
from prediction.segmenter import Segmenter

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
    images, out = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out"
    for path in images:
        save(path, (20, 30))

    def polygonize(*more: str) -> int:
        return run(checkpoint, *images, output=out, options=["--polygons", "gpkg", *more])

    assert polygonize() == 0
    before, open_file = (out / "a.gpkg").read_bytes(), out / f"a.gpkg{journal}"
    open_file.write_bytes(b"changes")
    assert polygonize() == 0  # it is kept
    assert polygonize("--overwrite") == 1
    (failure,) = summary(out)["failures"]
    told = f"{out / 'a.gpkg'} cannot be written: another program has it open, or left {open_file.name}"
    assert failure.startswith(told) and (out / "a.gpkg").read_bytes() == before
    open_file.unlink()
    assert polygonize("--overwrite") == 0


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
    for name, screen in zip(("stdout", "stderr"), screens, strict=True):
        monkeypatch.setattr(sys, name, screen)
    assert run(checkpoint, tmp_path / "images", output=tmp_path / "out") == 1
    screens[0].flush()
    said = screens[0].buffer.getvalue().decode(encoding)
    assert said.count("skipped: ") == len(names)
    assert ("日本.png" if encoding == "utf-8" else r"\u65e5\u672c.png") in said
    assert len(summary(tmp_path / "out")["failures"]) == len(names)
    monkeypatch.setattr(html_report, "report_page", lambda report: report)
    html_report.write_report(tmp_path, f"the worst is {os.fsdecode(b'no' + bytes([255]))}")  # a name that is no text
    assert r"no\udcff" in (tmp_path / html_report.NAME).read_text(encoding="utf-8")


def test_a_folder_to_segment_gives_all_image_formats_and_says_what_it_leaves_out(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    names = [f"a{suffix}" for suffix in (*IMAGE_SUFFIXES, *RARE_SUFFIXES)] + ["B.PPM"]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(path.name for path in find_images([str(tmp_path)])) == sorted(names)
    assert "left out" not in caplog.text
    for name in ("notes.txt", "a.xml", "b.xml", "README", ".hidden"):
        (tmp_path / name).touch()
    assert len(find_images([str(tmp_path)])) == len(names)
    assert caplog.text.count("left out") == 1
    assert "4 files are left out, whose suffixes are no image's (.txt, .xml, README); name a file" in caplog.text


def test_a_data_set_has_all_image_formats_and_what_is_made_from_a_picture_is_no_second_one(tmp_path) -> None:
    for name in ("a.ppm", "b.ppm", "a_label.png", "b_label.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for images in ("{id}.*", "{id}.ppm"):
        items = describe("folder", describe_set(tmp_path, images=images)).find("train")
        assert [item.image.name for item in items] == ["a.ppm", "b.ppm"]
    (tmp_path / "made").mkdir()
    for name in ("a.tif", "a.vrt", "a.gif", "a_label.png"):
        (tmp_path / "made" / name).touch()
    (item,) = describe("folder", describe_set(tmp_path / "made", images="{id}.*")).find("train")
    assert item.image.name == "a.tif"


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    calls, plain = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda first, *more: calls.append(first) or plain(first, *more))
    return calls


def test_planning_reads_each_header_once_and_no_pixels(segmenter, tmp_path, monkeypatch) -> None:
    images = [tmp_path / f"{k}.png" for k in range(300)]
    for path in images:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    probed = count_calls(monkeypatch, prediction_run, "probe")
    (tmp_path / "out").mkdir()
    tasks = PredictionRun(segmenter, OutputOptions(tmp_path / "out"))._plan(images, {})
    assert [task.image for task in tasks] == images
    assert probed == images


@pytest.mark.parametrize("size", [(90, 120), (90, 300)])
def test_percentiles_are_computed_once_for_a_file(segmenter, tmp_path, monkeypatch, size) -> None:
    """Also where it is segmented as several scenes, read in windows."""
    rng = np.random.default_rng(0)
    path = write_raster(tmp_path / "deep.tif", rng.integers(0, 2000, (3, *size)).astype(np.uint16))
    sampled = count_calls(monkeypatch, image_file.ImageFile, "_sample")
    (tmp_path / "out").mkdir()
    run = PredictionRun(Segmenter(segmenter.predictor, segmenter.header, 150), OutputOptions(tmp_path / "out"))
    run.run([path], {})
    assert not run.failures
    assert len(sampled) == 1
