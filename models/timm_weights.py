"""Weights of a network of timm, from timm's hub or from a file, under the names of `TimmBackbone`."""

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from models.tensors import read_weights
from models.timm_backbone import PREFIX, Layout, create, import_timm, layout_of
from utils.errors import InputError, reason_of


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
    """Return the name of a tensor as it is compared."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")
