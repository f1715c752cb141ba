"""Scores that are not finite numbers: no mask and no score comes of them; image and precision are named."""

from pathlib import Path

import pytest
import torch
from builders import N_CLASS, build_header, build_model, build_predictor, build_sample, build_settings
from pictures import run, save, summary

import train_deep_globe
from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from evaluation.run import evaluate_images
from models import checkpoint
from models.glnet import GLNet
from prediction.segmenter import Segmenter
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES

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
    for k in "ab":
        save(tmp_path / f"{k}.png")
    out = tmp_path / "out"
    assert run(tmp_path / "bad.pth", tmp_path / "a.png", tmp_path / "b.png", output=out, options=options) == 1
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    failures = summary(out)["failures"]
    assert [str(tmp_path / f"{k}.png") in failures[i] for i, k in enumerate("ab")] == [True, True]
    assert all("not finite" in line for line in failures)


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
    for model, bad in ((build_model(), ()), (poisoned(torch.nan, HEADS[mode]), ("1", "2"))):
        predictor = build_predictor(model, mode, build_settings())
        samples = [[build_sample((70, 100), id_=id_) for id_ in ("1", "2")]]
        found = evaluate_images(
            predictor, samples, StageMetrics(STAGES[mode], N_CLASS), on_image=lambda sample, _: seen.append(sample.id)
        )
        assert found.not_finite == bad
    assert seen == ["1", "2"]  # of the sound network


def test_an_evaluation_of_them_ends_in_one_line(tmp_path, capsys) -> None:
    data: Path = tmp_path / "data"
    synthetic.generate(data, 4, 80, seed=0, prepared=True)
    (tmp_path / "models").mkdir()
    model = poisoned(torch.nan, HEADS[1], len(DEEP_GLOBE))
    checkpoint.save(tmp_path / "models" / "one.pth", model, build_header(1, classes=DEEP_GLOBE))
    arguments = [f"--data_path={data}", f"--model_path={tmp_path / 'models'}", f"--log_path={tmp_path / 'logs'}"]
    arguments += ["--evaluation", "--mode=1", "--path_g=one.pth", "--task_name=bad", "--num_workers=0", "--device=cpu"]
    assert train_deep_globe.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "not finite" in line
    assert not (tmp_path / "logs" / "bad.json").exists()
