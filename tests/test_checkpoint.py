"""Checkpoint files: written and read back whole, the released format in both directions, anything else refused."""

import argparse
import functools
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import builders
import numpy as np
import pytest
import runs
import torch
import torchvision
from builders import BACKBONE, N_CLASS, build_header, build_thin_model, write_released_checkpoint, write_thin_checkpoint
from torch import Tensor

import helper
import train_deep_globe
from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from evaluation.run import Evaluation
from models import checkpoint
from models.backbone import BACKBONES, backbone_weights, build_backbone
from models.glnet import GLNet
from models.header import Header, TrainedOn
from models.tensors import children_of
from training import setup, state
from utils.errors import InputError
from utils.selection import BOX_MARGIN
from utils.settings import Statistics
from utils.stages import STAGES

State = dict[str, Tensor]
BLANK = 7


@functools.cache
def _loadable_model() -> GLNet:
    return builders.build_empty_model().to_empty(device="cpu")


def blank_model() -> GLNet:
    """The one network to load into, blank again: every entry is 7."""
    model = _loadable_model()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(BLANK)
    return model


def assert_equal(found: State, expected: State, but: tuple[str, ...] = ()) -> None:
    """Bit-equal by name, the names that start with one of `but` aside."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert (name.startswith(but) if but else False) or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_file_gives_the_network_and_its_description_back_for_its_own_stage_only(tmp_path, stage) -> None:
    path = tmp_path / "new folder" / "a.pth"
    changes = {"size_g": 128, "size_p": 96, "min_overlap": 20, "normalize": "half", "classes": DEEP_GLOBE}
    model, blank = build_thin_model(), blank_model()
    checkpoint.save(path, model, build_header(stage, **changes))
    found = checkpoint.read(path)
    assert found.header == build_header(stage, **changes)
    assert children_of(found.tensors) == children_of(found.tensors_of(stage)) == {*STAGES[stage].uses}
    others = tuple(f"{child}." for child in {*STAGES[3].uses} - {*STAGES[stage].uses})
    checkpoint.load_whole(blank, found, stage)
    state = blank.state_dict()
    assert_equal(state, model.state_dict(), but=others)
    assert all((x == BLANK).all() for name, x in state.items() if others and name.startswith(others))
    for other in {1, 2, 3} - {stage}:
        message = rf"a\.pth was made by stage {stage} .*stage {other}'s .*{STAGES[stage].reads}"
        with pytest.raises(InputError, match=message):
            found.tensors_of(other)


@pytest.mark.parametrize("source", ["none", "file"])
def test_later_stages_start_as_from_files_that_hold_all(tmp_path, source) -> None:
    """Bit-equal, with the seed of stage 1: what its file lacks is drawn, or read, once more."""
    weights = "none" if source == "none" else str(tmp_path / "backbone.pth")
    if source == "file":
        write_backbone(tmp_path / "backbone.pth", BACKBONE)
    header = replace(build_header(1), backbone_weights=weights)
    for name, children in (("new", None), ("older", STAGES[3].uses)):
        torch.manual_seed(0)
        model = setup.build_training_model(header, {})
        if source == "file":
            own, given = model.global_.backbone.state_dict(), torch.load(weights, weights_only=True)
            assert_equal(own, {name: x for name, x in given.items() if not name.startswith("fc.")})
            if children:  # as stage 1 started the local branch, too
                model.local.backbone.load_state_dict(own)
        model.global_.head.bias.data.fill_(1)  # trained
        checkpoint.save(tmp_path / f"{name}.pth", model, header, children)
    for stage in (2, 3):
        states = []
        for name in ("new", "older"):
            path = tmp_path / f"{name}.pth"
            torch.manual_seed(0)
            files = {STAGES[stage].starts_from[0]: checkpoint.read(path)}
            model = setup.build_training_model(replace(header, stage=stage), files)
            states.append({**model.state_dict(), "random": torch.get_rng_state()})
            checkpoint.save(path, model, replace(header, stage=stage), None if name == "new" else STAGES[3].uses)
        assert_equal(*states)


def test_branches_that_init_from_brings_are_kept_for_later_stages(tmp_path) -> None:
    for children, kept in ((STAGES[3].uses, {"global_", "local", "refined"}), (None, {"global_"})):
        checkpoint.save(tmp_path / "a.pth", build_thin_model(), build_header(1), children)
        files = {"init_from": checkpoint.read(tmp_path / "a.pth")}
        assert {*setup.saved_children(STAGES[1], files)} == kept
    assert setup.saved_children(STAGES[2], {}) == STAGES[2].uses


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.pth"
    write_thin_checkpoint(path, 1)
    before = path.read_bytes()

    def fail(content: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, build_thin_model(), build_header(1))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_last_is_the_last_epoch_best_the_best_and_a_new_run_renames_both(tmp_path, monkeypatch) -> None:
    """Epochs of a stubbed training that write their number into the network; their validation scores are given."""
    synthetic.generate(tmp_path / "data", 3, 64, seed=0)
    numbers, scores = iter([1, 2, 3, 4, 5]), iter([0.2, 0.6, 0.4, 0.3, 0.1])

    def stub_build(header, files, **more) -> GLNet:
        model = build_thin_model(len(header.classes))
        model.learn(STAGES[header.stage].trains)
        return model

    def stub_train(model: GLNet, stage, *others, **more) -> helper.StageMetrics:
        with torch.no_grad():
            model.global_.head.bias.fill_(next(numbers))
        return helper.StageMetrics(stage, model.n_class)

    def stub_evaluate(predictor, loader, metrics, **more) -> Evaluation:
        right = round(100 * next(scores))
        truth = torch.ones(100, dtype=torch.uint8)
        metrics.update(truth, {"global": argparse.Namespace(ids=torch.arange(100) < right)})
        return Evaluation(metrics, 1, 0.0)

    monkeypatch.setattr(setup, "build_training_model", stub_build)
    monkeypatch.setattr(helper, "train_one_epoch", stub_train)
    monkeypatch.setattr("training.run.evaluate_images", stub_evaluate)
    folders = [f"--{name}_path={tmp_path / name}" for name in ("data", "model", "log")]

    def run(epochs: int) -> dict[str, float]:
        """Which epoch each file in the model folder is of."""
        common = ["--task_name=a", "--backbone_weights=none", f"--backbone={BACKBONE}", "--num_workers=0"]
        assert train_deep_globe.main([*folders, *common, f"--num_epochs={epochs}"]) == 0
        files = {path.name: checkpoint.read(path).tensors for path in (tmp_path / "model").glob("*.pth")}
        return {name: float(tensors["global_.head.bias"][0]) for name, tensors in files.items()}

    assert run(3) == {"a.pth": 3, "a.best.pth": 2}
    assert run(2) == {"a.pth": 5, "a.best.pth": 4, "a.previous.pth": 3, "a.best.previous.pth": 2}


OLD = {"_use_new_zipfile_serialization": False}
FORMS = {"as exported": {}, "without module.": {}, "old format": OLD, "as torch 0.4 wrote it": OLD}
"""Of a released file, with how it is saved."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_released_file_gives_the_same_network_in_every_form(tmp_path, monkeypatch, stage, form) -> None:
    """Bit-equal. What the file does not hold: before stage 3 a refined backbone and head, which are the global ones;
    in stage 3 the context's, which come from the file of stage 1."""
    path = tmp_path / "released.pth"
    expected = write_released_checkpoint(path, stage).state_dict()
    content = torch.load(path, weights_only=True)
    if form == "without module.":
        content = {name.removeprefix("module."): x for name, x in content.items()}
    if form == "as torch 0.4 wrote it":
        content = {name: x for name, x in content.items() if not name.endswith("num_batches_tracked")}
        expected = {n: torch.zeros_like(x) if n.endswith("num_batches_tracked") else x for n, x in expected.items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, path, **FORMS[form])
    assert b"cuda:0" in path.read_bytes()
    assert path.read_bytes().startswith(b"PK") == (FORMS[form] is not OLD)  # a zip file or not
    model, outside = blank_model(), ("global_.backbone.", "global_.head.")
    if stage < 3:
        outside = ("refined.backbone.", "refined.head.")
        copies = {n: expected[n.replace("refined", "global_")] for n in expected if n.startswith(outside)}
        expected = {**expected, **copies}
    checkpoint.load_whole(model, checkpoint.read(path), stage)
    found = model.state_dict()
    assert_equal(found, expected, but=outside if stage == 3 else ())
    assert stage < 3 or all((x == BLANK).all() for name, x in found.items() if name.startswith(outside))


