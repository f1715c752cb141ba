"""The first convolution of a backbone, for images of other than three bands."""

from collections.abc import Mapping

from torch import Tensor, nn

from utils.stretch import RGB


def first_conv(module: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return a module's first Conv2d, in the order of registration, and its name in the module.

    Raises ValueError if the module has none.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            return name, child
    raise ValueError(f"a {type(module).__name__} has no Conv2d that could read bands")


def widen(kernels: Tensor, n_bands: int) -> Tensor:
    """Return RGB kernels (K, 3, h, w) for images of `n_bands` bands, (K, n_bands, h, w), as timm makes them.

    Kernels of one band are the sum over red, green and blue: a grey band gives what it gave three times. Others are
    repeated over the bands and scaled by 3 / `n_bands`, so that the response keeps its size.
    """
    if n_bands == RGB:
        return kernels
    if n_bands == 1:
        return kernels.sum(1, keepdim=True)
    return kernels.repeat(1, -(-n_bands // RGB), 1, 1)[:, :n_bands] * (RGB / n_bands)


def set_bands(module: nn.Module, n_bands: int) -> None:
    """Let a module that reads RGB read `n_bands` bands: the kernels of its first Conv2d are widened."""
    _, conv = first_conv(module)
    if conv.in_channels != n_bands:
        conv.weight = nn.Parameter(widen(conv.weight.detach(), n_bands), conv.weight.requires_grad)
        conv.in_channels = n_bands


def fit_kernels(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return weights for a module, those of its first Conv2d widened if they are of RGB and the module is not.

    Args:
        module: reads any number of bands.
        state: tensors by name.
        prefix: of the names of the module's tensors.
    """
    name, conv = first_conv(module)
    key = f"{prefix}{name}.weight"
    kernels = state.get(key)
    if kernels is None or kernels.dim() != 4 or kernels.shape[1] != RGB:
        return dict(state)
    return {**state, key: widen(kernels, conv.in_channels)}
