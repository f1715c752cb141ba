"""A network of the package timm as a feature extractor. timm is optional: it is imported when such a name is given."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pyramid import STRIDES, Levels, cells, level_sizes
from models.tensors import read_weights
from utils.errors import InputError, reason_of
from utils.stretch import RGB
from utils.tiling import map_size

PREFIX = "timm/"
"""Begins the names of these backbones, as in `timm/convnext_tiny`."""

EXAMPLES = ("timm/convnext_tiny", "timm/swin_tiny_patch4_window7_224", "timm/efficientnet_b0")
"""Networks that messages propose."""

PROBES: tuple[tuple[int, int], ...] = ((3, 5), (1, 1))
"""Heights and widths, in multiples of `Layout.multiple`, that a network must take."""


@dataclass(frozen=True)
class Layout:
    """How a network of timm is built and read."""

    maps: tuple[int, ...]  # which of its maps are c2, c3, c4 and c5
    channels: tuple[int, ...]  # of these maps
    channels_last: bool  # whether they are (N, H, W, C), as those of Swin, instead of (N, C, H, W)
    multiple: int  # the sides of its input are multiples of this many pixels
    any_size: bool  # whether it must be built without a fixed image size (timm's `strict_img_size=False`)


class TimmBackbone(nn.Module):
    """A network of timm without classifier; its parameters have timm's names, those of `features_only=True`.

    Images whose sides are no multiples of `Layout.multiple` are padded with zeros below and on the right, and the maps
    are cropped to the cells of the image. `channels` are as those of `Backbone`.
    """

    def __init__(self, name: str) -> None:
        """Make a backbone for RGB with timm's initial weights. Raises InputError if no such network of timm fits."""
        super().__init__()
        self.name, self.layout = name, layout_of(name)
        self.build(RGB)
        self.channels = self.layout.channels[::-1]

    def build(self, n_bands: int) -> None:
        """Build the network anew for images of `n_bands` bands. Raises InputError if timm cannot."""
        try:
            self.net = create(self.name, self.layout, in_chans=n_bands)
        except Exception as error:  # timm raises many kinds
            raise InputError(
                f"--backbone {self.name}: timm cannot build it for {n_bands} bands ({reason_of(error)})"
            ) from error
        self.n_bands = n_bands

    def forward(self, image: Tensor) -> Levels:
        """Return c5, c4, c3, c2 of images (N, bands, H, W), (N, C, h, w) each: 1/32 to 1/4, sides rounded up."""
        height, width = map_size(image)
        below, right = (cells(side, self.layout.multiple) * self.layout.multiple - side for side in (height, width))
        padded = F.pad(image, (0, right, 0, below)) if torch.compiler.is_exporting() or below or right else image
        maps = self.net(padded)
        if self.layout.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return tuple(_cut(x, *size) for x, size in zip(maps[::-1], level_sizes((height, width)), strict=True))


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """Return the first rows and columns of maps (N, C, H, W)."""
    if torch.compiler.is_exporting():  # of a slice a program would hold that it cuts something off, at any size
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[..., :height, :width]


@lru_cache
def layout_of(name: str) -> Layout:
    """Find out how `timm/NAME`, with or without the tag of its weights, is built and read, on torch's meta device.

    Raises InputError if timm is not installed, has no such network, or the network lacks maps at 1/4, 1/8, 1/16 and
    1/32, or takes images of one size only.
    """
    timm = import_timm(name)
    own = name.removeprefix(PREFIX)
    if not timm.is_model(own):
        near = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
        proposed = [PREFIX + one for one in near] or EXAMPLES
        raise InputError(f"--backbone {name}: timm {timm.__version__} has no such network; take {_any_of(proposed)}")
    try:
        with torch.device("meta"):
            info = timm.create_model(own, features_only=True).feature_info
            entries = zip(info.reduction(), info.out_indices, info.channels(), strict=True)
            found = {reduction: (index, channels) for reduction, index, channels in entries}  # the last of each scale
    except Exception as error:  # timm raises many kinds; each means that it has no maps, or no such tag
        raise _refusal(name, f"timm cannot build it with features_only=True ({reason_of(error)})") from error
    if not set(STRIDES) <= set(found):
        scales = ", ".join(f"1/{reduction}" for reduction in found)
        raise _refusal(name, f"it gives maps at {scales} of the image")
    maps, channels = zip(*(found[stride] for stride in STRIDES), strict=True)
    config = timm.get_pretrained_cfg(own)
    side = STRIDES[-1] if config is None else config.input_size[-1]
    for multiple, any_size in product(sorted({STRIDES[-1], side}), (False, True)):
        layout = Layout(maps, channels, False, multiple, any_size)
        shapes = _probe(name, layout)
        for candidate in (layout, replace(layout, channels_last=True)):
            if shapes == _expected(candidate):
                return candidate
    raise _refusal(name, f"it takes images of {side} x {side} pixels only, or its maps are not at those scales exactly")


def _probe(name: str, layout: Layout) -> list[tuple[int, ...]] | None:
    """Return the shapes of a network's maps of an image of each size in `PROBES`; None if it fails."""
    images = (torch.empty(1, RGB, *(count * layout.multiple for count in probe), device="meta") for probe in PROBES)
    try:
        with torch.device("meta"), torch.no_grad():
            net = create(name, layout).eval()
            return [tuple(x.shape) for image in images for x in net(image)]
    except Exception:  # of layers that do not take the size, or of a constructor that does not take the argument
        return None


