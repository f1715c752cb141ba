"""Networks of timm as encoders: every part of a run works with them, or refuses them in one line at its start."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from builders import BACKBONE, N_CLASS, build_header
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import train_deep_globe
from models import checkpoint, timm_backbone
from models.backbone import build_backbone, check_backbone
from models.bands import bands_of, fit_kernels, set_bands, widen
from models.folding import Placement, fold_norms
from models.glnet import GLNet
from models.pyramid import STRIDES
from models.timm_backbone import convert_sync_batchnorm, layout_of
from predict import Segmenter
from utils.errors import InputError

timm = pytest.importorskip("timm", reason="timm, an optional package, is not installed")

from timm.models import register_model  # noqa: E402
from timm.models.swin_transformer import _create_swin_transformer  # noqa: E402


@register_model
def small_swin(pretrained: bool = False, **options) -> nn.Module:
    """A Swin transformer of four blocks, with stochastic depth as the large ones have it."""
    shape = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
    return _create_swin_transformer("swin_tiny_patch4_window7_224", pretrained=pretrained, **shape, **options)


TRAINED = ("timm/test_convnext", "timm/small_swin", "timm/test_efficientnet")
"""A ConvNeXt, a Swin and an EfficientNet, each of less than a million parameters."""

FAMILIES = (*TRAINED, "timm/test_resnet", "timm/mobilevit_xxs", "timm/regnetx_002", "timm/resnetv2_18")
CPU = Placement(torch.device("cpu"))


def spread_norms(module: nn.Module) -> nn.Module:
    """Give norm layers statistics and weights that are neither equal nor neutral; return the module for evaluation."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.data.uniform_(0.5, 1.0, generator=generator)
            norm.bias.data.uniform_(-0.1, 0.1, generator=generator)
    return module.eval()


def encoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    return spread_norms(build_backbone(name))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_maps_are_those_of_a_resnet_in_number_and_size_and_the_prepared_form_gives_the_same(name) -> None:
    """An image of odd sides, in float32 and bfloat16; channels are those that timm names."""
    plain = encoder(name)
    image = torch.randn(2, 3, 77, 101)
    maps = plain(image)
    sizes = [tuple(x.shape[2:]) for x in encoder(BACKBONE)(image)]
    assert [tuple(x.shape[2:]) for x in maps] == sizes
    assert tuple(x.shape[1] for x in maps) == plain.channels == plain.layout.channels[::-1]
    for x, y in zip(maps, fold_norms(plain, CPU)(image), strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max()
    halves = fold_norms(plain, Placement(torch.device("cpu"), torch.bfloat16))(image.bfloat16())
    for x, y in zip(maps, halves, strict=True):
        assert y.dtype == torch.bfloat16
        assert (x - y).abs().mean() <= 0.05 * x.abs().mean()


@torch.no_grad()
def test_a_map_of_a_padded_image_has_the_cells_of_the_image_alone() -> None:
    """Below and right of the image there are zeros, as a convolution pads."""
    net, image = encoder("timm/test_convnext"), torch.randn(1, 3, 60, 40)
    padded = nn.functional.pad(image, (0, 24, 0, 4))  # to 64 x 64
    for x, y, stride in zip(net(image), net(padded), STRIDES[::-1], strict=True):
        assert torch.equal(x, y[..., : -(-60 // stride), : -(-40 // stride)])


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/repvgg_a0", "timm/mobileone_s0"])
@torch.no_grad()
def test_every_layer_that_reads_the_image_is_widened_for_other_bands(name) -> None:
    """In the last two several layers do. Six equal bands give what three give; the prepared form does the same."""
    plain, grey = encoder(name), torch.randn(1, 1, 64, 96)
    state = plain.state_dict()
    expected = plain(grey.expand(-1, 3, -1, -1))
    set_bands(plain, 6)
    assert bands_of(plain) == 6
    plain.eval()
    image = grey.expand(-1, 6, -1, -1)
    for maps in (plain(image), fold_norms(plain, CPU)(image)):
        for x, y in zip(maps, expected, strict=True):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()
    fitted = fit_kernels(plain, state)
    assert all(torch.equal(tensor, fitted[key]) for key, tensor in plain.state_dict().items())


def test_kernels_behind_pixels_moved_into_channels_are_widened() -> None:
    """As in TResNet: 4 x 4 pixels become channels, the bands innermost."""
    kernels, grey = torch.randn(5, 48, 3, 3), torch.randn(1, 1, 32, 32)

    def convolved(n_bands: int) -> Tensor:
        cells = grey.expand(-1, n_bands, -1, -1).view(1, n_bands, 8, 4, 8, 4).permute(0, 3, 5, 1, 2, 4)
        return nn.functional.conv2d(cells.reshape(1, 16 * n_bands, 8, 8), widen(kernels, n_bands))

    for n_bands in (1, 6):
        torch.testing.assert_close(convolved(n_bands), convolved(3), rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """Two norm layers that must not be folded: of a map that is read twice, and of a convolution that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.third, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.norm1(x)
        x = self.second(self.norm2(self.second(x)))
        return self.norm3(self.third(x))


@torch.no_grad()
def test_a_norm_layer_is_folded_where_nothing_else_reads_its_convolution() -> None:
    torch.manual_seed(0)
    plain, image = spread_norms(Shared()), torch.randn(1, 3, 8, 8)
    folded = fold_norms(plain, CPU)
    assert [isinstance(norm, _BatchNorm) for norm in (folded.norm1, folded.norm2, folded.norm3)] == [True, True, False]
    torch.testing.assert_close(folded(image), plain(image))
    for name in (BACKBONE, "timm/test_efficientnet", "timm/test_resnet"):  # after every convolution
        plain = encoder(name)
        before, after = (sum(isinstance(m, _BatchNorm) for m in n.modules()) for n in (plain, fold_norms(plain, CPU)))
        assert before > after == 0


@torch.no_grad()
def test_norm_layers_of_all_processes_keep_their_activations() -> None:
    plain, image = encoder("timm/test_efficientnet"), torch.randn(1, 3, 64, 64)
    joint = convert_sync_batchnorm(copy.deepcopy(plain))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in joint.modules())
    torch.testing.assert_close(joint(image), plain(image), rtol=0, atol=0)


# what is refused

REFUSED = {
    "timm/vit_tiny_patch16_224": r"it gives maps at 1/16 of the image.*convnext_tiny.*swin.*efficientnet_b0",
    "timm/coatnet_0_rw_224": r"images of 224 x 224 pixels only.*convnext_tiny.*swin.*efficientnet_b0",
    "timm/convnext_tinny": r"timm \S+ has no such network; take .*timm/convnext_tiny",
    "timm/test_convnext.no_such_tag": r"cannot build it .*no_such_tag.*convnext_tiny",
    "timm/inception_v4": r"not at those scales exactly.*convnext_tiny",
}
WINDOWED = "timm/maxvit_rmlp_pico_rw_256"


@pytest.mark.parametrize(
    ("name", "size_g", "size_p", "message"),
    [
        *((name, 64, 64, f"^--backbone {name}: .*{reason}") for name, reason in REFUSED.items()),
        (WINDOWED, 256, 508, r"--size_p 508: the windows of .* divisible by 256; try 256 or 512"),
        (WINDOWED, 64, 256, r"--size_g 64: .*; try 256$"),
    ],
)
def test_a_network_or_a_size_that_does_not_fit_is_refused_with_the_reason(name, size_g, size_p, message) -> None:
    with pytest.raises(InputError, match=message) as refused:
        check_backbone(name, size_g, size_p)
    assert "\n" not in str(refused.value)
    if name == WINDOWED:
        check_backbone(name, 256, 512)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/hf_hub:a/b", "timm/", "vgg16", "timm/../a"])
def test_a_run_with_such_a_network_ends_in_one_line_before_images_are_read(tmp_path, refused, name) -> None:
    folders = runs.Folders(tmp_path, runs.generate(tmp_path / "data", images=4))
    for path in folders.data.rglob("*.jpg"):
        path.write_bytes(b"no image")
    message = refused(train_deep_globe.main, *folders.arguments(1, f"--backbone={name}"))
    assert message.startswith(f"error: --backbone {name}")


def test_without_timm_the_name_is_refused_in_one_line(tmp_path, monkeypatch, refused) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    layout_of.cache_clear()
    arguments = runs.Folders(tmp_path, runs.generate(tmp_path / "data", images=4)).arguments(1)
    told = "error: --backbone timm/test_convnext needs the package timm, which is not installed: pip install timm"
    assert refused(train_deep_globe.main, *arguments, "--backbone=timm/test_convnext") == told


def write_whole(path: Path, name: str) -> dict[str, Tensor]:
    """Write the weights of a whole network, classifier included, and return them."""
    torch.manual_seed(1)
    state = timm.create_model(name.removeprefix("timm/")).state_dict()
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("name", [*FAMILIES, "timm/xception41", "timm/pvt_v2_b0"])
def test_a_file_of_the_whole_network_fits_every_form_in_which_timm_gives_maps(name, tmp_path) -> None:
    """Every tensor of the backbone comes from the file, and no random number is drawn."""
    path = tmp_path / "whole.pth"
    whole = write_whole(path, name)
    before = torch.get_rng_state()
    state = build_backbone(name, str(path)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    values = {(tuple(x.shape), float(x.double().sum())) for x in whole.values()}
    assert {(tuple(x.shape), float(x.double().sum())) for x in state.values()} <= values


def test_safetensors_and_files_without_the_classifier_are_read_alike(tmp_path) -> None:
    name = TRAINED[0]
    whole = write_whole(tmp_path / "a.safetensors", name)
    torch.save({key: x for key, x in whole.items() if not key.startswith("head.")}, tmp_path / "b.pth")
    first, second = (build_backbone(name, str(path)).state_dict() for path in sorted(tmp_path.iterdir()))
    runs.assert_equal_weights(first, second)
    assert torch.equal(first["net.stem_0.weight"], whole["stem.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "stages.7.weight": s["stem.0.weight"]}, r"unexpected tensor net\.stages\.7\.weight"),
        (lambda s: {k: x for k, x in s.items() if k != "stem.0.bias"}, r"misses tensor net\.stem_0\.bias"),
        (lambda s: {**s, "stem.0.bias": torch.zeros(3)}, r"net\.stem_0\.bias is \(3,\) where"),
        (lambda s: {**s, "stem.0.bias": 3}, r"stem\.0\.bias is a int, not a tensor"),
        (lambda s: 7, r"holds a int, not a state dict"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_name_that_does_not(tmp_path, change, message) -> None:
    path = tmp_path / "wrong.pth"
    torch.save(change(write_whole(path, TRAINED[0])), path)
    with pytest.raises(InputError, match=rf"wrong\.pth.*{message}"):
        build_backbone(TRAINED[0], str(path))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"broken\.safetensors is not a safetensors file"):
        build_backbone(TRAINED[0], str(broken))


def test_pretrained_weights_without_a_connection_end_in_one_line(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    message = r"weights of timm/test_convnext could not be downloaded from \S+huggingface\.co/timm/\S+ \(no network\)"
    with pytest.raises(InputError, match=rf"{message}.*--backbone_weights FILE, or --backbone_weights none$"):
        build_backbone(TRAINED[0], "imagenet")
    with pytest.raises(InputError, match="timm has no weights of timm/regnetx_002"):
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
        build_backbone("timm/regnetx_002", "imagenet")


def test_a_checkpoint_records_the_network_and_is_predicted_from(tmp_path) -> None:
    name, path = "timm/small_swin", tmp_path / "a.pth"
    checkpoint.save(path, GLNet(N_CLASS, name), build_header(3, backbone=name))
    found = checkpoint.read(path)
    assert found.header.backbone == name
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    assert Segmenter.from_checkpoint(path, device="cpu").segment(image).shape == (70, 90)
    with pytest.raises(InputError, match=r"a\.pth was made with timm/small_swin; the released code has ResNets only"):
        checkpoint.export(path, tmp_path / "released.pth")
    with pytest.raises(InputError, match=r"a\.pth was made with timm/small_swin"):
        Segmenter.from_checkpoint(path, device="cpu", backbone="resnet50")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resumed"), zip(TRAINED, (1, 2, 3), strict=True))
def test_three_stages_of_which_one_is_killed_and_resumed(name, resumed, tmp_path) -> None:
    """A stage that is killed after its first step, by SIGKILL, ends with the same bits; the last file is evaluated."""
    data = runs.generate(tmp_path / "data", images=4, size=72)
    whole = runs.Folders(tmp_path / "whole", data)
    more = [f"--backbone={name}", "--num_epochs=1", runs.SAVE_OFTEN, "--resume=auto"]
    for mode in (1, 2, 3):
        ended = runs.run(whole.arguments(mode, *more), tmp_path / "whole.out", prepare=small_swin_is_known)
        assert ended.code == 0, ended.output
    killed = whole.beside(tmp_path / "killed")
    died = runs.run(killed.arguments(resumed, *more), tmp_path / "killed.out", prepare=die_after_a_step)
    assert died.code == -9, died.output
    assert (killed.models / f"{runs.NAMES[resumed]}.resume.pth").exists()
    rest = runs.run(killed.arguments(resumed, *more), tmp_path / "rest.out", prepare=small_swin_is_known)
    assert rest.code == 0, rest.output
    runs.assert_equal_weights(killed.weights(resumed), whole.weights(resumed))
    assert checkpoint.read(whole.models / "three.pth").header.backbone == name
    assert not torch.equal(*(whole.weights(mode)["ensemble.weight"] for mode in (2, 3)))
    evaluation = [*whole.arguments(3), f"--backbone={name}", "--path_l2g=three.pth", "--evaluation"]
    assert train_deep_globe.main(evaluation) == 0


def small_swin_is_known() -> None:
    """Prepare a process: importing this module registered the network."""
    assert timm_backbone.layout_of("timm/small_swin")


def die_after_a_step() -> None:
    runs.die_while_saving("after renaming", 1)
