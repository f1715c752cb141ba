"""An exponential moving average of a network's weights over the steps of a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def learned_state(network: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers of the children of `network` that learn, by name; memory is shared with it."""
    learning = {name for name, child in network.named_children() if any(p.requires_grad for p in child.parameters())}
    return {name: x for name, x in network.state_dict().items() if name.split(".")[0] in learning}


class WeightAverage:
    """The average of what learns in `network`, weights and norm statistics; updated after each optimizer step.

    The decay of update t, counted from 0, is min(decay, (1 + t) / (10 + t)), so that the average soon leaves the start.
    """

    def __init__(self, network: nn.Module, decay: float, optimizer: torch.optim.Optimizer) -> None:
        """Start with the network's present values, and follow the steps of `optimizer`."""
        self.network = network
        self.decay = decay
        self.restart()
        optimizer.register_step_post_hook(lambda *_: self.update())

    def restart(self) -> None:
        """Start again from the network's present values."""
        self.updates = 0
        self.values = {name: x.clone() for name, x in learned_state(self.network).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present values; whole numbers are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        own = learned_state(self.network)
        numbers = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in numbers], [own[name] for name in numbers], 1 - decay)
        for name in own.keys() - numbers:
            self.values[name].copy_(own[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged values, and its own ones, bit by bit, back in the end."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, own in learned_state(self.network).items():
            kept = own.clone()
            own.copy_(self.values[name])
            self.values[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` restores: plain values, and tensors on the CPU."""
        return {"updates": self.updates, "values": {name: x.cpu() for name, x in self.values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`. Raises LookupError, ValueError or TypeError if it is damaged or of another network."""
        for name, average in self.values.items():
            saved = state["values"][name]
            if saved.shape != average.shape:
                raise ValueError(f"the average of {name} has the shape {tuple(saved.shape)}")
            average.copy_(saved)
        self.updates = int(state["updates"])