def _expected(layout: Layout) -> list[tuple[int, ...]]:
    """Return what `_probe` returns for a network of this layout."""
    shapes: list[tuple[int, ...]] = []
    for rows, columns in PROBES:
        for channels, stride in zip(layout.channels, STRIDES, strict=True):
            cells = rows * layout.multiple // stride, columns * layout.multiple // stride
            shapes.append((1, *cells, channels) if layout.channels_last else (1, channels, *cells))
    return shapes


def create(name: str, layout: Layout, **more: Any) -> nn.Module:
    """Build a network of timm that returns c2, c3, c4 and c5; `more` goes to `timm.create_model`."""
    options = {"strict_img_size": False} if layout.any_size else {}
    net: nn.Module = import_timm(name).create_model(
        name.removeprefix(PREFIX), features_only=True, out_indices=layout.maps, **options, **more
    )
    return net


def check_sides(name: str, size_g: int, size_p: int) -> None:
    """Raise InputError if a network cannot be used, see `layout_of`, or its windows do not fit the sides, in pixels.

    Multiples of 32 are not required, as padding is less than that; a network with windows of a fixed number of cells
    would be padded by up to a whole window.
    """
    multiple = layout_of(name).multiple
    for option, side in (("size_g", size_g), ("size_p", size_p)):
        if multiple > STRIDES[-1] and side % multiple:
            low = side // multiple * multiple
            near = " or ".join(str(value) for value in (low, low + multiple) if value)
            raise InputError(
                f"--{option} {side}: the windows of --backbone {name} need sides divisible by {multiple}; try {near}"
            )


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Return a module that holds networks of timm with norm layers whose statistics are those of all processes."""
    from timm.layers import convert_sync_batchnorm as convert

    converted: nn.Module = convert(module)
    return converted


def import_timm(name: str) -> ModuleType:
    """Return the package timm. Raises InputError if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"--backbone {name} needs the package timm, which is not installed: pip install timm"
        ) from error
    return timm


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"--backbone {name}: {reason}, and GLNet needs maps at 1/4, 1/8, 1/16 and 1/32 of images of several sizes; "
        f"take {_any_of(EXAMPLES)}"
    )


def _any_of(names: tuple[str, ...] | list[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def timm_weights(name: str, source: str) -> dict[str, Tensor]:
    """Return weights of a network of timm as a state dict for `TimmBackbone(name)`.

    The source is `imagenet`, timm's pretrained weights, which it downloads once; or a file, `.safetensors` or of
    `torch.save`, with timm's names of the whole network. Its tensors that the backbone does not have, the classifier's
    among them, are left out; names that fit nothing stay, and loading refuses them. Raises InputError if the weights
    cannot be downloaded or read.
    """
    layout = layout_of(name)
    state = _pretrained(name, layout) if source == "imagenet" else _from_file(name, layout, source)
    return {f"net.{key}": tensor for key, tensor in state.items()}


def _pretrained(name: str, layout: Layout) -> dict[str, Tensor]:
    """Return timm's pretrained weights. Raises InputError if there are none, or they cannot be downloaded."""
    config = import_timm(name).get_pretrained_cfg(name.removeprefix(PREFIX))
    if config is None or not config.has_weights:
        raise InputError(
            f"--backbone_weights imagenet: timm has no weights of {name}; pass --backbone_weights FILE, or none"
        )
    try:
        return create(name, layout, pretrained=True).state_dict()
    except Exception as error:  # of the hub's client, which raises many kinds
        where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        raise InputError(
            f"the pretrained weights of {name} could not be downloaded from {where} ({reason_of(error)}); "
            "fetch that file elsewhere and pass --backbone_weights FILE, or --backbone_weights none"
        ) from error


def _from_file(name: str, layout: Layout, source: str) -> Mapping[str, Tensor]:
    """Return the tensors of a file under the names of the network that gives the maps.

    A file with older names is renamed by the function that timm has for it, if the result fits.
    """
    with torch.device("meta"):
        whole, net = import_timm(name).create_model(name.removeprefix(PREFIX)), create(name, layout)
    given = read_weights(source)
    fitted = _fit(given, net, whole)
    if fitted.keys() == net.state_dict().keys():
        return fitted
    try:
        renamed = _fit(import_module(type(whole).__module__).checkpoint_filter_fn(dict(given), whole), net, whole)
    except Exception:  # there is none, or it expects another file
        return fitted
    return renamed if renamed.keys() == net.state_dict().keys() else fitted


def _fit(given: Mapping[str, Tensor], net: nn.Module, whole: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a `whole` network, with its classifier, to those of `net`, with `features_only=True`.

    The names of the two differ in dots and underscores (`stages.0`, `stages_0`) and in a module around all. Return the
    tensors that `net` has, under its names; and those that not even `whole` has, under their own.
    """
    names = {_plain(name): name for name in net.state_dict()}
    others = {_plain(name) for name in whole.state_dict()} - names.keys()
    return {names.get(_plain(name), name): x for name, x in given.items() if _plain(name) not in others}


def _plain(name: str) -> str:
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")
