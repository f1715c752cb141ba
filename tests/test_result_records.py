"""Results in one folder: each has a record of what made it, and no run keeps, or describes, what it would not make."""

import functools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS, build_header, build_model
from pictures import random_image, run, save, summary, write_raster
from PIL import Image

import predict
from models import checkpoint
from prediction.records import SUMMARY, Records
from prediction.run import PredictionRun
from prediction.segmenter import Segmenter
from utils.files import sha256

SIZE = (40, 50)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Two networks of one architecture, by the checksums of their files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for seed in (1, 2):
        model, generator = build_model(), torch.Generator().manual_seed(seed)
        bias = model.ensemble.bias.data
        bias += torch.randn(bias.shape, generator=generator) * 3
        checkpoint.save(folder / f"{seed}.pth", model, build_header(2))
        found[sha256(folder / f"{seed}.pth")] = folder / f"{seed}.pth"
    return found


@pytest.fixture(autouse=True, scope="module")
def load_once():
    """Each network is loaded once in each way, which is what takes the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(Segmenter.from_checkpoint)
        patch.setattr(Segmenter, "from_checkpoint", load)
        yield


def draw(rng: np.random.Generator, images: Path, checkpoints: dict[str, Path]) -> tuple[list, Path, list[str]]:
    """Images, some of them edited, a checkpoint and options of a run."""
    names = [name for name in ("a.png", "b.png") if rng.random() < 0.7] or ["a.png"]
    for name in names:
        if rng.random() < 0.3:
            save(images / name, SIZE, seed=int(rng.integers(1000)))
    options = []
    for one in (["--tta", "flip"], ["--colors"], ["--overlay"], ["--blend", "linear"], ["--overwrite"]):
        if rng.random() < 0.25:
            options += one
    return [images / name for name in names], [*checkpoints.values()][int(rng.random() < 0.3)], options


def check(out: Path, checkpoints: dict[str, Path]) -> None:
    """Each mask is what its record names, as far as the image is still there, and the summary agrees with them."""
    found = summary(out)
    masks = {path.name for path in out.glob("*_mask.png")}
    assert {name for name in found["results"] if name.endswith("_mask.png")} == masks
    ids_of = {}
    for name in masks:
        about = found["results"][name]["made_by"]
        image = Path(about["image"])
        picture = Image.open(out / name)
        if about["colors"]:
            continue
        ids_of[name] = np.asarray(picture)
        assert (
            found["results"][name]["areas"]["pixels"] == np.bincount(ids_of[name].ravel(), minlength=N_CLASS).tolist()
        )
        if image.stat().st_mtime_ns == about["image_time"]:
            maker = Segmenter.from_checkpoint(
                checkpoints[about["checkpoint_sha256"]], device="cpu", tta=about["tta"], blend=about["blend"]
            )
            assert np.array_equal(maker.segment(image), ids_of[name])
    for one in found["images"]:
        about = found["results"][one["mask"]]["made_by"]
        assert about["image"] == one["image"]
        assert {name: about[name] for name in ("tta", "blend", "checkpoint_sha256")} == {
            name: found[name] for name in ("tta", "blend", "checkpoint_sha256")
        }
        assert one["mask"] not in ids_of or one["pixels"] == found["results"][one["mask"]]["areas"]["pixels"]


@pytest.mark.parametrize("seed", range(6))
def test_after_any_runs_each_mask_is_what_its_record_names(tmp_path, capsys, checkpoints, seed) -> None:
    rng = np.random.default_rng(seed)
    (tmp_path / "images").mkdir()
    for k, name in enumerate(("a.png", "b.png")):
        save(tmp_path / "images" / name, SIZE, seed=k)
    out = tmp_path / "out"
    for turn in range(3):
        images, network, options = draw(rng, tmp_path / "images", checkpoints)
        before = {path.name: path.read_bytes() for path in out.glob("*")}
        code = run(network, *images, output=out, options=options)
        if code == 2:
            assert "holds files that this run would not make" in capsys.readouterr().err
            assert turn
            assert "--overwrite" not in options
            assert {path.name: path.read_bytes() for path in out.glob("*")} == before
        else:
            assert code == 0
            assert [one["image"] for one in summary(out)["images"]] == [str(path) for path in images]
        check(out, checkpoints)


CHANGES = [
    ("checkpoint", [], "another checkpoint"),
    ("edited", [], "the image was changed"),
    ("elsewhere", [], "another image"),
    ("", ["--mode", "1"], "mode 2, now 1"),
    ("", ["--tta", "d4"], "tta none, now d4"),
    ("", ["--stretch", "0,100"], "stretch 2%,98%, now 0,100"),
    ("", ["--colors"], "colors False, now True"),
    ("own", [], "no record says what made it"),
    ("old", [], "no record says what made it"),
]


@pytest.mark.parametrize(("change", "options", "reason"), CHANGES)
def test_results_of_something_else_are_refused_and_made_anew_on_request(
    tmp_path, capsys, checkpoints, change, options, reason
) -> None:
    image, out = tmp_path / "a.png", tmp_path / "out"
    save(image, SIZE)
    network, other = checkpoints.values()
    assert run(network, image, output=out) == 0
    if change == "edited":
        save(image, SIZE, seed=5)
    elif change == "elsewhere":
        (tmp_path / "other").mkdir()
        image = shutil.copy2(image, tmp_path / "other" / "a.png")
    elif change == "own":
        (out / "a_mask.png").write_bytes(b"my own")
    elif change == "old":
        (out / SUMMARY).write_text(json.dumps({"classes": [], "images": summary(out)["images"]}))
    elif change == "checkpoint":
        network = other
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run(network, image, output=out, options=options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --output {out} holds files that this run would not make: a_mask.png (")
    assert reason in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(network, image, output=out, options=[*options, "--overwrite"]) == 0
    assert run(network, image, output=out, options=options) == 0
    assert (out / "a_mask.png").read_bytes() != before["a_mask.png"] or change in ("elsewhere", "old") or options


def test_results_of_images_of_earlier_runs_stay_known(tmp_path, checkpoints) -> None:
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    for name in "ab":
        save(tmp_path / f"{name}.png", SIZE, seed=ord(name))
        assert run(network, tmp_path / f"{name}.png", output=out) == 0
    assert [Path(one["image"]).name for one in summary(out)["images"]] == ["b.png"]
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*_mask.png")}
    assert run(network, tmp_path / "a.png", tmp_path / "b.png", output=out) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*_mask.png")} == times
    copied = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    assert run(network, tmp_path / "a.png", tmp_path / "b.png", output=copied) == 0
    assert (copied / "a_mask.png").stat().st_mtime_ns != times["a_mask.png"]


def test_a_run_that_dies_at_any_moment_leaves_no_result_without_a_record(tmp_path, monkeypatch, checkpoints) -> None:
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    images = [tmp_path / f"{name}.png" for name in "ab"]
    for path in images:
        save(path, SIZE)
    rename = Path.replace
    for moment in ("before", "after"):

        def dying(self: Path, target: Path, moment: str = moment) -> Path:
            if moment == "after":
                rename(self, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            assert run(network, *images, output=out, options=["--overlay"]) == 130
    assert run(network, *images, output=out, options=["--overlay"]) == 0
    check(out, checkpoints)
    assert not list(out.glob(".*"))


def test_an_image_that_is_changed_while_it_is_segmented_is_its_own_failure(tmp_path, monkeypatch, checkpoints) -> None:
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    for name in "ab":
        save(tmp_path / f"{name}.png", SIZE)
    whole = PredictionRun._segment

    def touching(self, task, ranks):
        if task.image.name == "a.png":
            os.utime(task.image, ns=(time.time_ns(), time.time_ns() + 1))
        return whole(self, task, ranks)

    monkeypatch.setattr(predict.PredictionRun, "_segment", touching)
    assert run(network, tmp_path / "a.png", tmp_path / "b.png", output=out) == 1
    assert {path.name for path in out.iterdir()} == {"b_mask.png", SUMMARY}
    assert "a.png was changed while it was segmented" in summary(out)["failures"][0]


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "no json", '{"images": 3}'])
def test_a_summary_of_another_program_is_not_replaced(tmp_path, capsys, checkpoints, content) -> None:
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    save(tmp_path / "a.png", SIZE)
    out.mkdir()
    (out / SUMMARY).write_text(content)
    assert run(network, tmp_path / "a.png", output=out) == 2
    assert f"{out / SUMMARY} is no summary of predict.py" in capsys.readouterr().err
    assert (out / SUMMARY).read_text() == content
    assert run(network, tmp_path / "a.png", output=out, options=["--overwrite"]) == 0


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}', '{"results": {"a": 1, "b": {"size": 1}}}', "\x00{"])
def test_broken_records_are_none(tmp_path, content) -> None:
    (tmp_path / SUMMARY).write_text(content)
    (tmp_path / ".results.host.1.jsonl").write_text(f'{content}\n{{"file": "c"}}\n{{"file"')
    (tmp_path / "a").touch()
    assert Records(tmp_path).of(tmp_path / "a") is None


def test_a_layer_depends_on_its_own_options_and_a_raster_on_its_place(tmp_path, capsys, checkpoints) -> None:
    pytest.importorskip("pyogrio")
    pytest.importorskip("rasterio")
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    image = write_raster(tmp_path / "a.tif", random_image(SIZE).numpy())
    options = ["--polygons", "gpkg"]
    assert run(network, image, output=out, options=options) == 0
    assert run(network, image, output=out, options=[*options, "--min_area", "9px"]) == 2
    assert "a.gpkg (min_area None, now 9px)" in capsys.readouterr().err
    assert run(network, image, output=out, options=[*options, "--overlay"]) == 0
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><GeoTransform>7, 1, 0, 5, 0, -1</GeoTransform></PAMDataset>")
    code = run(network, image, output=out, options=options)
    with __import__("rasterio").open(image) as file:
        moved = file.transform.c == 7
    assert code == (2 if moved else 0)


def test_several_runs_at_once_keep_each_others_records(tmp_path, monkeypatch, checkpoints) -> None:
    """The second run starts and ends while the first one is at its second image."""
    network, out = next(iter(checkpoints.values())), tmp_path / "out"
    for name in "abc":
        save(tmp_path / f"{name}.png", SIZE)
    whole = PredictionRun._segment

    def meanwhile(self, task, ranks):
        if task.image.name == "b.png":
            with monkeypatch.context() as patch:
                patch.setattr(PredictionRun, "_segment", whole)
                assert run(network, tmp_path / "c.png", output=out) == 0
        return whole(self, task, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionRun, "_segment", meanwhile)
        assert run(network, tmp_path / "a.png", tmp_path / "b.png", output=out) == 0
    assert set(summary(out)["results"]) == {f"{name}_mask.png" for name in "abc"}
    check(out, checkpoints)
