"""Exported parts compute what the network computes; the example segments as the project does."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import runs
import torch
from builders import BACKBONE, N_CLASS, build_header, shared_model, write_thin_checkpoint
from pictures import save
from PIL import Image

from examples import segment_onnx
from models import checkpoint
from models.glnet import GLNet
from models.parts import parts_of
from models.resnet import DEPTHS
from predict import Segmenter
from prediction import export
from utils.classes import Classes
from utils.errors import InputError, RunError
from utils.files import new_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

PARTS = ("global", "local", "refined", "ensemble")

STANDARD = {"Add", "Concat", "Conv", "Div", "MaxPool", "Relu", "Reshape", "Resize", "Shape", "Slice", "Squeeze"}
"""The operators of the graphs; those but Conv, Relu, MaxPool, Resize, Add and Concat compute sizes."""

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # an import of it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"models", "utils", "prediction"} & set(sys.modules)
"""


def export_once(programs: list, file: Path, folder: Path, kind: str) -> None:
    """Export as the command does; `programs` keeps the traced parts from one call to the next."""
    trace = export.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", lambda *found: programs or programs.extend(trace(*found)) or programs)
        export.export(file, folder, None, None, kind)


@pytest.fixture(scope="module")
def network():
    """A GLNet whose backbones are smaller than any real one; all that is restored in this module is of its kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEPTHS, "resnet18", (1, 1, 1, 1))
        yield shared_model.__wrapped__()  # one that other tests do not get


@pytest.fixture(scope="module")
def programs() -> list:
    return []


@pytest.fixture(scope="module")
def exported(network: GLNet, programs: list, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("export")
    checkpoint.save(work / "mode3.pth", network, build_header(3, normalize="imagenet"))
    export_once(programs, work / "mode3.pth", work / "mode3", "onnx")
    return work / "mode3"


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_parts_compute_what_the_network_computes(mode, norm, network) -> None:
    if norm == "batch":
        network = GLNet(N_CLASS, BACKBONE, pyramid_width=8, pyramid_norm=norm).eval()
    with torch.no_grad():
        expected = export.expected_tensors(network, build_header(mode, size_g=72))
        parts = parts_of(network, mode)
        assert [part.name for part in parts] == list(expected)
        for part in parts:
            tensors = expected[part.name]
            for name, found in zip(part.outputs, part(*(tensors[name] for name in part.inputs)), strict=True):
                torch.testing.assert_close(found, tensors[name], atol=1e-4, rtol=1e-4)


def test_every_part_is_a_graph_of_standard_operators_that_names_no_files_of_the_exporter(exported) -> None:
    assert {path.name for path in exported.iterdir()} == {"glnet.json", *(f"{name}.onnx" for name in PARTS)}
    assert not list(exported.parent.glob(".*"))
    for path in exported.glob("*.onnx"):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", export.OPSET)]
        assert {node.op_type for node in model.graph.node} <= STANDARD
        model.graph.ClearField("initializer")
        text = model.SerializeToString()
        assert str(ROOT).encode() not in text
        assert b"site-packages" not in text


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "changes"),
    [((150, 100), {}), ((40, 70), {}), ((30, 20), {}), ((90, 210), {"context": "scale", "scale": 1.3})],
)
def test_the_example_segments_as_the_project_does(mode, size, changes, exported, network, tmp_path):
    folder = exported.with_name(f"mode{mode}{changes.get('context', '')}")
    if not folder.exists():  # its files are some of mode 3's
        header = build_header(mode, normalize="imagenet", **changes)
        checkpoint.save(folder.with_suffix(".pth"), network, header)
        folder.mkdir()
        for part in parts_of(network, mode):
            (folder / f"{part.name}.onnx").symlink_to(exported / f"{part.name}.onnx")
        export.write_json(folder / "glnet.json", export.describe(parts_of(network, mode), header, "onnx"))
    image = save(tmp_path / "a.png", size)
    expected = Segmenter.from_checkpoint(folder.with_suffix(".pth"), device="cpu").segment(image)
    found = segment_onnx.segment(segment_onnx.Network(folder), image)
    assert (found.shape, found.dtype) == (size, np.uint8)
    assert size == (30, 20) or len(np.unique(expected)) > 1  # not a constant, but for the smallest
    assert (found == expected).mean() >= 0.999


def test_the_example_needs_neither_torch_nor_the_project_and_refuses_coarse_to_fine(exported, tmp_path) -> None:
    image = save(tmp_path / "a.png", (70, 100))
    arguments = segment_onnx.__file__, exported, "a.png", "mask.png"
    runs.run_python(WITHOUT_TORCH, *arguments, folder=tmp_path, flags=("-I",))
    mask = Image.open(tmp_path / "mask.png")
    assert np.array_equal(mask, segment_onnx.segment(segment_onnx.Network(exported), image))
    palette = [value for color in Classes.generic(N_CLASS).palette for value in color]
    assert mask.getpalette()[: len(palette)] == palette
    about = json.loads((exported / "glnet.json").read_text())
    (tmp_path / "glnet.json").write_text(json.dumps({**about, "coarse_to_fine": True}))
    with pytest.raises(SystemExit, match="coarse to fine"):
        segment_onnx.Network(tmp_path)


def test_programs_of_torch_export_compute_the_same_or_leave_nothing(exported, programs, tmp_path, capsys, monkeypatch):
    """Files are compared at sizes that fit no encoder, too."""
    seen, compare = [], export.compare

    def noted(path: Path, part, tensors: dict) -> float:
        seen.append((path.name, tuple(tensors[part.inputs[0]].shape[2:])))
        return compare(path, part, tensors)

    monkeypatch.setattr(export, "compare", noted)
    export_once(programs, exported.with_suffix(".pth"), tmp_path / "programs", "pt2")
    side_g, side_p = export.ODD_SIZES
    for name, side in (("global", side_g), ("local", side_p), ("refined", side_g)):
        sizes = [size for file, size in seen if file == f"{name}.pt2"]
        assert (side, side) in sizes and len(sizes) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"{name}.pt2" for name in PARTS]
    assert json.loads((tmp_path / "programs" / "glnet.json").read_text())["opset"] is None
    compute = programs[0].module()
    assert compute(torch.rand(3, 3, 33, 40))[0].shape == (3, N_CLASS, 9, 10)
    with pytest.raises(AssertionError, match="Guard failed"):
        compute(torch.rand(3, 3, 32, 40))
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"global.pt2: logits differs from the network by 0.0e\+00 of its range"):
        export_once(programs, exported.with_suffix(".pth"), tmp_path / "off", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["programs"]


def test_an_encoder_of_timm_keeps_its_padding_at_every_size(tmp_path) -> None:
    """The command compares; here the file is run at other sizes than those."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    network = GLNet(N_CLASS, "timm/test_resnet")
    checkpoint.save(tmp_path / "one.pth", network, build_header(1, backbone="timm/test_resnet", size_g=44))
    export.export(tmp_path / "one.pth", tmp_path / "out", None, None, "onnx")
    (part,) = parts_of(network.eval(), 1)
    for height, width in ((64, 96), (33, 70), (31, 64)):
        image = torch.rand(1, 3, height, width)
        with torch.no_grad():
            expected = dict(zip(part.outputs, part(image), strict=True))
        export.compare(tmp_path / "out" / "global.onnx", part, {"image": image, **expected})


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch) -> None:
    """Programs of small images, networks without shared maps, and any network where a package is missing."""
    wrong = {
        "--format pt2 needs sides of at least 33 pixels; use --format onnx": (1, {"size_g": 32}),
        r"network.pth was trained with --share none.*--mode 1": (2, {"share": "none"}),
    }
    for message, (stage, changes) in wrong.items():
        write_thin_checkpoint(tmp_path / "network.pth", stage, **changes)
        with pytest.raises(InputError, match=message):
            export.export(tmp_path / "network.pth", tmp_path / "programs", None, None, "pt2")
    for name in export.PACKAGES:
        with monkeypatch.context() as patch, pytest.raises(InputError, match=rf"{name}.*: pip install onnx onnxrunt"):
            patch.setitem(sys.modules, name, None)
            export.export(tmp_path / "missing.pth", tmp_path / "out", None, None, "onnx")


