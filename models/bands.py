"""The first convolutions of a backbone, for images of other than three bands."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.timm_backbone import TimmBackbone
from utils.stretch import RGB


def bands_of(module: nn.Module) -> int:
    """Return the number of bands that a backbone reads."""
    return module.n_bands if isinstance(module, TimmBackbone) else _first_conv(module).in_channels


def _first_conv(module: nn.Module) -> nn.Conv2d:
    """Return a module's first Conv2d, in the order of registration. Raises ValueError if the module has none."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child
    raise ValueError(f"a {type(module).__name__} has no Conv2d that could read bands")


def widen(kernels: Tensor, n_bands: int) -> Tensor:
    """Return RGB kernels (K, 3 * s, h, w) for images of `n_bands` bands, (K, n_bands * s, h, w), as timm makes them.

    The bands are innermost; s is 1 unless pixels are moved into channels first. Kernels of one band are the sum over
    red, green and blue: a grey band gives what it gave three times. Others are repeated over the bands and scaled by
    3 / `n_bands`, so that the response keeps its size.
    """
    if n_bands == RGB:
        return kernels
    own = kernels.unflatten(1, (-1, RGB))  # (K, s, 3, h, w)
    if n_bands == 1:
        return own.sum(2)
    return (own.repeat(1, 1, -(-n_bands // RGB), 1, 1)[:, :, :n_bands] * (RGB / n_bands)).flatten(1, 2)


def set_bands(module: nn.Module, n_bands: int) -> None:
    """Let a backbone that reads RGB read `n_bands` bands: the kernels that read the image are widened.

    In a network of timm several layers may read it: timm builds those. Of any other module it is the first Conv2d.
    Raises InputError if timm cannot build the network for so many bands.
    """
    if n_bands == bands_of(module):
        return
    if isinstance(module, TimmBackbone):
        state = module.net.state_dict()
        with torch.random.fork_rng(devices=()):
            module.build(n_bands)
        module.net.load_state_dict(fit_kernels(module.net, state))
        return
    conv = _first_conv(module)
    conv.weight = nn.Parameter(widen(conv.weight.detach(), n_bands), conv.weight.requires_grad)
    conv.in_channels = n_bands


def fit_kernels(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return tensors by name for a module: kernels for RGB are widened where the module reads another number of bands.

    `prefix` begins the names of the module's tensors.
    """
    fitted = dict(state)
    for name, own in module.state_dict().items():
        given = state.get(prefix + name)
        if given is None or given.dim() != 4 or given.shape == own.shape or given.shape[1] % RGB:
            continue
        n_bands, left = divmod(own.shape[1] * RGB, given.shape[1])
        if not left:
            fitted[prefix + name] = widen(given, n_bands)
    return fitted
