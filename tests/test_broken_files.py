"""Truncated and bit-flipped files of each format: one line each, no stack trace, and the rest is done."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from files import DRAWN, draw_file, read_label
from pictures import run, save, write_checkpoint

from dataset.base import Item, SegmentationDataset
from utils.classes import Classes
from utils.errors import InputError

pytest.importorskip("rasterio")


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut off the end, or flip bits: in the header, or anywhere."""
    kind = rng.integers(3)
    if kind == 0:
        return content[: int(rng.integers(0, len(content)))]
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 8))):
        place = int(rng.integers(0, min(len(changed), 200 if kind == 1 else len(changed))))
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def read_as_image(path: Path) -> None:
    data = SegmentationDataset([Item("a", path, None)], Classes.generic(250), 8)
    data.max_pixels = 1_000_000
    data.read(0)


def read_as_label(path: Path) -> None:
    read_label(path, Classes.generic(250), None, 1_000_000)


def refusal(read: Callable[[Path], None], path: Path) -> str | None:
    start = time.monotonic()
    try:
        read(path)
    except InputError as error:
        return str(error)
    finally:
        assert time.monotonic() - start < 20
    return None


@pytest.mark.parametrize("without_rasterio", [False, True])
def test_the_reader_refuses_broken_files_in_one_line(tmp_path, without_rasterio) -> None:
    rng = np.random.default_rng(5)
    refused = 0
    for k in range(300):
        path = draw_file(rng, tmp_path, k).path
        path.write_bytes(damage(rng, path.read_bytes()))
        patch = pytest.MonkeyPatch()
        if without_rasterio:
            patch.setitem(sys.modules, "rasterio", None)
        for message in filter(None, map(refusal, (read_as_image, read_as_label), (path, path))):
            refused += 1
            assert str(path) in message
            assert "\n" not in message
        patch.undo()
        path.unlink()
    assert refused > 150


def test_predict_skips_broken_files_and_does_the_rest(tmp_path, capsys) -> None:
    rng = np.random.default_rng(6)
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(120):
        path = DRAWN[k % len(DRAWN)](rng, folder / f"file{k}.png").path
        path.write_bytes(damage(rng, path.read_bytes()))
    save(folder / "whole.png")
    checkpoint = write_checkpoint(tmp_path / "one.pth", 1)
    assert run(checkpoint, folder, *folder.glob("*.ppm"), output=tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "images could not be segmented" in told.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["images"]) + len(summary["failures"]) == 121
    assert len(summary["failures"]) > 40
    assert any(one["image"].endswith("whole.png") for one in summary["images"])
    assert all("\n" not in line for line in summary["failures"])
    assert not list((tmp_path / "out").glob(".*"))
