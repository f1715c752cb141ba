"""The paper's feature-map regulariser (section 3.3), read off a map together with a convolution of it."""

from typing import Any

import torch
from torch import Tensor

from models.resized import conv, resize


def conv_and_distance(x: Tensor, weight: Tensor, bias: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution of `x` (n, C, h, w) by `weight` (K, C, 3, 3), and the distance of `x` to `crop`.

    The distance is the mean squared difference, float32, to a constant `crop` (n, C, h', w') resized to `x`. Local ps3
    is the largest map of a training step: no resized crop or difference is kept for the gradient, and that of the
    distance is added to the convolution's, so that there is only one.
    """
    return _ConvAndDistance.apply(x, weight.to(x.dtype), bias.to(x.dtype), crop)


class _ConvAndDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, crop)
        distance = sum(_difference(*pair).square().sum() for pair in zip(x, crop, strict=True)) / x.numel()
        return conv(x, weight, bias), distance

    @staticmethod
    def backward(ctx: Any, of_conv: Tensor, of_distance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, crop = ctx.saved_tensors
        geometry = ([len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # bias, stride, padding, dilation, ...
        from_x, from_weight, from_bias = torch.ops.aten.convolution_backward(
            of_conv, x, weight, *geometry, [True, True, True]
        )
        for gradient, *pair in zip(from_x, x, crop, strict=True):
            gradient += _difference(*pair).mul_(2 * of_distance / x.numel())
        return from_x, from_weight, from_bias, None


def _difference(x: Tensor, crop: Tensor) -> Tensor:
    """Of one sample, float32."""
    return x.float() - resize(crop[None].float(), x.shape[-2:])[0]
