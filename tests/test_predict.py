"""`predict.py`: results equal to evaluation's, whatever the way there, what users meet, what processes share."""

import os
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pytest
import runs
import torch
from builders import N_CLASS, SIDE, build_model, build_predictor, build_sample, build_settings
from files import read_label
from pictures import PIXEL, SIZE, Whole, random_image, run, save, summary, write_checkpoint, write_raster
from PIL import Image

import predict
from engine.predictor import Predictor
from imaging.sources import MemorySource
from predict import Segmenter
from prediction.scenes import segment_scenes
from utils.canvas import ArgmaxSink
from utils.classes import IGNORED, Classes

pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "two.pth")


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, seed in (("a.png", 1), ("b.png", 2), ("c.bmp", 3)):
        save(folder / name, seed=seed)
    return folder


def evaluated(predictor: Predictor, image: Image.Image) -> np.ndarray:
    """What evaluation gives: the predictor on the whole image."""
    tensor, shrunk = builders.image_tensor(image), builders.image_tensor(builders.shrink_image(image, SIDE))
    ids = ArgmaxSink(tuple(tensor.shape[-2:]))
    predictor.segment(MemorySource(tensor), {predictor.stage.headline: ids}, global_image=shrunk)
    return ids.ids.numpy()


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("size", [(70, 100), (40, 50), (200, 64), (1, 80), (80, 1), (1, 1)])
def test_below_the_scene_size_results_are_evaluations(mode, size) -> None:
    model, sample = build_model(), build_sample(size)
    predictor = build_predictor(model, mode, build_settings())
    found, plain = Whole(), ArgmaxSink(size)
    segment_scenes(predictor, MemorySource(sample.image), found, probabilities=True)
    image = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    assert np.array_equal(found.ids.numpy(), evaluated(predictor, image))
    builders.forward_into(model, mode, sample, build_settings(), {predictor.stage.headline: plain})
    assert (found.ids == plain.ids).float().mean() > 0.999
    torch.testing.assert_close(found.probabilities.float().sum(0), torch.ones(size), atol=2e-3, rtol=0)
    assert (found.probabilities.argmax(0) == found.ids).float().mean() > 0.99


