"""The ablation: equal budgets, its order, its tables; late fusion; and the baselines, which train by the same path."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import describe_set, write_noise, write_thin_checkpoint

from dataset.registry import describe
from experiments import ablation, ablation_data, ablation_tables, baselines
from experiments.ablation import Experiment
from experiments.ablation_plan import DIFFERENCES, RATES, RECIPES, cost, plan, variants
from experiments.ablation_tables import Results, compare, iou_of
from imaging.sources import MemorySource
from utils.canvas import ArgmaxSink
from utils.errors import InputError
from utils.files import write_json
from utils.selection import Coverage
from utils.stages import STAGES

DATA = sorted(RECIPES)


def build_experiment(folder: Path, *more: str, data: str = "synthetic") -> Experiment:
    arguments = [f"--data={data}", f"--folder={folder}", f"--output={folder}", "--backbone_weights=none", *more]
    return Experiment(ablation.build_parser().parse_args(arguments))


def commands(folder: Path, *more: str, data: str = "synthetic") -> dict[str, list[str]]:
    experiment = build_experiment(folder, *more, data=data)
    return {name: experiment.training(run, 1) for name, run in experiment.runs.items()}


def names(arguments) -> set[str]:
    return {one.split("=")[0] for one in arguments}


@pytest.mark.parametrize("data", DATA)
def test_every_run_follows_those_that_it_starts_from_and_every_variant_can_be_read(data) -> None:
    by_name = {}
    for run in plan(RECIPES[data]):
        assert {other for _, other in run.starts} <= by_name.keys()
        assert run.family in RATES and run.name not in by_name
        by_name[run.name] = run
    rows = variants(RECIPES[data])
    for variant in rows:
        run = by_name[variant.run]
        assert variant.evaluation in run.evaluations and variant.prediction in STAGES[run.mode or 1].predictions
    assert {key for pair in DIFFERENCES for key in pair} <= {variant.key for variant in rows}


@pytest.mark.parametrize("data", DATA)
def test_all_that_is_trained_on_patches_reads_as_many_pixels_in_as_many_steps(data) -> None:
    recipe = RECIPES[data]
    for run in plan(recipe):
        read = cost(recipe, run)
        steps = read.epochs / read.images
        assert steps == pytest.approx(recipe.epochs[run.phase] / recipe.images[run.phase])
        if run.phase == 1:
            pixels = read.epochs * read.patches * (run.side or recipe.patch) ** 2
            # in a step at least one patch is read, which may be too large
            rel = 0.35 if read.images * read.patches == 1 else 0.15
            assert pixels == pytest.approx(recipe.epochs[1] * recipe.patches * recipe.patch**2, rel=rel)


@pytest.mark.parametrize("data", DATA)
def test_commands_differ_by_what_their_names_say_alone(tmp_path, data) -> None:
    found = commands(tmp_path, data=data)
    own = names(ablation.NETWORK)

    def more(name: str, than: str) -> set[str]:
        return {one for one in set(found[name]) - set(found[than]) if not names([one]) & {"--task_name", "--path_g2l"}}

    assert more("local", "g2l") <= {"--share=none", "--lamb_fmreg=0", f"--lr={RATES['local']}"}
    assert more("g2l_free", "g2l") == {"--lamb_fmreg=0"}
    assert more("l2g_free", "l2g") == set()
    assert more("deeplab", "unet") <= {"--model=deeplab", f"--lr={RATES['deeplab']}"}
    assert {one.split(".")[0] for one in more("unet_scores", "unet")} == {"--scores_of=global_1"}
    longer = names(more("unet_long", "unet"))
    assert {"--size_p", "--patches"} <= longer <= {"--size_p", "--patches", "--num_epochs", "--batch_size"}
    network = {*own, "--mode", "--val_every", "--resume", "--lr", "--lamb_fmreg"}
    assert names(more("g2l", "unet")) <= {*network, "--path_g", found["g2l"][1]}
    assert not names(found["released_g2l"]) & own
    assert all("--seed=1" in command for command in found.values())


def test_the_command_line_changes_budgets_rates_and_the_runs(tmp_path) -> None:
    more = ("--epochs", "5", "6", "7", "--images", "1", "2", "3", "--patches", "4", "--rate", "unet=0.5")
    found = commands(tmp_path, *more, "--only", "unet_scores")
    assert list(found) == ["global", "unet_scores"]
    assert {"--num_epochs=5", "--batch_size=1"} <= set(found["global"])
    assert {"--num_epochs=6", "--batch_size=2", "--patches=4", "--lr=0.5"} <= set(found["unet_scores"])


def test_averaged_weights_are_read_where_there_are_any(tmp_path, monkeypatch) -> None:
    experiment = build_experiment(tmp_path)
    run = experiment.runs["l2g"]
    monkeypatch.setattr(ablation, "COMMON", ())
    assert "--path_l2g=l2g_0.pth" in experiment.evaluation(run, 0, "own")
    monkeypatch.setattr(ablation, "COMMON", ("--ema=0.99",))
    assert "--path_g2l=g2l_0.ema.pth" in experiment.training(run, 0)
    assert "--path_l2g=l2g_0.ema.pth" in experiment.evaluation(run, 0, "own")
    assert "--path_g=unet_0.ema.pth" in experiment.evaluation(experiment.runs["unet"], 0, "own")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "unet2"], "unet2: there is no such run"),
        (["--folds", "9"], "--folds 9"),
        (["--trial", "a"], "needs --only"),
        (["--data=dubai"], "--data_path"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, more, message, refused) -> None:
    assert message in refused(ablation.main, f"--folder={tmp_path}", f"--output={tmp_path}", *more)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folds_hold_every_book_back_once_and_no_page_is_in_both_lists() -> None:
    recipe = replace(RECIPES["pages"], folds=2)
    ids = [f"book{book}_f{page}" for book in "ebadc" for page in range(3)]
    folds = ablation_data.deal(ids, recipe)
    held = [{recipe.group(id_) for id_ in fold["val"]} for fold in folds]
    assert held == [{"booka", "bookc", "booke"}, {"bookb", "bookd"}]
    for fold, books in zip(folds, held, strict=True):
        assert sorted(fold["train"] + fold["val"]) == sorted(ids)
        assert not books & {recipe.group(id_) for id_ in fold["train"]}
    with pytest.raises(InputError, match="as many books"):
        ablation_data.deal(ids, replace(recipe, folds=6))


def test_a_fold_reads_the_pages_of_the_set_that_it_was_made_of(tmp_path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    for split, name in (("train", "a_f1"), ("val", "b_f1")):
        write_noise(source, name, (32, 32))
        (source / f"{split}.txt").write_text(f"{name}\n")
    describe_set(source, {"lists": {"train": "train.txt", "val": "val.txt"}})
    ablation_data.prepare("pages", replace(RECIPES["pages"], folds=2), source, tmp_path / "out" / "data")
    described = describe("folder", tmp_path / "out" / "data" / "1")
    assert [item.id for item in described.find("train")] == ["a_f1"]
    (item,) = described.find("val")
    assert item.image.resolve() == source / "b_f1.png"


def fake_execute(experiment: Experiment, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> list[str]:
    """Replace the commands of an experiment by ones that write an evaluation's result; return their task names."""
    executed = []

    def execute(command: list[str], name: str) -> tuple[float, float]:
        task = next(one for one in command if one.startswith("--task_name=")).partition("=")[2]
        executed.append(task)
        if task == fails:
            raise InputError(f"{name} failed")
        scored = {key: {"mIoU": 0.5} for key in ("global", "local", "ensemble")}
        matrices = {key: {"scene1": [3, 1, 0, 2], "scene2": [1, 0, 1, 1]} for key in scored}
        record = {"classes": ["land", "water"], "left_out": [], "matrices": matrices, **scored}
        path = experiment.folder / "runs" / f"{task}.json"
        write_json(path, {**record, "seconds_per_image": 2.0, "peak_memory_mb": 9.0})
        return 60.0, 100.0

    monkeypatch.setattr(experiment, "execute", execute)
    return executed


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_trained_once_after_those_that_it_starts_from_and_the_command_goes_on_where_it_stopped(
    jobs, tmp_path, monkeypatch
) -> None:
    experiment = build_experiment(tmp_path, "--folds", "0", "2", f"--jobs={jobs}")
    first = fake_execute(experiment, monkeypatch, fails="eval_g2l_2_other")
    with pytest.raises(InputError, match="g2l_2 failed"):
        experiment.run()
    executed = fake_execute(experiment, monkeypatch)
    experiment.run()
    first.remove("eval_g2l_2_other")
    every = first + executed
    assert "g2l_2" in first and "eval_g2l_2_other" in executed
    expected = [
        f"{name}_{fold}{ending}"
        for run in plan(RECIPES["synthetic"])
        for name, ending in ((run.name, ""), *((f"eval_{run.name}", f"_{one}") for one in run.evaluations))
        for fold in (0, 2)
    ]
    assert sorted(every) == sorted(expected)  # what was trained before a failure is not trained again
    for fold in (0, 2):
        for run in experiment.runs.values():
            for _, other in run.starts:
                assert every.index(f"{other}_{fold}") < every.index(f"{run.name}_{fold}")
    executed.clear()
    experiment.run()
    assert not executed


