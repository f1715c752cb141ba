"""The feature-map regulariser (paper, section 3.3), computed together with a convolution of the same map."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from models.resized import conv, resize
from utils.tiling import map_size


def conv_and_distance(x: Tensor, weight: Tensor, bias: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve a map and compute its distance to another one.

    Local ps3 is the largest map of a training step. So neither the resized crop nor the difference is kept for the
    backward pass, and the gradient of the distance is added to the convolution's, so that only one is held.

    Args:
        x: (n, C, h, w).
        weight: (K, C, 3, 3).
        bias: (K,).
        crop: (n, C, h', w'), a constant; resized to `x`.

    Returns:
        The convolution, (n, K, h, w), and the mean squared difference of `x` and `crop`, a float32 scalar.
    """
    return _ConvAndDistance.apply(x, weight.to(x.dtype), bias.to(x.dtype), crop)


class _ConvAndDistance(torch.autograd.Function):
    """`conv_and_distance` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, crop)
        parts = (_difference(sample, target).square().sum() for sample, target in zip(x, crop, strict=True))
        return conv(x, weight, bias), reduce(torch.add, parts) / x.numel()

    @staticmethod
    def backward(ctx: Any, of_conv: Tensor, of_distance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, crop = ctx.saved_tensors
        from_x, from_weight, from_bias = torch.ops.aten.convolution_backward(
            of_conv,
            x,
            weight,
            bias_sizes=[len(weight)],
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[True, True, True],
        )
        for gradient, sample, target in zip(from_x, x, crop, strict=True):
            gradient += _difference(sample, target).mul_(2 * of_distance / x.numel())
        return from_x, from_weight, from_bias, None


def _difference(x: Tensor, crop: Tensor) -> Tensor:
    """Return `x` (C, h, w) minus `crop` (C, h', w') resized to it, float32."""
    return x.float() - resize(crop[None].float(), map_size(x))[0]
