"""Results in one folder: each has a record of what made it, and no run keeps, or describes, what it would not make."""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS, build_header, build_model
from pictures import random_image, run, save, summary, write_raster
from PIL import Image

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


@pytest.fixture
def network(checkpoints) -> Path:
    return next(iter(checkpoints.values()))


@pytest.fixture
def ab(tmp_path) -> list[Path]:
    """Two images."""
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for k, path in enumerate(images):
        save(path, SIZE, seed=k)
    return images


@pytest.fixture(autouse=True, scope="module")
def load_once():
    """Each network is loaded once in each way, which is what takes the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(Segmenter.from_checkpoint)
        patch.setattr(Segmenter, "from_checkpoint", load)
        yield


def draw(rng: np.random.Generator, images: list[Path], checkpoints: dict[str, Path]) -> tuple[list, Path, list[str]]:
    """Images, some of them edited, a checkpoint and options of a run."""
    chosen = [path for path in images if rng.random() < 0.7] or images[:1]
    for path in chosen:
        if rng.random() < 0.3:
            save(path, SIZE, seed=int(rng.integers(1000)))
    options = []
    for one in (["--tta", "flip"], ["--colors"], ["--overlay"], ["--blend", "linear"], ["--overwrite"]):
        if rng.random() < 0.25:
            options += one
    return chosen, [*checkpoints.values()][int(rng.random() < 0.3)], options


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*_mask.png")}


def check(out: Path, checkpoints: dict[str, Path]) -> None:
    """Each mask is what its record names, as far as the image is still there, and the summary agrees with them."""
    found, ids_of = summary(out), {}
    masks = {path.name for path in out.glob("*_mask.png")}
    assert {name for name in found["results"] if name.endswith("_mask.png")} == masks
    for name in masks:
        about, pixels = (found["results"][name][part] for part in ("made_by", "areas"))
        if about["colors"]:
            continue
        ids_of[name] = np.asarray(Image.open(out / name))
        assert pixels["pixels"] == np.bincount(ids_of[name].ravel(), minlength=N_CLASS).tolist()
        if Path(about["image"]).stat().st_mtime_ns == about["image_time"]:
            options = {"device": "cpu", "tta": about["tta"], "blend": about["blend"]}
            maker = Segmenter.from_checkpoint(checkpoints[about["checkpoint_sha256"]], **options)
            assert np.array_equal(maker.segment(about["image"]), ids_of[name])
    for one in found["images"]:
        result = found["results"][one["mask"]]
        assert result["made_by"]["image"] == one["image"]
        assert all(result["made_by"][name] == found[name] for name in ("tta", "blend", "checkpoint_sha256"))
        assert one["mask"] not in ids_of or one["pixels"] == result["areas"]["pixels"]


@pytest.mark.parametrize("seed", range(6))
def test_after_any_runs_each_mask_is_what_its_record_names(tmp_path, capsys, checkpoints, ab, seed) -> None:
    rng, out = np.random.default_rng(seed), tmp_path / "out"
    for turn in range(3):
        images, network, options = draw(rng, ab, checkpoints)
        before = contents(out)
        code = run(network, *images, output=out, options=options)
        if code == 2:
            assert "holds files that this run would not make" in capsys.readouterr().err
            assert turn and "--overwrite" not in options and contents(out) == before
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
    before = contents(out)
    capsys.readouterr()
    assert run(network, image, output=out, options=options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --output {out} holds files that this run would not make: a_mask.png (")
    assert reason in line and contents(out) == before
    assert run(network, image, output=out, options=[*options, "--overwrite"]) == 0
    assert run(network, image, output=out, options=options) == 0
    assert (out / "a_mask.png").read_bytes() != before["a_mask.png"] or change in ("elsewhere", "old") or options


def test_results_of_images_of_earlier_runs_stay_known(tmp_path, network, ab) -> None:
    out = tmp_path / "out"
    for image in ab:
        assert run(network, image, output=out) == 0
    assert [Path(one["image"]).name for one in summary(out)["images"]] == ["b.png"]
    before = times(out)
    assert run(network, *ab, output=out) == 0
    assert times(out) == before
    copied = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    assert run(network, *ab, output=copied) == 0
    assert times(copied)["a_mask.png"] != before["a_mask.png"]


def test_a_run_that_dies_at_any_moment_leaves_no_result_without_a_record(
    tmp_path, monkeypatch, checkpoints, network, ab
) -> None:
    out, rename = tmp_path / "out", Path.replace
    for moment in ("before", "after"):

        def dying(self: Path, target: Path, moment: str = moment) -> Path:
            if moment == "after":
                rename(self, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            assert run(network, *ab, output=out, options=["--overlay"]) == 130
        assert not (out / SUMMARY).exists()
    assert run(network, *ab, output=out, options=["--overlay"]) == 0
    check(out, checkpoints)
    assert len(summary(out)["images"]) == 2 and sum(summary(out)["total"]["pixels"]) == 2 * SIZE[0] * SIZE[1]
    assert not list(out.glob(".*"))


def meanwhile(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path], object]) -> None:
    """Let something happen just before an image is segmented."""
    whole = PredictionRun._segment

    def acting(self, task, ranks):
        if task.image.name == name:
            with monkeypatch.context() as patch:
                patch.setattr(PredictionRun, "_segment", whole)
                act(task.image)
        return whole(self, task, ranks)

    monkeypatch.setattr(PredictionRun, "_segment", acting)


def test_an_image_that_is_changed_while_it_is_segmented_is_its_own_failure(tmp_path, monkeypatch, network, ab) -> None:
    out = tmp_path / "out"
    meanwhile(monkeypatch, "a.png", lambda image: os.utime(image, ns=(time.time_ns(), time.time_ns() + 1)))
    assert run(network, *ab, output=out) == 1
    assert {path.name for path in out.iterdir()} == {"b_mask.png", SUMMARY}
    assert "a.png was changed while it was segmented" in summary(out)["failures"][0]


def test_several_runs_at_once_keep_each_others_records(tmp_path, monkeypatch, checkpoints, network, ab) -> None:
    """The second run starts and ends while the first one is at its second image."""
    other, out, codes = tmp_path / "c.png", tmp_path / "out", []
    save(other, SIZE)
    meanwhile(monkeypatch, "b.png", lambda _: codes.append(run(network, other, output=out)))
    assert run(network, *ab, output=out) == 0 and codes == [0]
    assert set(summary(out)["results"]) == {f"{name}_mask.png" for name in "abc"}
    check(out, checkpoints)


def test_a_summary_of_another_program_is_not_replaced(tmp_path, capsys, network, ab) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for content in ("{}", "[1, 2]", "no json", '{"images": 3}'):
        (out / SUMMARY).write_text(content)
        assert run(network, ab[0], output=out) == 2
        assert f"{out / SUMMARY} is no summary of predict.py" in capsys.readouterr().err
        assert (out / SUMMARY).read_text() == content
    assert run(network, ab[0], output=out, options=["--overwrite"]) == 0


def test_broken_records_are_none(tmp_path) -> None:
    (tmp_path / "a").touch()
    for content in ("", "[]", '{"results": []}', '{"results": {"a": 1, "b": {"size": 1}}}', "\x00{"):
        (tmp_path / SUMMARY).write_text(content)
        (tmp_path / ".results.host.1.jsonl").write_text(f'{content}\n{{"file": "c"}}\n{{"file"')
        assert Records(tmp_path).of(tmp_path / "a") is None


def test_a_layer_depends_on_its_own_options_and_a_raster_on_its_place(tmp_path, capsys, network) -> None:
    pytest.importorskip("pyogrio")
    rasterio = pytest.importorskip("rasterio")
    image = write_raster(tmp_path / "a.tif", random_image(SIZE).numpy())
    out, options = tmp_path / "out", ["--polygons", "gpkg"]
    assert run(network, image, output=out, options=options) == 0
    assert run(network, image, output=out, options=[*options, "--min_area", "9px"]) == 2
    assert "a.gpkg (min_area None, now 9px)" in capsys.readouterr().err
    assert run(network, image, output=out, options=[*options, "--overlay"]) == 0
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><GeoTransform>7, 1, 0, 5, 0, -1</GeoTransform></PAMDataset>")
    code = run(network, image, output=out, options=options)
    with rasterio.open(image) as file:
        moved = file.transform.c == 7
    assert code == (2 if moved else 0)