def test_nothing_is_started_when_the_hours_are_spent(tmp_path, monkeypatch, capsys) -> None:
    experiment = build_experiment(tmp_path, "--hours=-1", "--only", "unet_scores", "--folds", "0")
    executed = fake_execute(experiment, monkeypatch)
    experiment.run()
    assert not executed and "2 runs are left" in capsys.readouterr().out


def test_trials_have_files_of_their_own_and_a_table_of_what_differs(tmp_path, monkeypatch) -> None:
    only = ("--folds", "0", "--only", "unet_scores")
    experiment = build_experiment(tmp_path, *only)
    fake_execute(experiment, monkeypatch)
    experiment.run()
    trial = build_experiment(tmp_path, *only, "--rate", "unet=0.5", "--trial", "fast", "--more", "--gamma=2")
    executed = fake_execute(trial, monkeypatch)
    trial.run()
    assert executed == ["unet_scores.fast_0", "eval_unet_scores.fast_0_own"]  # global is not trained again
    assert any(one.startswith("--scores_of=global_0.") for one in trial.training(trial.runs["unet_scores"], 0))

    def listed() -> dict[str, list[str]]:
        return {one["trial"]: one["differs"] for one in json.loads(path.read_text())["trials"]}

    path = tmp_path / "trials_synthetic.json"
    assert listed() == {"": [f"--lr={RATES['unet']}"], "fast": ["--lr=0.5", "--gamma=2"]}
    assert "`--lr=0.5 --gamma=2`" in path.with_suffix(".md").read_text()
    assert {one["fold"] for one in json.loads((tmp_path / "ablation_synthetic.json").read_text())["runs"]} == {0}
    # rows of trials whose results are gone are kept, until there are results of the same trial
    (tmp_path / "runs_synthetic.json").unlink()
    for file in (trial.folder / "results").glob("unet_scores*"):
        file.unlink()
    again = build_experiment(tmp_path, *only, "--rate", "unet=0.7", "--trial", "faster")
    fake_execute(again, monkeypatch)
    again.run()
    assert list(listed()) == ["", "fast", "faster"]
    again = build_experiment(tmp_path, *only, "--rate", "unet=0.7", "--trial", "fast", "--more", "--gamma=3")
    fake_execute(again, monkeypatch)
    again.run()
    assert listed()["fast"] == ["--gamma=3"]


