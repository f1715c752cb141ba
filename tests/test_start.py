"""What starting `predict.py` costs: modules that a picture does not need are not imported."""

import runs
from builders import write_thin_checkpoint
from pictures import save

PREDICT = """
import sys
import torch
imported = set(sys.modules)
import predict
assert predict.main(sys.argv[1:]) == 0
print(*{name.partition(".")[0] for name in set(sys.modules) - imported}, *set(sys.modules) - imported)
"""

UNUSED = {"matplotlib", "onnx", "pyogrio", "rasterio", "shapely", "sympy", "tensorboard", "tensorboardX", "timm"}
UNUSED |= {"torch._dynamo", "torchvision", "zarr"}


def test_predicting_a_jpeg_imports_nothing_that_it_does_not_need(tmp_path) -> None:
    write_thin_checkpoint(tmp_path / "network.pth", 3)
    save(tmp_path / "a.jpg")
    where = ["--checkpoint", tmp_path / "network.pth", "--input", tmp_path / "a.jpg", "--output", tmp_path / "out"]
    imported = runs.run_python(PREDICT, *where, "--device", "cpu", "--overlay").splitlines()[-1].split()
    assert "prediction" in imported
    assert not UNUSED & set(imported)