def test_context_is_the_whole_global_branch_of_stage_1_of_the_same_training(tmp_path) -> None:
    context, start = tmp_path / "context.pth", tmp_path / "start.pth"
    stage1 = write_released_checkpoint(context, 1).state_dict()
    refined = write_released_checkpoint(start, 3).state_dict()
    model = blank_model()
    checkpoint.load_whole(model, checkpoint.read(start), 3)
    checkpoint.load_context(model, checkpoint.read(context))
    expected = {name: (stage1 if name.startswith("global_.") else refined)[name] for name in refined}
    assert_equal(model.state_dict(), expected)
    model = write_thin_checkpoint(start, stage=2)
    checkpoint.save(context, model, build_header(1))
    checkpoint.check_context(model, checkpoint.read(context), start)
    write_thin_checkpoint(context, stage=1)  # other weights
    with pytest.raises(InputError, match=r"--path_g .*context\.pth .*start\.pth"):
        checkpoint.check_context(model, checkpoint.read(context), start)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_export_command_writes_what_released_files_of_a_stage_hold(tmp_path, monkeypatch, capsys, stage) -> None:
    def export(source: Path, target: Path) -> int:
        monkeypatch.setattr("sys.argv", ["checkpoint", "export", str(source), str(target)])
        return checkpoint.main()

    released = tmp_path / "released" / "theirs.pth"
    model = write_thin_checkpoint(tmp_path / "ours.pth", stage)
    assert export(tmp_path / "ours.pth", released) == 0
    assert f"mode {stage}" in capsys.readouterr().out
    found, expected = torch.load(released, weights_only=True), checkpoint.to_released(model.state_dict(), stage)
    assert list(found) == list(expected)
    modules, uses = checkpoint.released_modules(stage), STAGES[stage].uses
    ours = tuple(f"module.{theirs}." for name, theirs in modules.items() if name.split(".")[0] not in uses)
    assert_equal(found, expected, but=ours)
    assert export(released, tmp_path / "twice.pth") == 2
    assert capsys.readouterr().err == f"error: {released} is a released file already\n"
    assert not (tmp_path / "twice.pth").exists()