def result(run: str, fold: int, matrices: dict[str, list[int]], **more) -> dict:
    """Return a result of two classes in which every prediction has the same confusion matrices."""
    names = ("global", "local", "ensemble")
    evaluation = {"classes": ["land", "title"], "left_out": [], "seconds_per_image": 2.0, "peak_memory_mb": 100.0}
    own = {**evaluation, "matrices": dict.fromkeys(names, matrices)}
    evaluations = dict.fromkeys(("own", "fused", "other", "blank"), own)
    training = {"trial": "", "arguments": [], "training_seconds": 60.0, "training_peak_mb": 200.0, **more}
    return {"run": run, "fold": fold, "evaluations": evaluations, **training}


def test_the_table_has_scores_of_pooled_images_and_means_over_folds(tmp_path) -> None:
    recipe = RECIPES["pages"]
    found = [
        result("global", 0, {"a_f1": [8, 2, 0, 0], "a_f2": [0, 0, 5, 5]}),
        result("global", 1, {"b_f1": [9, 1, 0, 0]}, training_seconds=None),
        result("g2l", 0, {"a_f1": [10, 0, 0, 0], "a_f2": [0, 0, 0, 10]}),
    ]
    ablation_tables.write(tmp_path, "pages", recipe, found)
    record = json.loads((tmp_path / "ablation_pages.json").read_text())
    rows = {row["variant"]: row for row in record["rows"]}
    first = (8 / 15 + 5 / 12) / 2  # pooled: land 8 right of 10, title 5 of 10
    assert rows["global alone"]["mIoU"] == pytest.approx((first + 0.9) / 2)  # the second fold has no title
    assert rows["global alone"]["iou"] == pytest.approx([(8 / 15 + 0.9) / 2, 5 / 12])
    assert rows["global alone"]["training_seconds"] == 60
    assert rows["global to local (stage 2)"]["training_seconds"] == 120  # stage 1 is counted
    table = (tmp_path / "ablation_pages.md").read_text()
    assert "| global to local (stage 2) | 1 | 100.0 | 100.0 | 100.0 | 2.0 | 200 | 2.00 | 100 |" in table
    (one,) = [one for one in record["differences"] if one["keys"] == ["g2l", "global"]]
    assert one["folds"] == [0] and one["by_group"] == {"a": pytest.approx(1 - first)}
    assert "| 1 of 1 |" in table
    assert one["difference"]["mIoU"] == {"value": pytest.approx(1 - first), "low": None, "high": None}
    # runs that an earlier command left count, too, and one that was trained anew replaces them
    for part in (found[:1], found[1:], [found[0]]):
        ablation_tables.write(tmp_path / "again", "pages", recipe, part)
    assert json.loads((tmp_path / "again" / "ablation_pages.json").read_text()) == record
    kept = json.loads((tmp_path / "again" / "runs_pages.json").read_text())["runs"]
    assert kept[1]["evaluations"]["own"]["matrices"]["local"] == {"a_f1": [8, 2, 5, 5]}
    ablation_tables.write(tmp_path / "again", "pages", recipe, [{**found[1], "arguments": ["--lr=1"]}])
    scores = json.loads((tmp_path / "again" / "ablation_pages.json").read_text())["runs"]
    assert {(one["key"], one["fold"]) for one in scores if "g2l" not in one["key"]} == {("global", 1)}


