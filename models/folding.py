"""Copies of backbones for inference, their norm layers folded into the convolutions before them."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from models.bands import bands_of
from utils.errors import required


@dataclass(frozen=True)
class Placement:
    """Device and type of weights and maps of the prepared network, whose memory layout is channels last."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def put(self, x: Tensor) -> Tensor:
        """Return `x` on the device, in the precision if it has one, and channels last if it has four dimensions."""
        x = x.detach().to(self.device, self.dtype if x.is_floating_point() else x.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def fold_norms(backbone: nn.Module, placement: Placement) -> nn.Module:
    """Return a copy of a backbone in evaluation mode, with norm layers folded into the convolutions that they read.

    Norm layers without fixed statistics, and those that read anything but the output of a convolution that nothing else
    reads, stay as they are. So does an activation that timm keeps in a norm layer.
    """
    copies: dict[int, Any] = {}  # by the identity of what is copied, as copy.deepcopy keeps them
    biases: list[tuple[nn.Conv2d, nn.Parameter]] = []
    for conv, norm in _foldable(backbone):
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            required(norm.running_mean, "running mean"),
            required(norm.running_var, "running variance"),
            norm.eps,
            norm.weight,
            norm.bias,
        )
        copies[id(conv.weight)] = _constant(weight, placement)
        copies[id(norm)] = copy.deepcopy(getattr(norm, "act", nn.Identity()))
        biases.append((conv, _constant(bias, placement)))
    for parameter in backbone.parameters():
        if id(parameter) not in copies:
            copies[id(parameter)] = _constant(parameter, placement)
    for buffer in backbone.buffers():
        copies[id(buffer)] = placement.put(buffer)
    folded = copy.deepcopy(backbone, copies)
    for conv, bias in biases:
        copies[id(conv)].bias = bias
    return folded


def _constant(x: Tensor, placement: Placement) -> nn.Parameter:
    return nn.Parameter(placement.put(x), requires_grad=False)


def _foldable(backbone: nn.Module) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Return each convolution that can be folded with the norm layer that is, found by running the backbone once."""
    image, reads = next(backbone.parameters()).new_zeros(1, bands_of(backbone), 64, 64), _Reads()
    with torch.no_grad(), reads:
        backbone(image)
    convs = {id(m.weight): m for m in backbone.modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): m for m in backbone.modules() if isinstance(m, _BatchNorm)}
    return [(convs[weight], norms[mean]) for weight, mean in reads.pairs() if weight in convs and mean in norms]


class _Reads(TorchFunctionMode):
    """Records what reads the output of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []  # so that no identity is used twice
        self.convolved: dict[int, int] = {}  # output to weight
        self.normalised: dict[int, int] = {}  # input to running mean
        self.counts: Counter[int] = Counter()  # how often a tensor was read

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.counts.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.kept.append((args, kwargs, result))
            if func is torch.conv2d:
                self.convolved[id(result)] = id(args[1])
            elif func is F.batch_norm:
                self.normalised[id(args[0])] = id(args[1])
        return result

    def pairs(self) -> list[tuple[int, int]]:
        """Return the weight of each convolution whose output one norm layer alone reads, with its running mean."""
        return [
            (weight, self.normalised[output])
            for output, weight in self.convolved.items()
            if output in self.normalised
            and self.counts[output] == self.counts[weight] == self.counts[self.normalised[output]] == 1
        ]
