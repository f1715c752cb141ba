"""torch.hub loads the project from its folder, wherever the program runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import write_thin_checkpoint
from pictures import save

from predict import Segmenter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

LOAD = """
import sys
import numpy, torch
segmenter = torch.hub.load(sys.argv[1], "glnet", source="local", checkpoint="network.pth", device="cpu")
assert sys.argv[1] not in sys.path  # all of the project that segmenting needs is imported
numpy.save("ids.npy", segmenter.segment("a.png"))
"""


def test_torch_hub_gives_a_segmenter(tmp_path: Path) -> None:
    write_thin_checkpoint(tmp_path / "network.pth", 1)
    image = save(tmp_path / "a.png")
    command = [sys.executable, "-I", "-c", LOAD, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = Segmenter.from_checkpoint(tmp_path / "network.pth", device="cpu").segment(image)
    assert np.array_equal(np.load(tmp_path / "ids.npy"), expected)
