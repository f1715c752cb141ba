"""The precision `auto` is bf16 where the device is made for it; scores that are not finite give no result."""

import json
from pathlib import Path

import pytest
import runs
import torch
from builders import N_CLASS, build_header, build_model, build_predictor, build_sample, build_settings
from pictures import run, save, summary
from runs import Folders, generate

import train_deep_globe
from dataset.deep_globe import DEEP_GLOBE
from evaluation.run import evaluate_images
from models import checkpoint
from models.glnet import GLNet
from prediction.segmenter import Segmenter
from utils import precision
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.precision import computes_bf16, resolve_precision
from utils.stages import STAGES

CPU = torch.device("cpu")


def test_a_cpu_computes_bf16_if_it_has_instructions_for_it_and_auto_is_fp32_elsewhere(monkeypatch) -> None:
    for features in ({}, {"avx512_f": True}, {"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert computes_bf16(CPU) == any("bf16" in name for name in features)
        assert resolve_precision("auto", CPU) == ("bf16" if computes_bf16(CPU) else "fp32")
    assert resolve_precision("auto", torch.device("meta")) == "fp32"


@pytest.mark.parametrize("native", [True, False])
def test_only_emulated_bf16_is_warned_of(monkeypatch, caplog, native: bool) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: native)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert len(caplog.messages) == (not native)
    assert native or "emulating" in caplog.text
    monkeypatch.setenv("RANK", "1")
    resolve_precision("bf16", CPU)
    assert len(caplog.messages) == (not native)


@pytest.mark.slow
def test_runs_record_what_auto_stands_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    folders = runs.Folders(tmp_path, runs.generate(tmp_path / "data", images=4, size=64))
    assert train_deep_globe.main(folders.arguments(1, "--precision=auto", "--num_epochs=1")) == 0
    (record,) = folders.logs.glob("*/run.json")
    assert json.loads(record.read_text())["options"]["precision"] == "fp32"
    image, out = tmp_path / "a.png", tmp_path / "out"
    save(image)
    assert run(folders.models / "one.pth", image, output=out, options=["--precision=auto"]) == 0
    assert json.loads((out / "summary.json").read_text())["precision"] == "fp32"


HEADS = {1: "global_.head.bias", 2: "local.head.bias", 3: "refined.head.bias"}


def poisoned(value: float, name: str, n_class: int = N_CLASS) -> GLNet:
    """A network one of whose biases is `value` for one class."""
    model = build_model(n_class)
    model.get_parameter(name).data[1] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        (1, "global_.head.bias", []),
        (2, "ensemble.bias", ["--tta", "flip"]),
        (3, "ensemble.bias", ["--scene_size", "64"]),
        (2, "global_.head.bias", ["--refine_share", "0.3"]),
    ],
)
def test_prediction_names_the_image_and_makes_no_result(tmp_path, mode, name, options, value) -> None:
    checkpoint.save(tmp_path / "bad.pth", poisoned(value, name), build_header(mode))
    images, out = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out"
    for path in images:
        save(path)
    assert run(tmp_path / "bad.pth", *images, output=out, options=options) == 1
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    for path, line in zip(images, summary(out)["failures"], strict=True):
        assert str(path) in line and "not finite" in line


def test_an_overflow_names_the_precision(tmp_path) -> None:
    model = build_model()
    model.global_.head.weight.data.mul_(1e7)
    checkpoint.save(tmp_path / "large.pth", model, build_header(1))
    image = save(tmp_path / "a.png")
    assert Segmenter.from_checkpoint(tmp_path / "large.pth", device="cpu").segment(image).max() < N_CLASS
    narrow = Segmenter.from_checkpoint(tmp_path / "large.pth", device="cpu", precision="fp16")
    with pytest.raises(InputError, match=r"a\.png: .* not finite in --precision fp16: give --precision fp32 or bf16"):
        narrow.segment(tmp_path / "a.png")


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_evaluation_tells_which_images(mode) -> None:
    seen: list[str] = []
    samples = [[build_sample((70, 100), id_=id_) for id_ in ("1", "2")]]
    for model, bad in ((build_model(), ()), (poisoned(torch.nan, HEADS[mode]), ("1", "2"))):
        predictor, metrics = build_predictor(model, mode, build_settings()), StageMetrics(STAGES[mode], N_CLASS)
        found = evaluate_images(predictor, samples, metrics, on_image=lambda sample, _: seen.append(sample.id))
        assert found.not_finite == bad
    assert seen == ["1", "2"]  # of the sound network


def test_an_evaluation_of_them_ends_in_one_line(tmp_path, capsys) -> None:
    folders = Folders(tmp_path, generate(tmp_path / "data", images=4))
    folders.models.mkdir()
    model = poisoned(torch.nan, HEADS[1], len(DEEP_GLOBE))
    checkpoint.save(folders.models / "one.pth", model, build_header(1, classes=DEEP_GLOBE))
    arguments = folders.arguments(1, "--evaluation", "--path_g=one.pth", "--task_name=bad", "--device=cpu")
    assert train_deep_globe.main([one for one in arguments if not one.startswith(("--pyramid", "--num_epochs"))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "not finite" in line and not (folders.logs / "bad.json").exists()