# what is refused

BIAS = "module.fpn_local.smooth2_1.bias"


WRONG_TENSORS = {  # a tensor of a released file, what it becomes (None: it goes), and what the error must name
    "missing": (BIAS, None, r"misses tensor local\.pyramid\.smooth1\.1\.bias"),
    "missing buffer": ("module.resnet_local.bn1.running_var", None, r"misses .*local\.backbone\.bn1\.running_var"),
    "misshaped": ("module.fpn_global.classify.weight", torch.zeros(9, 512, 3, 3), r"head\.weight is \(9, 512"),
    "4 TB": (BIAS, torch.ones(1).expand(1 << 40), r"smooth1\.1\.bias is \(1099511627776,\) where"),  # in one number
    "a number": (BIAS, 3, "is a int, not a tensor"),
    "unexpected root": ("module.extra.weight", torch.zeros(1), r"unexpected .*extra\.weight"),
    "unexpected leaf": ("module.resnet_local.fc.weight", torch.zeros(1), r"unexpected .*local\.backbone\.fc\.weight"),
}


@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_a_file_with_a_wrong_tensor_is_refused_by_its_name_and_the_network_left_as_it_was(tmp_path, fault) -> None:
    """Released files, and ours of stage 2."""
    path, model, (name, value, message) = tmp_path / "spoilt.pth", blank_model(), WRONG_TENSORS[fault]
    released = {o: r for o, r in checkpoint.released_modules(2).items() if o.startswith(("local.", "global_."))}
    for stage in (1, 2, 3):
        (write_thin_checkpoint if stage == 2 else write_released_checkpoint)(path, stage)
        whole = torch.load(path, weights_only=True)
        state = whole["model"] if stage == 2 else whole
        if stage == 2:  # the name that the tensor has here
            ours = [o for o, r in released.items() if name.startswith(f"module.{r}.")]
            name = f"{ours[0]}{name.removeprefix(f'module.{released[ours[0]]}')}" if ours else "extra.weight"
        state.pop(name, None)
        state |= {} if value is None else {name: value}
        torch.save(whole, path)
        with pytest.raises(InputError, match=rf"spoilt\.pth.*{message}"):
            checkpoint.load_whole(model, checkpoint.read(path), stage)
        name = WRONG_TENSORS[fault][0]
    assert all((tensor == BLANK).all() for tensor in model.state_dict().values())