def test_the_gain_of_sharing_is_listed_by_the_side_of_patches(tmp_path) -> None:
    right, wrong = [9, 1, 0, 10], [9, 1, 10, 0]
    found = [
        result(f"{name}{ending}", 0, {"a_f1": matrix})
        for ending, pair in (("", (right, wrong)), ("_256", (right, right)))
        for name, matrix in zip(("g2l", "local"), pair, strict=True)
    ]
    gains = Results(RECIPES["pages"], found).gains()
    assert {one["side"]: one["gain"]["context"]["value"] for one in gains} == pytest.approx({128: 10 / 11, 256: 0})
    assert gains[0]["classes"]["context"] == ["title"]


def test_intervals_over_books_are_those_of_known_numbers() -> None:
    """Books of equal size, where the first variant is right in all pixels, the second in a share of each book.

    Of n such books the share of the pooled pixels is the mean of n draws, so its deviation is known.
    """
    rng = np.random.default_rng(1)
    shares = rng.uniform(0.2, 0.8, 40)
    right = {f"book{k}": np.array([[1000, 0], [0, 0]]) for k in range(40)}
    partly = {f"book{k}": np.array([[round(1000 * s), 1000 - round(1000 * s)], [0, 0]]) for k, s in enumerate(shares)}
    found = compare(right, partly, {"land": [0]})["land"]
    assert found["value"] == pytest.approx(1 - shares.mean(), abs=1e-3)
    half = 1.96 * shares.std() / np.sqrt(40)
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.15 * half)
    same = compare(partly, partly, {"land": [0]})["land"]
    assert same == {"value": 0, "low": 0, "high": 0}  # the same books are drawn of both
    assert compare({"a": right["book0"]}, {"a": partly["book0"]}, {"land": [0]})["land"]["low"] is None


class TwoBranches:
    """A predictor whose scores are given; it sends them in bands of different heights, local ones first."""

    stage = STAGES[2]
    settings = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, global_: torch.Tensor, local: torch.Tensor) -> None:
        self.scores = {"global": (global_, 3), "local": (local, 2)}

    def segment(self, image, sinks, *, means=False) -> Coverage:
        assert means and set(sinks) == {"global", "local"}
        for name in ("local", "global"):
            scores, rows = self.scores[name]
            for top in range(0, scores.shape[1], rows):
                sinks[name](top, scores[:, top : top + rows].clone())
        return Coverage()


def test_late_fusion_is_the_mean_of_both_softmaxes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(4, 7, 5, generator=generator) for _ in range(2))
    fusion = baselines.LateFusion(TwoBranches(a, b))
    found: list[tuple[int, torch.Tensor]] = []
    sinks = {name: ArgmaxSink((7, 5)) for name in ("global", "local")}
    image = MemorySource(torch.zeros(3, 7, 5, dtype=torch.uint8))
    fusion.segment(image, {**sinks, "ensemble": lambda top, rows: found.append((top, rows.clone()))})
    expected = (a.double().softmax(0) + b.double().softmax(0)) / 2
    ((top, scores),) = found
    assert top == 0
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(sinks["global"].ids.long(), a.argmax(0)) and torch.equal(sinks["local"].ids.long(), b.argmax(0))
    assert not torch.equal(expected.argmax(0), (a + b).argmax(0))  # which is not the mean of the logits


