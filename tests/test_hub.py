"""torch.hub loads the project from its folder, wherever the program runs."""

import numpy as np
import pytest
import runs
from builders import write_thin_checkpoint
from pictures import save

from predict import Segmenter

pytestmark = pytest.mark.slow


LOAD = """
import sys
import numpy, torch
segmenter = torch.hub.load(sys.argv[1], "glnet", source="local", checkpoint="network.pth", device="cpu")
assert sys.argv[1] not in sys.path  # all of the project that segmenting needs is imported
numpy.save("ids.npy", segmenter.segment("a.png"))
"""


def test_torch_hub_gives_a_segmenter(tmp_path) -> None:
    write_thin_checkpoint(tmp_path / "network.pth", 1)
    image = save(tmp_path / "a.png")
    runs.run_python(LOAD, runs.ROOT, folder=tmp_path, flags=("-I",))
    expected = Segmenter.from_checkpoint(tmp_path / "network.pth", device="cpu").segment(image)
    assert np.array_equal(np.load(tmp_path / "ids.npy"), expected)
