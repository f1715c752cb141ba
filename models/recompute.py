"""Recomputing an encoder's activations in the backward pass instead of keeping them: less memory, more time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.glnet import Branch, GLNet
from models.timm_backbone import TimmBackbone


@contextmanager
def recomputed_activations(model: GLNet, enabled: bool = True) -> Iterator[None]:
    """A context in which, if `enabled`, encoders that learn keep only the inputs of their stages.

    In the backward pass each stage is computed again, as torch's `checkpoint` does. Gradients, weights and buffers are
    the same bit by bit: random numbers are drawn again alike, and norm layers update copies of their statistics the
    second time. The network is changed only inside the context.
    """
    branches = [getattr(model, name) for name in model.learning] if enabled else []
    stages = [stage for branch in branches if isinstance(branch, Branch) for stage in _stages(branch.backbone)]
    for stage in stages:
        vars(stage)["forward"] = partial(_forward, stage, stage.forward)  # hides the method of the class
    try:
        yield
    finally:
        for stage in stages:
            del vars(stage)["forward"]


def _stages(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of an encoder that follow each other, without single layers.

    A sequence of nothing but sequences, as timm keeps the stages of some networks, is taken apart.
    """
    for child in (backbone.net if isinstance(backbone, TimmBackbone) else backbone).children():
        if isinstance(child, nn.Sequential) and all(isinstance(part, nn.Sequential) for part in child):
            yield from child
        elif any(True for _ in child.children()):
            yield child


def _forward(stage: nn.Module, forward: Any, *arguments: Any) -> Any:
    """Return `forward(*arguments)`, to be computed again in the backward pass, if there will be one."""
    if not torch.is_grad_enabled():
        return forward(*arguments)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _copied_buffers(stage)

    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """A context in which the buffers of a module are copies, so that whatever updates them has no effect."""
    buffers: list[tuple[nn.Module, str, Tensor]] = [
        (part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)
    ]
    for part, name, buffer in buffers:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in buffers:
            setattr(part, name, buffer)