def test_a_segmenter_takes_files_arrays_and_pillow_images(checkpoint, tmp_path) -> None:
    image = save(tmp_path / "a.png")
    segmenter = Segmenter.from_checkpoint(checkpoint, device="cpu")
    expected = evaluated(segmenter.predictor, image)
    assert expected.shape == SIZE
    for one in (image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        found = segmenter.segment(one)
        assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert segmenter.classes == Classes.generic(N_CLASS)
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(segmenter.segment(grey), segmenter.segment(np.stack([grey] * 3, -1)))


def test_masks_hold_ids_with_a_palette_and_overlays_show_a_legend(checkpoint, images, tmp_path, capsys) -> None:
    out, kinds = tmp_path / "out", ("mask.png", "overlay.png", "probabilities.npz")
    assert run(checkpoint, images, output=out, options=["--overlay", "--probabilities"]) == 0
    expected = {f"{name}_{kind}" for name in "abc" for kind in kinds}
    assert {path.name for path in out.iterdir()} == {"summary.json", *expected}
    segmenter = Segmenter.from_checkpoint(checkpoint, device="cpu")
    counts = np.zeros(N_CLASS, int)
    for name in ("a.png", "b.png", "c.bmp"):
        mask = Image.open(out / f"{name[0]}_mask.png")
        ids = np.asarray(mask)
        assert np.array_equal(ids, segmenter.segment(images / name))
        assert mask.mode == "P"
        assert mask.getpalette()[: 3 * N_CLASS] == [v for color in segmenter.classes.palette for v in color]
        assert Image.open(out / f"{name[0]}_overlay.png").width > SIZE[1]
        shares = np.load(out / f"{name[0]}_probabilities.npz")["probabilities"]
        assert (shares.shape, shares.dtype) == ((*SIZE, N_CLASS), np.float16)
        assert (shares.argmax(-1) == ids).mean() > 0.99
        counts += np.bincount(ids.ravel(), minlength=N_CLASS)
    total = summary(out)["total"]
    assert (total["pixels"], total["square_metres"]) == (counts.tolist(), None)
    assert sum(total["per_cent"]) == pytest.approx(100)
    assert str(counts[1]) in capsys.readouterr().out


@pytest.mark.parametrize("tta", ["flip", "d4"])
def test_averaging_over_turns_and_colours_from_the_command_line(checkpoint, tmp_path, tta) -> None:
    save(tmp_path / "a.png")
    assert run(checkpoint, tmp_path / "a.png", output=tmp_path / "out", options=["--tta", tta, "--colors"]) == 0
    plain, averaged = (Segmenter.from_checkpoint(checkpoint, device="cpu", tta=one) for one in ("none", tta))
    assert Image.open(tmp_path / "out" / "a_mask.png").mode == "RGB"  # which reads back as a label
    found = read_label(tmp_path / "out" / "a_mask.png", plain.classes, SIZE)
    assert np.array_equal(found, averaged.segment(tmp_path / "a.png"))
    assert not np.array_equal(found, plain.segment(tmp_path / "a.png"))


def test_a_second_run_makes_only_what_is_missing_and_keeps_the_summary(checkpoint, images, tmp_path) -> None:
    out, made = tmp_path / "out", []

    def run_again(*inputs: Path, options: tuple[str, ...] = ()) -> None:
        assert run(checkpoint, *inputs, output=out, options=options) == 0
        made.append((out / "a_mask.png").stat().st_mtime_ns)

    run_again(images / "a.png")
    run_again(images)
    assert [Path(one["image"]).name for one in summary(out)["images"]] == ["a.png", "b.png", "c.bmp"]
    run_again(images, options=("--overlay",))
    assert (out / "a_overlay.png").exists()
    run_again(images, options=("--overwrite",))
    assert made[0] == made[1] == made[2] != made[3]
    save(images / "a.bmp")  # files of one stem keep their extension
    assert run(checkpoint, images / "*.png", images / "a.bmp", output=tmp_path / "stems") == 0
    names = {path.name for path in (tmp_path / "stems").glob("*.png")}
    assert names == {"a_png_mask.png", "a_bmp_mask.png", "b_mask.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("absent.png", "absent.png: there is no image"),
        ("*.xyz", "there is no image"),
        ("images other/a.png", "would give the same files"),
        ("images --bands 1,2", "--bands 1,2"),
        ("images --stretch 9,1", "--stretch 9,1"),
        ("images --size_p 63", "--size_p 63"),
        ("images --sub_batch_size 0", "--sub_batch_size 0"),
        ("images --scene_size 3", "--scene_size 3"),
        ("images --mode 3", "--mode 3"),
        ("images --backbone resnet50", "--backbone resnet50"),
        ("images --device nonsense", "nonsense"),
        ("images --coarse_to_fine", "--coarse_to_fine needs two classes, one of them foreground; here are 5"),
        ("images --box_margin -1", "--box_margin -1"),
        ("images --min_area 5px", "--min_area 5px needs --polygons gpkg or geojson"),
        ("images --min_area 50", "--min_area 50 must be a number with its unit, as in 50px or 50m2"),
        ("images --min_area 5m", "--min_area 5m must be"),
        ("images --min_area -1px", "--min_area"),
        ("images --polygons shp", "--polygons"),
        ("images --output images", "holds images"),
    ],
)
def test_mistakes_end_in_one_line(checkpoint, images, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "a.png")
    monkeypatch.chdir(tmp_path)
    always = ["--checkpoint", str(checkpoint), "--output", "out", "--device", "cpu"]
    assert predict.main([*always, "--input", *arguments.split()]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_mode_1_of_a_later_stage_and_released_files(checkpoint, tmp_path) -> None:
    save(tmp_path / "a.png")
    assert Segmenter.from_checkpoint(checkpoint, mode=1, device="cpu").predictor.stage.headline == "global"
    builders.write_released_checkpoint(tmp_path / "g.pth", 1)
    builders.write_released_checkpoint(tmp_path / "l2g.pth", 3)
    sizes = {"backbone": "resnet18", "size_g": SIDE, "size_p": SIDE, "min_overlap": 16, "device": "cpu"}
    with pytest.raises(ValueError, match="give --mode"):
        Segmenter.from_checkpoint(tmp_path / "l2g.pth", **sizes)
    with pytest.raises(ValueError, match="--path_g"):
        Segmenter.from_checkpoint(tmp_path / "l2g.pth", mode=3, **sizes)
    segmenter = Segmenter.from_checkpoint(tmp_path / "l2g.pth", mode=3, path_g=tmp_path / "g.pth", **sizes)
    assert segmenter.segment(tmp_path / "a.png").shape == SIZE


def test_a_geotiff_gives_geotiffs_with_its_georeference(checkpoint, tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = random_image((90, 120)).numpy()
    values[:, :30, :40] = 0
    path, out = write_raster(tmp_path / "a.tif", values, nodata=0), tmp_path / "out"
    assert run(checkpoint, path, output=out, options=["--probabilities", "--overlay", "--scene_size", "100"]) == 0
    with rasterio.open(path) as source, rasterio.open(out / "a_mask.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (source.crs, source.transform, source.shape)
        ids = mask.read(1)
        assert mask.nodata == IGNORED
        assert mask.colormap(1)[1][:3] == Classes.generic(N_CLASS).palette[1]
    assert (ids[:30, :40] == IGNORED).all()
    assert (ids == IGNORED).sum() == summary(out)["total"]["left_out"] == 30 * 40
    with rasterio.open(out / "a_probabilities.tif") as file:
        shares = file.read()
    assert np.isnan(shares[:, :30, :40]).all()
    assert (shares[:, 30:].argmax(0) == ids[30:]).mean() > 0.99
    area = sum(summary(out)["total"]["square_metres"])
    assert area == pytest.approx((90 * 120 - 30 * 40) * PIXEL**2 / 0.9996**2, rel=1e-5)


def test_windows_and_images_in_memory_give_the_same(checkpoint, tmp_path, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    path = write_raster(tmp_path / "a.tif", random_image((150, 190)).numpy())
    segmenter = Segmenter.from_checkpoint(checkpoint, device="cpu", scene_size=120)
    in_memory, windows = segmenter.segment(path), []
    monkeypatch.setattr("prediction.read_ahead.load_in_memory", lambda source: windows.append(source) or source)
    assert np.array_equal(segmenter.segment(path), in_memory)
    assert len(windows) == 4


LOAD = """
import sys
import numpy, torch
segmenter = torch.hub.load(sys.argv[1], "glnet", source="local", checkpoint="network.pth", device="cpu")
assert sys.argv[1] not in sys.path  # all of the project that segmenting needs is imported
numpy.save("ids.npy", segmenter.segment("a.png"))
"""


@pytest.mark.slow
def test_torch_hub_gives_a_segmenter(tmp_path) -> None:
    builders.write_thin_checkpoint(tmp_path / "network.pth", 1)
    image = save(tmp_path / "a.png")
    runs.run_python(LOAD, runs.ROOT, folder=tmp_path, flags=("-I",))
    expected = Segmenter.from_checkpoint(tmp_path / "network.pth", device="cpu").segment(image)
    assert np.array_equal(np.load(tmp_path / "ids.npy"), expected)


IMPORTED = """
import sys
import torch
imported = set(sys.modules)
import predict
assert predict.main(sys.argv[1:]) == 0
print(*{name.partition(".")[0] for name in set(sys.modules) - imported}, *set(sys.modules) - imported)
"""
UNUSED = {"matplotlib", "onnx", "pyogrio", "rasterio", "shapely", "sympy", "tensorboard", "tensorboardX", "timm"}
UNUSED |= {"torch._dynamo", "torchvision", "zarr"}


def test_predicting_a_jpeg_imports_nothing_that_it_does_not_need(tmp_path) -> None:
    builders.write_thin_checkpoint(tmp_path / "network.pth", 3)
    save(tmp_path / "a.jpg")
    where = ["--checkpoint", tmp_path / "network.pth", "--input", tmp_path / "a.jpg", "--output", tmp_path / "out"]
    imported = runs.run_python(IMPORTED, *where, "--device", "cpu", "--overlay").splitlines()[-1].split()
    assert "prediction" in imported and not UNUSED & set(imported)


@pytest.mark.slow
def test_several_processes_write_the_same_files(checkpoint, images, tmp_path) -> None:
    save(images / "large.png", size=(150, 260))
    (images / "bad.jpg").write_text("no image")
    options = ["--scene_size", "100", "--probabilities"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run(checkpoint, images, output=alone, options=options) == 1
    port, command = runs.free_port(), [sys.executable, "predict.py", "--device", "cpu", *options]
    command += map(str, ["--checkpoint", checkpoint, "--input", images, "--output", together])
    processes = []
    for rank in (0, 1):
        environment = {**os.environ, **runs.environment_of(rank, 2, port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=runs.ROOT, env=environment, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert {path.name for path in alone.iterdir()} == {path.name for path in together.iterdir()}
    for path in alone.iterdir():
        if path.suffix == ".npz":
            found, expected = (np.load(folder / path.name)["probabilities"] for folder in (together, alone))
            assert np.abs(found - expected).max() <= 2e-3  # other numbers of threads sum in another order
        elif path.suffix == ".png":
            found, expected = (np.asarray(Image.open(folder / path.name)) for folder in (together, alone))
            assert (found == expected).mean() > 0.999


GROWTH = """
import resource, sys
sys.path[:0] = ["tests"]
import torch
torch.set_num_threads(1)
from pathlib import Path
from imaging.image_file import open_image
from prediction.outputs import OutputOptions, Outputs
from pictures import PixelPredictor
from prediction.scenes import segment_scenes
from utils.classes import Classes
path = Path(sys.argv[1])
paths = {"mask": path.with_suffix(".mask.tif")}
with open_image(path) as source, Outputs(source, paths, Classes.generic(5), OutputOptions(path.parent)) as outputs:
    segment_scenes(PixelPredictor(), source, outputs.emit, scene_size=1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_height(tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "count": 3, "width": 4000, "dtype": "uint8", "crs": "EPSG:32633"}
    profile |= {"tiled": True, "compress": "lzw", "photometric": "rgb"}
    peaks = []
    for height in (1000, 6000):
        path = tmp_path / f"{height}.tif"
        with rasterio.open(path, "w", **profile, height=height) as file:
            for top in range(0, height, 1000):
                band = np.broadcast_to(random_image((1, 4000), top).numpy(), (3, 1000, 4000))
                file.write(band, window=((top, top + 1000), (0, 4000)))
        peaks.append(int(runs.run_python(GROWTH, path, GDAL_CACHEMAX="16").split()[-1]))
    assert peaks[1] - peaks[0] < 25  # MB; the taller image has 57 MB more, and its ids 19