def small_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment on two scenes of 96 pixels, with a small network and released options."""
    monkeypatch.setattr(ablation_data, "SIDE", 96)
    monkeypatch.setattr(ablation_data, "COUNTS", {"train": 2, "val": 1})
    monkeypatch.setattr(ablation, "COMMON", ("--backbone=resnet18", "--normalize=half", "--min_overlap=0", "--loss=ce"))
    recipe = replace(RECIPES["synthetic"], arguments=("--size_g=64",), epochs=(1, 1, 1), patch=64)
    monkeypatch.setitem(ablation.RECIPES, "synthetic", recipe)
    experiment = build_experiment(tmp_path)
    ablation_data.prepare("synthetic", recipe, None, experiment.folder / "data")
    return experiment


def call(command: list[str]) -> None:
    assert command[2] == "experiments.baselines"
    assert baselines.main([one for one in command[3:] if not one.startswith("--patches=")]) == 0


def matrices_of(experiment: Experiment, task: str, prediction: str) -> np.ndarray:
    """Return the confusion matrix of the one validation image, after a comparison with the record's scores."""
    record = json.loads((experiment.folder / "runs" / f"{task}.json").read_text())
    (matrix,) = record["matrices"][prediction].values()
    counts = np.array(matrix).reshape(len(record["classes"]), -1)
    assert counts.sum() == 96 * 96
    expected = [np.nan if k is None else k for k in record[prediction]["iou"]]
    truth = counts.sum(1) > 0
    np.testing.assert_allclose(iou_of(counts)[truth], np.array(expected, float)[truth])
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unet_scores"])
def test_a_baseline_is_trained_saved_and_evaluated_image_by_image(name, tmp_path, monkeypatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    experiment = small_experiment(tmp_path, monkeypatch)
    (experiment.folder / "models").mkdir()
    write_thin_checkpoint(experiment.folder / "models" / "global_0.pth", 1, 7)
    run = experiment.runs[name]
    call(experiment.training(run, 0))
    found = []
    for _ in range(2):
        call(experiment.evaluation(run, 0, "own"))
        found.append(matrices_of(experiment, f"eval_{name}_0_own", "global"))
    np.testing.assert_array_equal(*found)
    assert len((experiment.folder / "runs" / f"{name}_0.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_networks_of_glnet_are_evaluated_image_by_image(tmp_path, monkeypatch) -> None:
    experiment = small_experiment(tmp_path, monkeypatch)
    (experiment.folder / "models").mkdir()
    write_thin_checkpoint(experiment.folder / "models" / "local_0.pth", 2, 7)
    run = replace(experiment.runs["local"], evaluations={"own": (), "fused": ("--late_fusion",)})
    found = []
    for evaluation in run.evaluations:
        call(experiment.evaluation(run, 0, evaluation))
        names = ("global", "local", "ensemble")
        found.append([matrices_of(experiment, f"eval_local_0_{evaluation}", name) for name in names])
    for own, fused in list(zip(*found, strict=True))[:2]:
        np.testing.assert_array_equal(own, fused)
    glnet = ["--model=glnet", "--evaluation", "--mode=1", "--path_g=local_0.pth"]
    assert baselines.main([*glnet, "--late_fusion"]) == 2


@pytest.mark.parametrize("model", ["glnet", "unet"])
def test_a_split_without_labels_is_refused(model, refused) -> None:
    arguments = [f"--model={model}", "--evaluation", "--mode=1", "--path_g=none.pth", "--dataset=inria", "--split=test"]
    assert "--split test has no labels" in refused(baselines.main, *arguments)


@pytest.mark.parametrize("further", [0, 7])
def test_encoders_start_from_the_same_weights_as_those_of_glnet(further, tmp_path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    name = "timm/tf_efficientnet_lite0"
    pytest.importorskip("timm")
    weights = baselines.build_backbone(name, "none")
    torch.save({key.removeprefix("net."): tensor for key, tensor in weights.state_dict().items()}, tmp_path / "w.pth")
    network = baselines.build_network("unet", name, 3, str(tmp_path / "w.pth"), further).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = weights.eval()(x)
        given = torch.cat([x, torch.rand(1, further, 64, 64)], 1)
        found = network.encoder(given)
    for a, b in zip(reversed(expected), found[-4:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