def test_files_of_no_kind_and_of_newer_versions_are_not_called_damaged(tmp_path) -> None:
    text = tmp_path / "text.pth"
    text.write_text("no weights here\n")
    for path, reason in ((text, "not a readable"), (tmp_path, "no such"), (tmp_path / "none.pth", "no such")):
        with pytest.raises(InputError, match=f"{path}.* {reason}"):
            checkpoint.read(path)
    for content, told in (
        (ours(header=header(extra=1)), "was written by a newer version of this code, which records extra; update it"),
        (ours(version=2), "has format version 2; this code reads 1; update the code"),
        (ours(version=0), "has format version 0; this code reads 1$"),
    ):
        torch.save(content, tmp_path / "new.pth")
        with pytest.raises(InputError, match=rf"new\.pth {told}"):
            checkpoint.read(tmp_path / "new.pth")


def write_backbone(path: Path, name: str) -> State:
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.parametrize("name", BACKBONES)
def test_resnets_have_the_initial_weights_and_values_of_torchvisions(name) -> None:
    made, generators = [], []
    for build in (build_backbone, getattr(torchvision.models, name)):
        torch.manual_seed(0)
        made.append(build(name) if build is build_backbone else build())
        generators.append(torch.get_rng_state())
    ours, theirs = made
    states = ours.state_dict(), {key: x for key, x in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(states[0]) == list(states[1])
    runs.assert_equal_weights(*states)
    assert torch.equal(*generators)
    x, c5 = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image := torch.rand(2, 3, 65, 40))))), ours(image)[0]
    assert torch.equal(c5, theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x)))))


def test_backbone_weights_that_do_not_fit_or_cannot_be_had_are_refused(tmp_path, monkeypatch) -> None:
    write_backbone(tmp_path / "deeper.pth", "resnet34")
    (tmp_path / "text.pth").write_text("no weights here")
    for name, reason in (
        ("deeper.pth", r"has the unexpected tensor layer1\.2\."),
        ("text.pth", "is not a torch weight file"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(InputError, match=rf"{name}.* {reason}|{reason}.*{name}"):
            build_backbone(BACKBONE, str(tmp_path / name))

    def fail(*others, **named) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=r"resnet18-.*\.pth .*no network.*--backbone_weights FILE.*none"):
        backbone_weights(BACKBONE, "imagenet")
    assert backbone_weights(BACKBONE, "none") is None


ENTRIES = {  # of a header: a value, what a file of before counts as, and values that are refused
    "statistics": (Statistics((0.25, 0.5, 0.1), (0.125, 0.1, 1)), None, [{"mean": [0, 0, 0], "std": [1, 0, 1]}, "a"]),
    "bands": ("4,2,1", None, []),
    "coarse_to_fine": (True, False, [1]),
    "box_margin": (0.25, BOX_MARGIN, [-1.0, "wide", float("nan")]),
    "share": ("none", "own", ["other"]),
    "pyramid_norm": ("batch", "none", ["x"]),
    "pyramid_width": (12, 256, [1]),
    "scale": (8.0, None, [0, "8"]),
    "trained_on": (
        TrainedOn("isic", split_seed=3, images="00112233445566ff" * 2),
        None,
        [{"dataset": 3}, *({"dataset": "a", "images": one} for one in ("x" * 16, "00")), [1]],
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_header_keeps_every_entry_and_files_of_before_lack_it(name) -> None:
    value, before, wrong = ENTRIES[name]
    header = build_header(2, **{name: value})
    record = json.loads(json.dumps(header.to_record()))
    assert Header.from_record(record) == header
    older = {key: entry for key, entry in record.items() if key != name}
    assert getattr(Header.from_record(older), name) == before
    for one in wrong:
        with pytest.raises((ValueError, KeyError, TypeError)):
            Header.from_record({**record, name: one})
    if name == "share":
        assert not header.settings().share_maps and Header.from_record({**older, "share_maps": False}) == header
    if name == "trained_on":
        assert str(value) == "isic, split_seed 3, 1 images"


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
    **{
        f"backbone {name}": ours(header=header(backbone=name))
        for name in ("__init__", "timm/hf_hub:a/b", "timm/", "timm/a/b", "timm/a b", "other/a", "timm/a.b.c")
    },
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
