"""Fixtures of several test files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
from pictures import write_checkpoint

from predict import Segmenter

_segmenters: dict[tuple, Segmenter] = {}
"""The last one that `load_once` gave, by its file and options."""


@dataclass
class Reference:
    """Uninterrupted runs of all three stages, in `folders`, and what each printed."""

    folders: runs.Folders
    output: dict[int, str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of whole runs as slow: those with a fixture that trains."""
    for item in items:
        if {"reference", "whole", "work"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def load_once(monkeypatch) -> None:
    """Let tests that segment with the same file and options again and again load it once."""
    plain = Segmenter.from_checkpoint

    def load(path: str | Path, **options: Any) -> Segmenter:
        if not Path(path).is_file():
            return plain(path, **options)
        key = (str(path), Path(path).stat().st_mtime_ns, repr(sorted(options.items())))
        if key not in _segmenters:
            made = plain(path, **options)
            _segmenters.clear()
            _segmenters[key] = made
        return _segmenters[key]

    monkeypatch.setattr(Segmenter, "from_checkpoint", load)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    root = tmp_path_factory.mktemp("reference")
    folders, output = runs.Folders(root, runs.generate(root / "data")), {}
    for mode in (1, 2, 3):
        result = runs.run(folders.arguments(mode), root / f"run{mode}")
        assert result.code == 0, result.output
        output[mode] = result.output
    return Reference(folders, output)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "one.pth", 1)


@pytest.fixture(scope="session")
def segmenter(checkpoint) -> Segmenter:
    return Segmenter.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run a command line that must end with exit code 2 and one line of error, which is returned."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(one) for one in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run
