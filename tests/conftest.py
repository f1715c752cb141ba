"""Fixtures of several test files."""

import time
from dataclasses import dataclass

import pytest
import runs


@dataclass
class Reference:
    """Uninterrupted runs of all three stages, in `folders`, and the seconds that each took."""

    folders: runs.Folders
    seconds: dict[int, float]
    output: dict[int, str]


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    root = tmp_path_factory.mktemp("reference")
    folders, seconds, output = runs.Folders(root, runs.generate(root / "data")), {}, {}
    for mode in (1, 2, 3):
        start = time.monotonic()
        result = runs.run(folders.arguments(mode), root / f"run{mode}")
        assert result.code == 0, result.output
        seconds[mode], output[mode] = time.monotonic() - start, result.output
    return Reference(folders, seconds, output)