def test_new_folders_appear_whole_or_not_at_all(tmp_path) -> None:
    (tmp_path / ".a.part").mkdir()
    (tmp_path / ".a.part" / "left").touch()  # by a killed process
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as beside:
        (beside / "half").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "a") as beside:
        assert not list(beside.iterdir())
        assert not (tmp_path / "a").exists()
        (beside / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "whole"]
    (tmp_path / "file").touch()
    for name in ("a", "file"):
        with pytest.raises(InputError, match=f"{name} exists already; remove it"), new_folder(tmp_path / name):
            raise AssertionError


def test_the_example_refuses_pictures_of_more_than_8_bits(tmp_path) -> None:
    deep = np.random.default_rng(0).integers(0, 9999, (90, 80, 3)).astype(np.uint16)
    grey, names = deep[..., 0], ["float.tif", "int.tif"]
    for name, dtype in zip(names, (np.float32, np.int32), strict=True):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / name)
    pictures = {"rgb.png": deep, "rgb.ppm": deep, "rgb.jp2": deep, "grey.png": grey}
    names += [name for name, pixels in pictures.items() if cv2.imwrite(str(tmp_path / name), pixels)]
    for name in names:
        with pytest.raises(SystemExit, match=f"{name} has samples of more than 8 bits"):
            segment_onnx.read(tmp_path / name)
    plain = save(tmp_path / "a.png", (90, 80))
    for name, mode in {"ppm": "RGB", "png": "L", "gif": "P", "tif": "1", "jpg": "CMYK", "jp2": "RGB"}.items():
        plain.convert(mode).save(tmp_path / f"a.{name}")
        read = segment_onnx.read(tmp_path / f"a.{name}")
        assert (read.mode, read.size) == ("RGB", plain.size)
