"""The precision `auto`: bf16 where the device has instructions for it, else fp32; the resolved one is recorded."""

import json
from pathlib import Path

import pytest
import runs
import torch
from pictures import run, save

import train_deep_globe
from utils import precision
from utils.precision import computes_bf16, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "features", [{}, {"avx512_f": True}, {"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}]
)
def test_a_cpu_computes_bf16_if_it_has_instructions_for_it(monkeypatch, features: dict[str, bool]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert computes_bf16(CPU) == any("bf16" in name for name in features)
    assert resolve_precision("auto", CPU) == ("bf16" if computes_bf16(CPU) else "fp32")


def test_auto_is_fp32_on_an_unknown_device() -> None:
    assert resolve_precision("auto", torch.device("meta")) == "fp32"


@pytest.mark.parametrize("native", [True, False])
def test_only_emulated_bf16_is_warned_of(monkeypatch, caplog, native: bool) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: native)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert len(caplog.messages) == (not native)
    assert native or "emulating" in caplog.text
    monkeypatch.setenv("RANK", "1")
    resolve_precision("bf16", CPU)
    assert len(caplog.messages) == (not native)


@pytest.mark.slow
def test_runs_record_what_auto_stands_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    folders = runs.Folders(tmp_path, runs.generate(tmp_path / "data", images=4, size=64))
    assert train_deep_globe.main(folders.arguments(1, "--precision=auto", "--num_epochs=1")) == 0
    (record,) = folders.logs.glob("*/run.json")
    assert json.loads(record.read_text())["options"]["precision"] == "fp32"
    image, out = tmp_path / "a.png", tmp_path / "out"
    save(image)
    assert run(folders.models / "one.pth", image, output=out, options=["--precision=auto"]) == 0
    assert json.loads((out / "summary.json").read_text())["precision"] == "fp32"
