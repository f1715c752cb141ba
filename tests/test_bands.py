"""Images of 1 to 16 bands: from the file of a data set through training of all stages to the mask."""

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from builders import BACKBONE, N_CLASS, SIDE, build_header, build_settings, build_thin_model, shared_model
from files import write_raster
from pictures import run, summary
from PIL import Image
from torch import nn

import train_deep_globe
from dataset.augmentation import ColorChange, Draw
from dataset.base import SegmentationDataset
from dataset.describe import main as describe_main
from dataset.registry import describe
from dataset.statistics import SMALLEST_STD, count_values, statistics_of
from engine.predictor import Predictor
from imaging.image_file import View, open_image
from imaging.pictures import array, shrink
from imaging.sources import MemorySource, load_in_memory
from models import checkpoint
from models.bands import fit_kernels, set_bands, widen
from models.glnet import Branch, GLNet
from models.header import Header
from models.restore import header_for
from prediction.segmenter import Segmenter
from training import options as command_line
from training import setup
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.settings import Statistics
from utils.stages import STAGES
from utils.stretch import Stretch, count_bands, fit_bands, parse_bands, spell_bands
from utils.tiling import Box
from utils.visualize import as_rgb

SIZE = (48, 64)
NODATA = 65535
CORNER = (slice(0, 20), slice(0, 30))
"""Where one image of the set has no data."""


def image(n_bands: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n_bands, *size), np.uint8))


