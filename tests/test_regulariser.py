"""Convolutions that overwrite their map in the backward pass, against plain ones and the regulariser written apart."""

import pytest
import torch
import torch.nn.functional as F

from models.pyramid import resize
from models.regulariser import conv_and_distance, last_conv


@pytest.mark.parametrize("crop_size", [(4, 5), (9, 8)])
def test_convolution_and_distance_have_the_values_and_gradients_of_the_two_apart(crop_size) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    crop = torch.randn(3, 6, *crop_size)
    kept = crop.clone()
    seed = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    apart = F.conv2d(x, weight, bias, padding=1), F.mse_loss(x, resize(crop.double(), (9, 8)))
    together = conv_and_distance(x, weight, bias, crop)
    torch.testing.assert_close(together[0], apart[0])
    torch.testing.assert_close(together[1], apart[1].float())
    wanted, found = (
        torch.autograd.grad((scores * seed).sum() + 0.15 * distance.double(), (x, weight, bias))
        for scores, distance in (apart, together)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the distance is counted in float32
    assert torch.equal(crop, kept)


def test_a_last_convolution_has_the_gradients_of_a_plain_one_and_its_map_can_be_read_no_more() -> None:
    torch.manual_seed(0)
    source = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((F.conv2d(source * 2, weight) * seed).sum(), (source, weight))
    x = source * 2
    found = torch.autograd.grad((last_conv(x, weight) * seed).sum(), (source, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    x = source * 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x.square().sum() + last_conv(x, weight).sum()).backward()
