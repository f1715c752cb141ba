"""Hostile and broken checkpoints and resume files are refused by name, and no code in them runs."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS, build_header, build_thin_model

from models import checkpoint
from training import state
from utils.errors import InputError


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def header(**changes) -> dict:
    return {**build_header(1).to_record(), **changes}


def ours(**changes) -> dict:
    return {"format": "glnet", "version": 1, "header": header(), "model": {"a": torch.ones(1)}, **changes}


def classes(**changes) -> dict:
    return {**build_header(1).classes.to_record(), **changes}


HOSTILE = {
    "code": ours(model=Harmful()),
    "no header": ours(header=None),
    "unknown stage": ours(header=header(stage=9)),
    "stage of a wrong type": ours(header=header(stage=[1])),
    "unknown backbone": ours(header=header(backbone="__init__")),
    "unknown normalisation": ours(header=header(normalize="x")),
    "absurd size": ours(header=header(size_g=1 << 40)),
    "size of a wrong type": ours(header=header(size_p="64")),
    "negative overlap": ours(header=header(min_overlap=-1)),
    "too many classes": ours(header=header(classes=classes(names=["a"] * 1000, palette=[[0, 0, 0]] * 1000))),
    "colours missing": ours(header=header(classes=classes(palette=[]))),
    "names of a wrong type": ours(header=header(classes=classes(names=[1] * N_CLASS))),
    "unknown measure": ours(header=header(classes=classes(measures=["x"]))),
    "foreground of no class": ours(header=header(classes=classes(foreground=[N_CLASS]))),
    "left out of a wrong type": ours(header=header(classes=classes(left_out=["x"]))),
    "grey values missing": ours(header=header(classes=classes(values=[3]))),
    "unknown entry": ours(header=header(extra=1)),
    "model of a wrong type": ours(model=[1]),
    "number for a tensor": ours(model={"a": 1}),
    "name of a wrong type": ours(model={1: torch.ones(1)}),
    "sparse tensor": ours(model={"a": torch.ones(2).to_sparse()}),
    "complex tensor": ours(model={"a": torch.ones(2, dtype=torch.complex64)}),
    "released with a number": {"module.resnet_global.conv1.weight": 1},
}


OTHERS = {
    "a number": (3, "int"),
    "a list": ([1, 2], "list"),
    "a tensor": (torch.zeros(3), "Tensor"),
    "an empty dict": ({}, "not a GLNet state dict"),
    "numbers": ({"epoch": 3}, "no GLNet checkpoint: its first entry is epoch"),
    "numbered tensors": ({0: torch.zeros(1)}, "no GLNet checkpoint"),
    "numbers under released names": ({"module.ensemble_conv.bias": 3}, r"ensemble_conv\.bias is a int, not a tensor"),
    "another network": ({"conv1.weight": torch.zeros(1)}, r"no GLNet checkpoint: its first entry is conv1\.weight"),
    "no network": ({"format": "glnet", "version": 1, "header": header()}, "damaged"),
    "a header of text": (ours(header="text"), "damaged"),
}
"""Torch files of something else, and what is said of them."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", [*HOSTILE, *OTHERS])
def test_a_hostile_checkpoint_is_refused_by_name(tmp_path, monkeypatch, case, zipped) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    content, message = (HOSTILE[case], "") if case in HOSTILE else OTHERS[case]
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"bad\.pth.* {message}") as refused:
        checkpoint.read(path)
    assert "\n" not in str(refused.value)
    assert not Path("harmed").exists()


def test_an_absurd_shape_is_refused_without_its_memory(tmp_path) -> None:
    """A tensor of 4 TB whose entries are all one."""
    model = build_thin_model()
    tensors = {**model.state_dict(), "local.head.bias": torch.ones(1).expand(1 << 40)}
    torch.save(ours(model=tensors), tmp_path / "bad.pth")
    found = checkpoint.read(tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth: local\.head\.bias is \(1099511627776,\) where"):
        checkpoint.load(model, found.tensors, found.path, ("",))


def test_broken_files_of_every_form_are_refused(tmp_path) -> None:
    path = tmp_path / "bad.pth"
    torch.save(ours(), path)
    whole = path.read_bytes()
    torch.save(ours(), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "swelling", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10_000_000))
    flipped = np.frombuffer(whole, np.uint8).copy()
    flipped[len(flipped) // 3 :: 7] ^= 255
    forms = [b"", b"text", whole[:-100], whole[: len(whole) // 2], flipped.tobytes(), pickle.dumps(Harmful())]
    forms += [old[:-5], old[: len(old) // 2]]
    for content in (*forms, (tmp_path / "swelling").read_bytes()):
        path.write_bytes(content)
        for read in (checkpoint.read, state.read):
            with pytest.raises(InputError, match=r"bad\.pth") as refused:
                read(path)
            assert "\n" not in str(refused.value)


def test_a_file_of_a_newer_version_is_not_called_damaged(tmp_path) -> None:
    for content, told in (
        (ours(header=header(extra=1)), "was written by a newer version of this code, which records extra; update it"),
        (ours(version=2), "has format version 2; this code reads 1; update the code"),
        (ours(version=0), "has format version 0; this code reads 1$"),
    ):
        torch.save(content, tmp_path / "new.pth")
        with pytest.raises(InputError, match=rf"new\.pth {told}"):
            checkpoint.read(tmp_path / "new.pth")
