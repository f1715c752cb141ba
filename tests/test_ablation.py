"""The ablation: its plan, its order, its table; and the baselines, which train by the same data path."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import ablation, ablation_data, baselines
from benchmarks.ablation import Experiment, Schedule, as_markdown, mean_of
from benchmarks.ablation_plan import BATCH, RATES, RECIPES, Run, plan, variants
from utils.files import write_json

DATA = sorted(RECIPES)


def build_experiment(folder: Path, data: str = "synthetic", **changes) -> Experiment:
    options = {"data": data, "folder": folder, "budget": "small", "seeds": [0, 1], "threads": 1, "jobs": 1}
    return Experiment(Namespace(**{**options, **changes}))


@pytest.mark.parametrize("data", DATA)
def test_every_run_follows_those_that_it_starts_from_and_every_variant_has_one(data: str) -> None:
    runs = plan(RECIPES[data], 1)
    for index, run in enumerate(runs):
        assert {other for _, other in run.starts} <= {earlier.name for earlier in runs[:index]}
    assert len({run.name for run in runs}) == len(runs)
    assert {variant.run for variant in variants(RECIPES[data])} <= {run.name for run in runs}


@pytest.mark.parametrize("data", DATA)
def test_budgets_are_equal(data: str) -> None:
    """U-Net and DeepLabV3+ read each patch as often as stages 2 and 3 together; a longer budget trains all longer."""
    small, large = ({run.name: run for run in plan(RECIPES[data], factor)} for factor in (1, 3))
    assert small["unet"].epochs == small["deeplab"].epochs == small["g2l"].epochs + small["l2g"].epochs
    for stage in (2, 3):
        equal = [run for run in small.values() if run.name != "g2l_longer" and run.data == "scenes"]
        assert len({run.epochs for run in equal if run.mode == stage}) == 1
    if RECIPES[data].reasons:
        assert small["g2l_longer"].epochs == small["unet"].epochs
        assert small["unet_slow"].epochs == small["g2l"].epochs
    assert all(large[name].epochs == 3 * run.epochs for name, run in small.items() if run.data == "scenes")
    assert set(RATES) == set(BATCH) == {run.mode for run in small.values()}


def test_variants_differ_by_what_their_names_say(tmp_path: Path) -> None:
    experiment = build_experiment(tmp_path)
    commands = {name: experiment.training(run, 0) for name, run in experiment.runs.items()}

    def more(name: str, than: str) -> set[str]:
        named = {"--task_name", "--path_g2l"}
        return {one for one in set(commands[name]) - set(commands[than]) if one.split("=")[0] not in named}

    assert more("alone", "g2l") == {"--no-share_maps", "--lamb_fmreg=0"}
    assert more("g2l_free", "g2l") == {"--lamb_fmreg=0"}
    assert more("l2g_free", "l2g") == set()
    assert more("l2g_alone", "l2g") == {"--no-share_maps"}
    assert more("g2l_patches", "g2l") == {"--size_p=64"}
    assert more("deeplab", "unet") == {"--model=deeplab"}


def test_a_schedule_hands_out_every_run_once_and_starts_first(tmp_path: Path) -> None:
    experiment = build_experiment(tmp_path, seeds=[0, 1])
    schedule = Schedule(experiment, None)
    taken: list[tuple[str, int]] = []
    while (item := schedule.take()) is not None:
        run, seed = item
        assert all((other, seed) in taken for _, other in run.starts)
        taken.append((run.name, seed))
        schedule.finish(run, seed, None)
    assert sorted(taken) == sorted((name, seed) for name in experiment.runs for seed in (0, 1))
    extra = [experiment.runs[name].extra for name, _ in taken]
    assert extra == sorted(extra)


def test_finished_runs_are_kept_and_a_failed_one_stops_the_others(tmp_path: Path) -> None:
    experiment = build_experiment(tmp_path, seeds=[0])
    write_json(experiment.result(experiment.runs["global"], 0), {})
    schedule = Schedule(experiment, None)
    item = schedule.take()
    assert item is not None and item[0].name == "g2l"
    schedule.finish(*item, ValueError("broken"))
    assert schedule.take() is None


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    experiment = build_experiment(tmp_path, seeds=[0, 1])
    scores = {"mIoU": 0.5, "iou": [0.4, None]}
    measured = {"seconds_per_image": 2.0, "peak_memory_mb": 100.0, "training_peak_mb": 200.0}
    for seed, miou in enumerate((0.5, 0.7)):
        for name, seconds in (("global", 60.0), ("g2l", 30.0)):
            record = {"classes": ["land", "water"], "global": scores, "ensemble": {**scores, "mIoU": miou}}
            write_json(
                experiment.result(experiment.runs[name], seed), {**record, **measured, "training_seconds": seconds}
            )
    experiment.write(tmp_path)
    result = json.loads((tmp_path / "ablation_synthetic.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["global", "global to local"]
    row = result["rows"][1]
    assert row["mIoU"] == pytest.approx(0.6) and row["spread"] == pytest.approx(0.02**0.5)
    assert row["training_seconds"] == 90  # the stage before is counted
    assert row["iou"] == pytest.approx([0.4, 0.0])
    table = (tmp_path / "ablation_synthetic.md").read_text()
    assert "| global to local | 2 | 60.0 ± 14.1 | 40.0 | 0.0 | 1.5 | 200 | 2.00 | 100 |" in table
    one = experiment.records()[:1]
    assert mean_of(one)["spread"] is None
    interrupted = {**one[0], "training_seconds": None}
    assert mean_of([interrupted, *one])["training_seconds"] == one[0]["training_seconds"]
    assert "| 40.0 | 0.0 |  | 200 |" in as_markdown([mean_of([interrupted])], ["land", "water"], "command")
    assert as_markdown(result["rows"], result["classes"], "command").startswith("`command`")


def test_a_baseline_is_trained_saved_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.setattr(ablation_data, "SIDE", 96)
    monkeypatch.setattr(ablation_data, "COUNTS", {"train": 2, "val": 1})
    monkeypatch.setattr(ablation, "COMMON", ("--backbone=resnet18", "--size_g=64", "--min_overlap=0", "--loss=ce"))
    experiment = build_experiment(tmp_path)
    ablation_data.prepare("synthetic", None, experiment.folder / "data")
    run = Run("unet", 0, 1, ("--model=unet", "--size_p=64"))
    command, evaluation = experiment.training(run, 0), experiment.evaluation(run, 0)
    assert baselines.main(command[command.index("benchmarks.baselines") + 1 :]) == 0
    found = []
    for _ in range(2):
        assert baselines.main(evaluation[evaluation.index("benchmarks.baselines") + 1 :]) == 0
        record = json.loads((experiment.folder / "runs" / "eval_unet_0.json").read_text())
        assert record["images"] == 1 and 0 <= record["global"]["mIoU"] <= 1
        found.append(record["global"])
    assert found[0] == found[1]
    assert len((experiment.folder / "runs" / "unet_0.jsonl").read_text().splitlines()) == 1


def test_dubai_needs_the_published_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert ablation.main(["--data=dubai", f"--folder={tmp_path}"]) == 2
    assert "--data_path" in capsys.readouterr().err
    assert not list((tmp_path / "dubai").rglob("*.tif"))