@pytest.fixture(scope="module")
def multispectral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four-band GeoTIFFs of 16 bits with labels of two classes; a corner of img0 has no data."""
    pytest.importorskip("rasterio")
    root, rng = tmp_path_factory.mktemp("multispectral"), np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for k in range(4):
        values = rng.integers(100 * (k + 1), 3000, (4, *SIZE)).astype(np.uint16)
        ids = (values[3] > 1500).astype(np.uint8)
        values[3] += np.uint16(2000) * ids
        if k == 0:
            values[:, CORNER[0], CORNER[1]] = NODATA
        where = {"crs": "EPSG:32633", "transform": (10, 0, 500000, 0, -10, 5000000)}
        write_raster(root / f"images/img{k}.tif", values, nodata=NODATA, **where)
        Image.fromarray(ids).save(root / f"labels/img{k}.png")
    patterns = ["--images", "images/{id}.tif", "--labels", "labels/{id}.png"]
    assert describe_main([str(root), *patterns, "--val=0.3", "--quiet"]) == 0
    return root


@pytest.mark.slow
def test_four_bands_of_16_bits_go_from_their_description_to_polygons(monkeypatch, multispectral, tmp_path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    monkeypatch.setattr("training.state.save_torch", lambda path, content: path.touch())  # nothing is resumed
    record = json.loads((multispectral / "dataset.json").read_text())
    assert (record["bands"], record["stretch"]) == ([1, 2, 3, 4], "2%,98%")
    folders, found = runs.Folders(tmp_path, multispectral), []
    common = ["--dataset=folder", "--size_g=32", "--size_p=32", "--min_overlap=8", "--batch_size=3", "--num_epochs=1"]
    for mode, name in runs.NAMES.items():
        first = ["--normalize=data", "--augment"] if mode == 1 else []
        assert train_deep_globe.main(folders.arguments(mode, *common, *first)) == 0
        found.append(checkpoint.read(folders.models / f"{name}.pth").header)
    assert {(header.bands, header.stretch, header.normalize) for header in found} == {("1,2,3,4", "2%,98%", "data")}
    assert len({header.statistics for header in found}) == 1
    assert len(found[0].statistics.mean) == 4
    report = ["--evaluation", "--path_l2g=three.pth", "--task_name=eval", f"--report={tmp_path / 'report'}"]
    assert train_deep_globe.main(folders.arguments(3, *common, *report)) == 0
    assert json.loads((folders.logs / "eval.json").read_text())["images"] >= 1

    wanted = ["--overlay", "--polygons=gpkg"]
    assert run(folders.models / "three.pth", multispectral / "images", output=tmp_path / "out", options=wanted) == 0
    masks = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "out").glob("*_mask.tif")}
    assert len(masks) == 4
    for name, mask in masks.items():
        missing = np.zeros(SIZE, bool)
        missing[CORNER] = name == "img0_mask.tif"
        assert np.array_equal(mask == IGNORED, missing), name
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 4

    record = summary(tmp_path / "out")
    for image in record["images"]:
        meta, _, _, values = pyogrio.raw.read(tmp_path / "out" / f"{Path(image['image']).stem}.gpkg")
        fields = dict(zip(meta["fields"].tolist(), values, strict=True))
        assert len(fields["class"]) == image["features"] > 0
        areas = np.bincount(fields["class"], fields["square_metres"], len(record["classes"]))
        np.testing.assert_allclose(areas, image["areas"], rtol=1e-12)


def test_the_command_line_overrides_the_file_and_the_checkpoint_both(multispectral, caplog) -> None:
    def resolved(*arguments: str, **files: Header) -> Header:
        options = command_line.build_parser().parse_args(["--dataset=folder", f"--backbone={BACKBONE}", *arguments])
        read = {name: checkpoint.Checkpoint(Path(f"{name}.pth"), header, {}) for name, header in files.items()}
        return setup.resolve(options, read, described)[1]

    described = describe("folder", multispectral)
    assert (described.bands, described.stretch) == ("1,2,3,4", "2%,98%")
    header = resolved()
    assert (header.bands, header.stretch, header.n_bands) == ("1,2,3,4", "2%,98%", 4)
    header = resolved("--bands=4,1", "--stretch=0,3000")
    assert (header.bands, header.stretch, header.n_bands) == ("4,1", "0,3000", 2)

    classes = described.classes
    four = build_header(1, classes=classes, bands="4,3,2,1", stretch="0,9")
    header = resolved("--mode=2", path_g=four)
    assert (header.bands, header.stretch) == ("4,3,2,1", "0,9")
    assert resolved("--mode=2", "--bands=1,1,2,2", path_g=four).bands == "1,1,2,2"
    with pytest.raises(InputError, match=r"--bands 1,2: path_g\.pth was made with 4 bands"):
        resolved("--mode=2", "--bands=1,2", path_g=four)
    with caplog.at_level("INFO"):
        assert resolved("--mode=2", path_g=build_header(1, classes=classes)).n_bands == 3  # of an older file
    assert "the data set's file names the bands 1,2,3,4" in caplog.text
    assert resolved("--mode=2", "--bands=2", path_g=build_header(1, classes=classes)).bands == "2,2,2"
    assert resolved(init_from=build_header(3, classes=classes)).bands == "1,2,3,4"


def test_a_description_measures_a_stretch_of_values(multispectral, tmp_path) -> None:
    output = tmp_path / "measured.json"
    arguments = ["--images=images/{id}.tif", "--labels=labels/{id}.png", "--quiet", f"--output={output}"]
    assert describe_main([str(multispectral), *arguments, "--stretch=measured"]) == 0
    stretch = Stretch.parse(json.loads(output.read_text())["stretch"])
    limits = []
    for path in sorted((multispectral / "images").glob("*.tif")):
        with open_image(path, View((1, 2, 3, 4))) as source:
            limits += source.limits
    assert not stretch.per_cent
    assert stretch.low <= min(low for low, _ in limits) < stretch.low + 1
    assert stretch.high - 1 < max(high for _, high in limits) <= stretch.high
    assert stretch.high < 6000  # pixels without data are not measured


def test_rgb_grey_and_transparency_need_no_entries(tmp_path) -> None:
    label = Image.fromarray((np.arange(54).reshape(6, 9) % 2 * 255).astype(np.uint8))
    for mode in ("RGB", "L", "RGBA", "LA"):
        folder = tmp_path / mode
        folder.mkdir()
        Image.new(mode, (9, 6)).save(folder / "a.png")
        label.save(folder / "a_mask.png")
        assert describe_main([str(folder), "--images={id}.png", "--labels={id}_mask.png", "--quiet", "--val=0"]) == 0
        assert not {"bands", "stretch"} & json.loads((folder / "dataset.json").read_text()).keys()


def test_bands_read_back_as_they_are_spelt_and_are_as_many_as_the_checkpoint_s(monkeypatch) -> None:
    """Three take a single one as grey."""
    for text in ("4,3,2,8", "1", "1,2", "16," * 15 + "16"):
        assert spell_bands(parse_bands(text)) == text
        assert count_bands(text) == text.count(",") + 1
    assert (fit_bands((4,), 3, "f"), fit_bands((4,), 1, "f")) == ((4, 4, 4), (4,))
    with pytest.raises(InputError, match=r"--bands 4,3: f was made with 3 bands"):
        fit_bands((4, 3), 3, "f")
    file = checkpoint.Checkpoint(Path("a.pth"), build_header(1, bands="4,3,2,1"), {})
    assert header_for(file, None, {"bands": "1,2,3,4"}, Classes.generic(N_CLASS)).bands == "1,2,3,4"
    with pytest.raises(InputError, match=r"--bands 1: a\.pth was made with 4 bands"):
        header_for(file, None, {"bands": "1"}, Classes.generic(N_CLASS))
    with pytest.raises(InputError, match=r"made with 4 bands; released files are of 3"):
        monkeypatch.setattr(checkpoint, "read", lambda path: file)
        checkpoint.export(file.path, Path("b.pth"))


def test_branches_draw_the_same_weights_whatever_the_bands_and_widen_those_that_read_them() -> None:
    """RGB is kept, one band is its sum, and others are scaled."""
    states = []
    for arguments in ((), (4,)):
        torch.manual_seed(0)
        states.append(Branch(BACKBONE, N_CLASS, False, *arguments).state_dict())
    first = "backbone.conv1.weight"
    for name, tensor in states[0].items():
        assert name == first or torch.equal(tensor, states[1][name]), name
    kernels = states[0][first]
    assert torch.equal(states[1][first], widen(kernels, 4))
    assert torch.equal(widen(kernels, 3), kernels)
    assert torch.equal(widen(kernels, 1), kernels.sum(1, keepdim=True))
    for n_bands in (2, 4, 16):
        expected = kernels[:, [band % 3 for band in range(n_bands)]] * 3 / n_bands
        torch.testing.assert_close(widen(kernels, n_bands), expected)


@pytest.mark.parametrize("n_bands", [1, 6])
def test_equal_bands_give_what_rgb_gives(n_bands) -> None:
    """Of any module: the first Conv2d, however deep, is widened, and the others stay."""
    first, second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 5, 1)
    module = nn.Sequential(nn.Identity(), nn.Sequential(first, nn.ReLU()), second)
    grey = torch.randn(2, 1, 9, 9)
    expected = module(grey.expand(-1, 3, -1, -1))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    set_bands(module, n_bands)
    torch.testing.assert_close(module(grey.expand(-1, n_bands, -1, -1)), expected)
    assert first.in_channels == n_bands
    fitted = fit_kernels(module, state)
    module.load_state_dict(fitted)
    torch.testing.assert_close(module(grey.expand(-1, n_bands, -1, -1)), expected)
    assert fit_kernels(module, fitted).keys() == fitted.keys()
    assert torch.equal(fit_kernels(module, fitted)["1.0.weight"], fitted["1.0.weight"])


def test_weights_of_rgb_start_a_network_of_four_bands_and_others_do_not(tmp_path) -> None:
    checkpoint.save(tmp_path / "rgb.pth", build_thin_model(), build_header(1), STAGES[3].uses)
    file = checkpoint.read(tmp_path / "rgb.pth")
    model = empty_network().to_empty(device="cpu")
    checkpoint.load_but_classes(model, file)
    for name in ("global_", "local", "refined"):
        expected = widen(file.tensors[f"{name}.backbone.conv1.weight"], 4)
        torch.testing.assert_close(getattr(model, name).backbone.conv1.weight, expected)
    six = checkpoint.Checkpoint(tmp_path / "six.pth", build_header(1, bands="1,2,3,4,5,6"), file.tensors)
    with pytest.raises(InputError, match=r"six\.pth was made with 6 bands"):
        checkpoint.load_but_classes(model, six)


def test_normalisations_fit_any_bands_or_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^--normalize imagenet .* reads 4; give data, half or none$"):
        build_header(1, bands="1,2,3,4", normalize="imagenet").settings()
    with pytest.raises(InputError, match=r"^--normalize data needs the statistics"):
        build_header(1, normalize="data").settings()
    pixels = torch.stack([image(1, seed=k)[0] // (k + 1) for k in range(5)])
    for name, mean, std in (("none", 0, 1), ("half", 0.5, 0.5)):
        found = build_header(1, bands="1,2,3,4,5", normalize=name).settings().to_input(pixels[None])
        torch.testing.assert_close(found, (pixels[None] / 255 - mean) / std)
    counts = torch.stack([torch.bincount(band.flatten(), minlength=256) for band in pixels])
    found = build_settings(statistics=statistics_of(counts)).to_input(pixels[None])
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(5))
    flat = torch.zeros((1, 256), dtype=torch.int64)
    with pytest.raises(InputError, match="no pixel"):
        statistics_of(flat)
    flat[0, 7] = 5
    assert statistics_of(flat).std == (SMALLEST_STD,)


def test_counts_leave_out_missing_pixels_and_parts_add_up(multispectral) -> None:
    described = describe("folder", multispectral)
    items = [item for name in described.splits for item in described.find(name)]
    data = SegmentationDataset(items, Classes.generic(2), 8)
    data.view = View((4, 1), Stretch(0, 5000, per_cent=False))
    whole = count_values(data, range(4), quiet=True)
    parts = [count_values(data, [k], quiet=True) for k in range(4)]
    assert torch.equal(sum(parts), whole)
    cells, corner = SIZE[0] * SIZE[1], CORNER[0].stop * CORNER[1].stop
    assert sorted(int(part[0].sum()) for part in parts) == [cells - corner, cells, cells, cells]
    k = next(k for k, item in enumerate(data.items) if item.id == "img1")
    pixels, _ = data.reader.read(data.items[k])
    expected = torch.stack([torch.bincount(band.flatten(), minlength=256) for band in pixels])
    assert torch.equal(parts[k], expected)


def test_statistics_are_those_of_the_resume_file_or_refused_before_stage_1_measured_them(monkeypatch, tmp_path) -> None:
    statistics = Statistics((0.25,) * 4, (0.125,) * 4)
    saved = {"statistics": json.dumps(asdict(statistics))}
    resume = tmp_path / "a.resume.pth"
    monkeypatch.setattr(setup.state, "read", lambda path: {"options": saved})
    header = build_header(1, bands="1,2,3,4", normalize="data")
    assert setup.find_statistics(header, None, None, resume, 0) == statistics
    saved["statistics"] = "[]"
    with pytest.raises(InputError, match=r"a\.resume\.pth is damaged"):
        setup.find_statistics(header, None, None, resume, 0)
    options, cpu = command_line.build_parser().parse_args([]), torch.device("cpu")
    assert setup.training_settings(options, header, cpu).statistics is None
    for build, stage in ((setup.evaluation_settings, 1), (setup.training_settings, 2)):
        with pytest.raises(InputError, match="--normalize data needs the statistics"):
            build(options, replace(header, stage=stage), cpu)


@pytest.mark.parametrize("n_bands", [1, 2, 3, 4, 5, 16])
def test_bands_are_shrunk_one_by_one_and_count_in_memory(n_bands) -> None:
    """Pillow takes the last of two or four bands for transparency, and weights the others by it."""
    pixels = image(n_bands)
    for most in (1 << 30, 1):
        found = shrink(MemorySource(pixels), (24, 33), most)
        assert found.shape == (n_bands, 24, 33)
        for band, own in zip(found, pixels, strict=True):
            expected = shrink(MemorySource(own.expand(3, -1, -1)), (24, 33), most)
            assert torch.equal(expected, band.expand(3, -1, -1))
    if n_bands > 3:
        source, cells = MemorySource(pixels), SIZE[0] * SIZE[1]
        assert load_in_memory(source, cells * n_bands // 3 + 1) is not source
        assert load_in_memory(source, cells) is source


@pytest.mark.parametrize("n_bands", [1, 2, 4, 8])
def test_augmentation_and_pictures_take_any_bands(n_bands) -> None:
    """Brightness and contrast change; three bands are shown, or the first as grey."""
    pixels = image(n_bands)
    change = ColorChange(1.2, 0.8, saturation=1.25, hue=0.03)
    found = change.apply(pixels)
    bright = (pixels.float() * 1.2).clamp(0, 255).to(torch.uint8).float()
    expected = (0.8 * bright + 0.2 * bright.mean()).round().clamp(0, 255)
    assert (found.float() - expected).abs().max() <= 1
    assert torch.equal(ColorChange(1.2, 0.8).apply(pixels), found)
    varied, ids = Draw(scale=1.3, color=change).apply(pixels, pixels[0], (91, 117))
    assert (varied.shape, ids.shape) == ((n_bands, 91, 117), (91, 117))
    shown = pixels[:3] if n_bands > 2 else pixels[:1].expand(3, -1, -1)
    assert np.array_equal(as_rgb(pixels), shown.permute(1, 2, 0))


@pytest.mark.parametrize("bands", [(4, 3, 2, 1), (2,), (1, 2), (4, 4, 1), (1,) * 16])
def test_files_and_arrays_give_the_bands_that_are_asked_for(multispectral, bands) -> None:
    path, view = multispectral / "images" / "img0.tif", View(bands, Stretch(0, 5000, per_cent=False))
    box = Box(10, 20, 30, 40)
    with open_image(path, View((1, 2, 3, 4), view.stretch)) as source:
        every = source.read(box)
    with open_image(path, view) as source:
        assert source.n_bands == len(bands) == view.n_bands
        assert torch.equal(source.read(box), every[[band - 1 for band in bands]])
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    found = array(values, view).read(Box(0, 0, *SIZE))
    assert np.array_equal(found, values.transpose(2, 0, 1)[[band - 1 for band in bands]])


def test_arrays_of_other_types_are_stretched_and_lack_what_is_not_finite() -> None:
    values = np.linspace(0, 1, 2 * 6 * 8, dtype=np.float32).reshape(6, 8, 2)
    values[0, 0, 1] = np.nan
    source = array(values, View((1, 2), Stretch(0, 1, per_cent=False)))
    box = Box(0, 0, 6, 8)
    assert source.valid(box).sum() == 47
    expected = np.nan_to_num(values.transpose(2, 0, 1) * 255).round()
    expected[:, 0, 0] = 0
    np.testing.assert_allclose(source.read(box).numpy(), expected, atol=1)
    for wrong in (np.zeros((2, 2, 2, 2)), np.zeros((4, 4), bool), np.zeros((4, 4), complex)):
        with pytest.raises(InputError, match="an array must be"):
            array(wrong, View((1,)))


def empty_network() -> GLNet:
    """Of four bands, without memory."""
    with torch.device("meta"):
        return GLNet(N_CLASS, BACKBONE, 4)


@functools.cache
def four_band_segmenter(scene_size: int = 5000) -> Segmenter:
    model, state = empty_network(), dict(shared_model().state_dict())
    for name in ("global_", "local", "refined"):
        state = fit_kernels(getattr(model, name).backbone, state, f"{name}.backbone.")
    model.load_state_dict(state, assign=True)
    header = build_header(1, bands="4,3,2,1", stretch="0,5000")
    return Segmenter(Predictor.prepare(model, STAGES[1], build_settings(), SIDE), header, scene_size)


def test_prediction_takes_files_windows_and_arrays_and_names_an_image_that_lacks_bands(
    multispectral, tmp_path, monkeypatch
) -> None:
    rasterio = pytest.importorskip("rasterio")
    segmenter = four_band_segmenter()
    path = multispectral / "images" / "img1.tif"
    with rasterio.open(path) as file:
        values = file.read().transpose(1, 2, 0)
    ids = segmenter.segment(path)
    assert ids.shape == SIZE
    assert np.array_equal(segmenter.segment(values), ids)
    assert np.array_equal(segmenter.segment(values[..., ::-1], bands=(1, 2, 3, 4)), ids)
    assert not np.array_equal(segmenter.segment(path, bands=(1, 2, 3, 4)), ids)
    with pytest.raises(InputError, match=r"the checkpoint was made with 4 bands"):
        segmenter.segment(path, bands=(1, 2, 3))
    Image.new("RGB", (70, 70)).save(tmp_path / "rgb.png")
    with pytest.raises(InputError, match=r"rgb\.png: --bands 4,3,2,1: rgb\.png has 3 bands"):
        segmenter.segment(tmp_path / "rgb.png")
    scenes, path = four_band_segmenter(scene_size=48), multispectral / "images" / "img0.tif"
    expected = scenes.segment(path)
    monkeypatch.setattr("prediction.read_ahead.load_in_memory", lambda source: source)
    assert np.array_equal(scenes.segment(path), expected)
    assert (expected[CORNER] == IGNORED).all()
