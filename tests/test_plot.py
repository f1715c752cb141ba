"""The plots of the benchmarks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.plot import Curve, Panel, draw, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(3, 40, [2, 5, 10, 20, 50]), (1, 1, [1, 2]), (0.05, 0.3, [0.05, 0.1, 0.2, 0.5]), (2, 5000, None)],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and found[1] > low
    assert expected is None or found == pytest.approx(expected)


def test_every_curve_and_panel_is_in_the_picture(tmp_path: Path) -> None:
    panels = [Panel("a", [Curve("x", [1, 9], "#ff0000"), Curve("y", [2, 2], "#0000ff", dashed=True)])] * 2
    draw(tmp_path / "plot.png", "side", [1000, 8000], panels)
    for half in np.split(np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int), 2, axis=1):
        for channel in (0, 2):
            others = half.sum(-1) - half[..., channel]
            assert ((half[..., channel] > 200) & (others < 200)).sum() > 50
