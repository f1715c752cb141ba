"""Accuracy and per-image Jaccard against hand-computed numbers, and classes with all that describes them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from utils.classes import Classes, distinct_colors
from utils.metrics import MEASURES, ConfusionMatrix, Scores, StageMetrics
from utils.stages import STAGES

BINARY = Classes(
    ("skin", "lesion"), ((0, 0, 0), (255, 255, 255)), (0,), (0, 255), (), foreground=(1,), measures=tuple(MEASURES)
)
SIZE = (10, 10)


def mask(*rows: int) -> torch.Tensor:
    ids = torch.zeros(SIZE, dtype=torch.uint8)
    ids[slice(*rows)] = 1
    return ids


def jaccard(truth: np.ndarray, guess: np.ndarray) -> float:
    union = (truth | guess).sum()
    return (truth & guess).sum() / union if union else 1.0


def test_measures_equal_the_hand_computed_ones() -> None:
    scores = Scores(BINARY)
    assert all(np.isnan(value) for value in scores.measures().values())
    scores.update(mask(0, 8), mask(0, 6))  # Jaccard 6/8; 80 % right
    scores.update(mask(0, 6), mask(3, 6))  # Jaccard 3/6, below 0.65; 70 % right
    assert scores.measures() == pytest.approx(
        {"accuracy": 0.75, "jaccard": (0.75 + 0.5) / 2, "thresholded_jaccard": 0.75 / 2}
    )
    # IoU is of all pixels together
    assert scores.iou()[1] == pytest.approx((60 + 30) / (80 + 60))
    scores, guess = Scores(BINARY), torch.zeros(1, 20, dtype=torch.uint8)
    guess[:, :13] = 1  # 13/20 = 0.65: the threshold itself passes
    scores.update(torch.ones_like(guess), guess)
    assert scores.measures()["thresholded_jaccard"] == pytest.approx(0.65)
    scores = Scores(BINARY)  # without lesion an image is perfect when none is found, and nothing otherwise
    scores.update(mask(0, 0), mask(0, 0))
    assert scores.measures()["jaccard"] == 1
    scores.update(mask(0, 0), mask(0, 1))
    assert scores.measures()["jaccard"] == 0.5
    assert Scores(Classes.generic(3)).measures() == {}


def test_random_images_with_ignored_pixels_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    classes = Classes.generic(4)
    classes = replace(classes, foreground=(1, 3), measures=tuple(MEASURES))
    scores, matrix, expected, right, known = Scores(classes), ConfusionMatrix(4), [], 0, 0
    for _ in range(5):
        truth, guess = rng.choice([0, 1, 2, 3, 255], SIZE), rng.integers(0, 4, SIZE)
        counted = truth != 255
        expected.append(jaccard(np.isin(truth[counted], (1, 3)), np.isin(guess[counted], (1, 3))))
        right, known = right + (truth == guess).sum(), known + counted.sum()
        tensors = torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(guess.astype(np.uint8))
        counts = scores.update(*tensors)
        matrix.update(*tensors)
        assert int(counts.sum()) == counted.sum()
    assert torch.equal(scores.counts, matrix.counts)
    found = scores.measures()
    assert found["jaccard"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert found["thresholded_jaccard"] == pytest.approx(np.mean([j * (j >= 0.65) for j in expected]), rel=1e-12)
    assert found["accuracy"] == pytest.approx(right / known, rel=1e-12)


def test_sums_of_several_processes_give_the_measures_of_all_images() -> None:
    pairs = [(mask(0, 8), mask(0, 6)), (mask(0, 6), mask(3, 6)), (mask(1, 2), mask(0, 9))]
    whole, parts = Scores(BINARY), [Scores(BINARY), Scores(BINARY)]
    for k, pair in enumerate(pairs):
        whole.update(*pair)
        parts[k % 2].update(*pair)
    for total, part in zip(parts[0].sums(), parts[1].sums(), strict=True):
        total += part
    assert parts[0].measures() == pytest.approx(whole.measures())


def test_records_of_classes_go_through_json_and_back_and_older_ones_are_read() -> None:
    classes = replace(BINARY, ignored=(7, (1, 2, 3)))
    for one in (classes, BINARY, Classes.generic(5)):
        assert Classes.from_record(json.loads(json.dumps(one.to_record()))) == one
    record = {"names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]], "left_out": [0]}
    classes = Classes.from_record(record)
    assert classes == Classes(("a", "b"), ((0, 0, 0), (1, 2, 3)), (0,))
    assert (classes.values, classes.ignored, classes.foreground, classes.measures) == ((0, 1), (255,), (), ())
    colors = distinct_colors(250)
    assert len(set(colors)) == 250 and all(len(set(color)) > 1 for color in colors)  # no greys


@pytest.mark.parametrize("n_class", [1, 2, 7])
def test_the_mean_iou_that_a_progress_bar_shows_is_the_reported_one(n_class) -> None:
    metrics = StageMetrics(STAGES[1], n_class)
    rng = np.random.default_rng(0)
    metrics.matrices["global"].counts += torch.from_numpy(rng.integers(0, 1000, (n_class, n_class)))
    metrics.matrices["global"].counts[-1] = 0
    metrics.matrices["global"].counts[:, -1] = 0  # a class that never occurs counts 0
    found = float(metrics.mean_iou_on_device())
    if n_class == 1:  # the only class is left out
        assert math.isnan(found)
    else:
        assert found == pytest.approx(metrics.mean_iou(), rel=1e-6)
