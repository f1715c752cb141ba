"""The tables of `experiments.ablation`: scores of each variant, differences with intervals over books, and trials."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from experiments.ablation_plan import DIFFERENCES, GLOBAL, Recipe, Variant, plan, variants
from utils.files import read_json, replacing
from utils.results import command_of, write_results
from utils.tables import as_markdown

DRAWS = 4000
"""Samples of a bootstrap."""

LEVEL = (2.5, 97.5)
"""Percentiles between which 95 % of the samples are."""

FEWEST = 5
"""Groups that a bootstrap needs; of fewer there is no interval."""

Result = Mapping[str, Any]
"""What a run left; see `experiments.ablation`."""

Counts = Mapping[str, np.ndarray]
"""Confusion matrices (n_class, n_class), rows are the truth, by group."""

Difference = Mapping[str, float | None]
"""One score of a variant minus that of another, of the same images: `value` of all images pooled, None if no class
counts, and the ends `low` and `high` of its 95 % interval over groups, None of fewer than `FEWEST`."""


def iou_of(counts: np.ndarray) -> np.ndarray:
    """Return the IoU (..., n_class) of confusion matrices (..., n_class, n_class); NaN for a class without truth."""
    hit = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    truth = counts.sum(-1)
    union = truth + counts.sum(-2) - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=truth > 0)


def mean_of(iou: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Return the mean (...) of `iou` (..., n_class) over the classes `kept` that have truth; NaN if none has."""
    chosen = iou[..., list(kept)]
    known = ~np.isnan(chosen)
    count = known.sum(-1)
    return np.divide(np.where(known, chosen, 0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def pooled(counts: Counts) -> np.ndarray:
    """Return the sum (n_class, n_class) over all groups."""
    return np.sum([*counts.values()], axis=0)


def resampled(counts: Counts) -> np.ndarray:
    """Return `DRAWS` matrices (DRAWS, n_class, n_class), each the sum of as many groups, drawn with replacement.

    Of the same groups the same are drawn, so that variants can be compared.
    """
    stacked = np.stack([counts[name] for name in sorted(counts)]).astype(float)
    groups = len(stacked)
    times = np.random.default_rng(0).multinomial(groups, [1 / groups] * groups, DRAWS)
    return np.einsum("dg,gij->dij", times, stacked)


def compare(a: Counts, b: Counts, classes: Mapping[str, Sequence[int]]) -> dict[str, Difference]:
    """Compare two variants, of the same groups, by the mean IoU of some sets of classes, ids by name.

    Returns:
        By the set's name, the score of `a` minus that of `b`. A class that the images, or a sample of them, do not have
        is left out of its mean.
    """
    ious = [iou_of(pooled(counts)) for counts in (a, b)]
    drawn = [iou_of(resampled(counts)) for counts in (a, b)] if len(a) >= FEWEST else None
    found: dict[str, Difference] = {}
    for name, kept in classes.items():
        value = float(mean_of(ious[0], kept) - mean_of(ious[1], kept))
        low = high = None
        if drawn is not None and not np.isnan(value):
            low, high = np.nanpercentile(mean_of(drawn[0], kept) - mean_of(drawn[1], kept), LEVEL).tolist()
        found[name] = {"value": None if np.isnan(value) else value, "low": low, "high": high}
    return found


class Results:
    """The results of all folds of the experiment itself, without trials.

    Attributes:
        recipe: of the data set.
        by_run: results by the run's name and fold.
        runs: of one fold, by name.
        variants: by key.
        classes: names.
        kept: ids of the classes that the mIoU counts.
    """

    def __init__(self, recipe: Recipe, results: Iterable[Result]) -> None:
        self.recipe = recipe
        self.by_run: dict[tuple[str, int], Result] = {
            (one["run"], one["fold"]): one for one in results if not one["trial"] and one["evaluations"]
        }
        self.runs = {run.name: run for run in plan(recipe)}
        self.variants = {variant.key: variant for variant in variants(recipe)}
        first = next((e for one in self.by_run.values() for e in one["evaluations"].values()), None)
        self.classes: list[str] = first["classes"] if first else []
        self.kept = [k for k, name in enumerate(self.classes) if first and name not in first["left_out"]]

    def folds(self, *chosen: Variant) -> list[int]:
        """Return the folds in which all the given variants are evaluated."""
        numbers = sorted({fold for _, fold in self.by_run})
        return [fold for fold in numbers if all(self.evaluation(one, fold) for one in chosen)]

    def evaluation(self, variant: Variant, fold: int) -> Result:
        """Return the evaluation that a variant is read from; empty if it is not there."""
        found: Result = self.by_run.get((variant.run, fold), {}).get("evaluations", {}).get(variant.evaluation, {})
        return found

    def counts(self, variant: Variant, folds: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the confusion matrices of a variant by group, added up over the images of some folds."""
        n = len(self.classes)
        found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((n, n), np.int64))
        for fold in folds:
            for id_, matrix in self.evaluation(variant, fold)["matrices"][variant.prediction].items():
                found[self.recipe.group(id_)] += np.array(matrix, np.int64).reshape(n, n)
        return dict(found)

    def seconds(self, run: str, fold: int) -> float | None:
        """Return the CPU time of a run's training and of those that it starts from; None if one is not known."""
        starts = dict(self.runs[run].starts)
        if "path_g2l" in starts:  # whose training counts stage 1's already
            starts.pop("path_g")
        own = self.by_run.get((run, fold), {}).get("training_seconds")
        spent: list[Any] = [own, *(self.seconds(other, fold) for other in starts.values())]
        return None if None in spent else sum(spent)

    def scores(self) -> list[dict[str, Any]]:
        """Return the scores of each variant and fold, of the fold's images pooled."""
        found = []
        for variant in self.variants.values():
            for fold in self.folds(variant):
                evaluation = self.evaluation(variant, fold)
                iou = iou_of(pooled(self.counts(variant, [fold])))
                found.append(
                    {
                        "variant": variant.title,
                        "key": variant.key,
                        "drawn": variant.drawn,
                        "fold": fold,
                        "mIoU": float(mean_of(iou, self.kept)),
                        "iou": [None if np.isnan(value) else float(value) for value in iou],
                        "training_seconds": self.seconds(variant.run, fold),
                        "training_peak_mb": self.by_run[variant.run, fold]["training_peak_mb"],
                        **{name: evaluation[name] for name in ("seconds_per_image", "peak_memory_mb")},
                    }
                )
        return found

    def differences(self) -> list[dict[str, Any]]:
        """Return the differences between variants, over the folds that both have."""
        sets = {"mIoU": self.kept, **{name: [k] for k, name in enumerate(self.classes)}}
        found = []
        for keys in DIFFERENCES:
            pair = [self.variants[key] for key in keys]
            if folds := self.folds(*pair):
                a, b = (self.counts(variant, folds) for variant in pair)
                by_group = {
                    name: float(mean_of(iou_of(a[name]), self.kept) - mean_of(iou_of(b[name]), self.kept)) for name in a
                }
                found.append(
                    {
                        "title": " - ".join(variant.title for variant in pair),
                        "keys": keys,
                        "folds": folds,
                        "by_group": by_group,
                        "difference": compare(a, b, sets),
                    }
                )
        return found

    def gains(self) -> list[dict[str, Any]]:
        """Return the gain of sharing, stage 2 minus local alone, for each side of patches."""
        sides = {"context": self.recipe.context, "own look": self.recipe.own_look}
        ids = {
            name: [k for k, title in enumerate(self.classes) if starts and title.startswith(starts)]
            for name, starts in sides.items()
        }
        sets = {"mIoU": self.kept, **{name: kept for name, kept in ids.items() if kept}}
        names = {name: [self.classes[k] for k in kept] for name, kept in ids.items() if kept}
        found = []
        for side in sorted({self.recipe.patch, *self.recipe.sides}):
            ending = "" if side == self.recipe.patch else f"_{side}"
            pair = self.variants[f"g2l{ending}"], self.variants[f"local{ending}"]
            if folds := self.folds(*pair):
                gain = compare(self.counts(pair[0], folds), self.counts(pair[1], folds), sets)
                found.append({"side": side, "folds": folds, "gain": gain, "classes": names})
        return found


def row(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row: means over the folds of a variant; the sample deviation of its mIoU, None for one fold.

    A class counts in the folds that have it. Seconds are those of the trainings that were not interrupted.
    """

    def known(values: Iterable[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return mean(found) if found else None

    by_class = zip(*(one["iou"] for one in scores), strict=True)
    found = [one["mIoU"] for one in scores]
    measured = ("training_seconds", "training_peak_mb", "seconds_per_image", "peak_memory_mb")
    return {
        **{name: scores[0][name] for name in ("variant", "key", "drawn")},
        "folds": len(scores),
        "mIoU": mean(found),
        "spread": stdev(found) if len(found) > 1 else None,
        "iou": [known(values) for values in by_class],
        **{name: known(one[name] for one in scores) for name in measured},
    }


def per_cent(value: float | None) -> str:
    """Return a share in per cent, `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def points(one: Mapping[str, Any]) -> str:
    """Return a difference in points, with its interval if it has one; `-` if there is none."""
    value, low, high = ("-" if one[key] is None else f"{100 * one[key]:+.1f}" for key in ("value", "low", "high"))
    return value if low == "-" else f"{value} ({low} to {high})"


def minutes(one: Mapping[str, Any]) -> str:
    """Return the CPU time of a training, `-` if it is not known."""
    return "-" if one["training_seconds"] is None else f"{one['training_seconds'] / 60:.1f}"


def page(record: Mapping[str, Any]) -> str:
    """Return the tables of the record that `write` writes."""
    classes = record["classes"]
    lines = []
    for one in record["rows"]:
        spread = "" if one["spread"] is None else f" ± {100 * one['spread']:.1f}"
        cells = [one["variant"], str(one["folds"]), per_cent(one["mIoU"]) + spread, *map(per_cent, one["iou"])]
        cost = [f"{one['training_peak_mb']:.0f}", f"{one['seconds_per_image']:.2f}", f"{one['peak_memory_mb']:.0f}"]
        lines.append([*cells, minutes(one), *cost])
    measured = ["training, CPU min", "training, MB", "s per image", "evaluation, MB"]
    scores = as_markdown(["variant", "folds", "mIoU, %", *classes, *measured], lines)
    lines = []
    for one in record["differences"]:
        cells = [points(one["difference"][name]) for name in ("mIoU", *classes)]
        better = sum(value > 0 for value in one["by_group"].values())
        lines.append([one["title"], str(len(one["folds"])), *cells, f"{better} of {len(one['by_group'])}"])
    differences = as_markdown(["difference, points", "folds", "mIoU", *classes, "better in"], lines)
    return (
        f"`{record['command']}`\n\nMeans over folds ± sample standard deviation of the images of each fold pooled.\n\n"
        f"{scores}\nDifferences of all images pooled; in parentheses the 95 % interval of {DRAWS} bootstrap samples of "
        f"{record['groups_are']}.\n\n{differences}"
    )


def by_group(result: Result, recipe: Recipe) -> Result:
    """Return a result whose matrices are added up over each group, under the id of the group's first image."""

    def added(matrices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        first: dict[str, str] = {}
        sums: dict[str, list[int]] = {}
        for id_, counts in matrices.items():
            name = first.setdefault(recipe.group(id_), id_)
            sums[name] = np.add(sums.get(name, 0), counts).tolist()
        return sums

    evaluations = {
        name: {**one, "matrices": {prediction: added(each) for prediction, each in one["matrices"].items()}}
        for name, one in result["evaluations"].items()
    }
    return {**result, "evaluations": evaluations}


def merged(earlier: Iterable[Result], later: Iterable[Result]) -> list[Result]:
    """Return results, or rows of trials, in order; a later one takes the place of that of the same trial and fold."""
    every = {(one["run"], one["trial"], one["fold"]): one for one in (*earlier, *later)}
    return [every[key] for key in sorted(every)]


def write(output: Path, data: str, recipe: Recipe, results: Sequence[Result]) -> None:
    """Write `ablation_DATA` and, if there are trials, `trials_DATA`, each as JSON and as Markdown.

    `results` are those of all runs, trials included. They are kept by group in `runs_DATA.json`, where a later call, of
    other runs or folds, finds them. Of a run that is trained with other arguments nothing earlier counts. Rows of
    trials of `trials_DATA.json` are kept, too, unless there is a result of the same trial.
    """
    kept, tried = output / f"runs_{data}.json", output / f"trials_{data}.json"
    arguments = {one["run"]: one["arguments"] for one in results if not one["trial"]}
    earlier = [
        one
        for one in (read_json(kept)["runs"] if kept.exists() else [])
        if one["trial"] or arguments.get(one["run"], one["arguments"]) == one["arguments"]
    ]
    results = merged(earlier, results)
    with replacing(kept) as part:  # a run is a line
        runs = ",\n".join(json.dumps(by_group(one, recipe), allow_nan=False) for one in results)
        part.write_text(f'{{"runs": [\n{runs}\n]}}\n', encoding="utf-8")
    found = Results(recipe, results)
    if scores := found.scores():
        titles = dict.fromkeys(one["variant"] for one in scores)
        record = {
            "command": command_of("experiments.ablation"),
            "classes": found.classes,
            "groups_are": "books" if recipe.grouped else "images",
            "rows": [row([one for one in scores if one["variant"] == title]) for title in titles],
            "differences": found.differences(),
            "gains": found.gains(),
            "runs": scores,
        }
        write_results(output / f"ablation_{data}.json", record, page(record))
    if trials := list_trials(results):
        trials = merged(read_json(tried)["trials"] if tried.exists() else [], trials)
        heads = ["run", "trial", "fold", "mIoU, %", "training, CPU min", "what differs"]
        lines = []
        for one in trials:
            own = ", ".join(f"{name} {per_cent(value)}" for name, value in one["mIoU"].items())
            differs = f"`{' '.join(one['differs'])}`" if one["differs"] else ""
            lines.append([one["run"], one["trial"], str(one["fold"]), own, minutes(one), differs])
        record = {"command": command_of("experiments.ablation"), "trials": trials}
        write_results(tried, record, as_markdown(heads, lines))


def list_trials(results: Sequence[Result]) -> list[Result]:
    """Return all trials, beside each the run of the experiment itself if it is there, with the arguments that differ.

    An argument differs if not all results of the run have it.
    """
    tried = {one["run"] for one in results if one["trial"]}
    found: list[Result] = []
    for one in results:
        own = one["evaluations"].get("own") or one["evaluations"].get("fused")
        if one["run"] not in tried or own is None:
            continue
        shared = set.intersection(*(set(other["arguments"]) for other in results if other["run"] == one["run"]))
        found.append(
            {
                **{name: one[name] for name in ("run", "trial", "fold", "training_seconds")},
                "mIoU": {name: own[name]["mIoU"] for name in (GLOBAL, "local", "ensemble") if name in own},
                "differs": [argument for argument in one["arguments"] if argument not in shared],
            }
        )
    return found
