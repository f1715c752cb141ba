"""Backbones: ResNet as a feature extractor, and any backbone by its name."""

import argparse
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from models.pyramid import STRIDES, Levels
from models.resnet import CHANNELS, DEPTHS, expansion, resnet_layers
from models.tensors import load, read_weights
from models.timm_backbone import PREFIX, TimmBackbone, check_sides, layout_of, timm_weights
from utils.errors import InputError
from utils.stretch import RGB
from utils.tiling import map_size

BACKBONES = tuple(DEPTHS)
"""ResNets as torchvision's. Every other backbone is `timm/NAME`."""

NAME = re.compile(rf"{'|'.join(BACKBONES)}|{PREFIX}\w+(\.\w+)?", re.ASCII)
"""The names that a backbone can have."""


class Backbone(nn.Module):
    """A ResNet without average pooling and classifier; its parameters have torchvision's names.

    `channels` are those of c5, c4, c3, c2, coarsest first as in `Pyramid`.
    """

    def __init__(self, name: str = "resnet50") -> None:
        """Make a backbone with torchvision's initial weights; `name` is one of `BACKBONES`."""
        super().__init__()
        self.conv1 = nn.Conv2d(RGB, CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(CHANNELS[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet_layers(name)
        last = expansion(name) * CHANNELS[-1]
        nn.Linear(last, 1000)  # torchvision's classifier takes numbers of the generator, too
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels = tuple(last // k for k in (1, 2, 4, 8))

    def forward(self, image: Tensor) -> Levels:
        """Return c5, c4, c3, c2 of images (N, bands, H, W), (N, C, h, w) each: 1/32 to 1/4, sides rounded up."""
        # nested, so that no map is held longer than it is read
        c2 = self.layer1(self._pool(self.relu(self.bn1(self.conv1(image)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return self.layer4(c4), c4, c3, c2

    def _pool(self, x: Tensor) -> Tensor:
        return _MaxPool.apply(x) if x.requires_grad else self.maxpool(x)


class _MaxPool(torch.autograd.Function):
    """The stem's max-pool, 3x3 of stride 2, with the same gradient in less memory.

    For the backward pass torch keeps the index of each maximum, 8 bytes. Here its place in the window is kept, 1 byte.
    """

    WINDOW = ([3, 3], [2, 2], [1, 1])  # kernel, stride, padding

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(x, *_MaxPool.WINDOW)
        offsets = indices.sub_(_MaxPool.origins(pooled, x.shape[-1]))
        places = torch.div(offsets, x.shape[-1], rounding_mode="floor").mul_(3).add_(offsets.remainder_(x.shape[-1]))
        ctx.save_for_backward(x, places.to(torch.uint8))
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, places = ctx.saved_tensors
        indices = places.long()
        indices = torch.div(indices, 3, rounding_mode="floor").mul_(x.shape[-1]).add_(indices.remainder_(3))
        indices += _MaxPool.origins(gradient, x.shape[-1])
        return torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *_MaxPool.WINDOW, [1, 1], False, indices)

    @staticmethod
    def origins(pooled: Tensor, width: int) -> Tensor:
        """Return the index of each window's first cell in maps `width` cells wide, (h, w); -1 is left of the map."""
        rows, columns = (torch.arange(n, device=pooled.device).mul_(2).sub_(1) for n in map_size(pooled))
        return rows[:, None] * width + columns


def build_backbone(name: str, source: str = "none") -> Backbone | TimmBackbone:
    """Build a backbone, one of `BACKBONES` or `timm/NAME`, with weights of a source of `backbone_weights`.

    The source `none` draws initial weights from torch's generator, which any other leaves as it is. Raises InputError
    if there is no such backbone, or the weights cannot be downloaded, read or fitted.
    """
    state = backbone_weights(name, source)
    if state is None:
        return TimmBackbone(name) if name.startswith(PREFIX) else Backbone(name)
    with torch.random.fork_rng(devices=()):
        backbone = build_backbone(name)
    load(backbone, state, Path(source), ("",))
    return backbone


def backbone_weights(name: str, source: str) -> dict[str, Tensor] | None:
    """Return the initial weights of a backbone as a state dict; None for the source `none`.

    Others are `imagenet`, which torchvision or timm downloads once, and a file with a state dict of torchvision or
    timm, with or without the classifier. Raises InputError if the weights cannot be downloaded or read.
    """
    if source == "none":
        return None
    if name.startswith(PREFIX):
        return timm_weights(name, source)
    if source == "imagenet":
        import torchvision

        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            raise InputError(
                f"the ImageNet weights of {name} could not be downloaded from {weights.url} ({error}); "
                "fetch that file elsewhere and pass --backbone_weights FILE, or --backbone_weights none"
            ) from error
    else:
        state = read_weights(source)
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def backbone_name(text: str) -> str:
    """Parse `--backbone`; `check_backbone` checks that the network exists."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} must be {', '.join(BACKBONES)} or {PREFIX}NAME, a network of timm")
    return text


def side_multiple(name: str) -> int:
    """Return of what the sides of images are multiples, in pixels. Raises InputError if there is no such backbone."""
    multiple = layout_of(name).multiple if name.startswith(PREFIX) else 4
    return multiple if multiple > STRIDES[-1] else 4


def check_backbone(name: str, size_g: int, size_p: int) -> None:
    """Raise InputError if a backbone does not exist or take images of these sides; see `check_sides`."""
    if name.startswith(PREFIX):
        check_sides(name, size_g, size_p)
