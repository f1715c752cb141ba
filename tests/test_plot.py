"""The plots of the benchmarks."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.plot import Curve, Panel, draw
from utils.errors import InputError

PANELS = [Panel("a", [Curve("x", [1, 9], "#ff0000"), Curve("y", [2, 2], "#0000ff", dashed=True)])] * 2


def test_every_curve_and_panel_is_in_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "plot.png", "side", [1000, 8000], PANELS)
    for half in np.split(np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int), 2, axis=1):
        for channel in (0, 2):
            others = half.sum(-1) - half[..., channel]
            assert ((half[..., channel] > 200) & (others < 200)).sum() > 50


def test_without_matplotlib_one_line_says_so_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="matplotlib is missing") as caught:
        draw(tmp_path / "plot.png", "side", [1000, 8000], PANELS)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
