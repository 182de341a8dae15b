"""An exponential moving average of the weights in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Averaged weights and statistics; whole numbers (how many batches a norm has seen) are taken as they are.

    Args:
        module: in training.
        decay: of the average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = _copy(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after an optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module has the averaged weights for the length of a block, and then its own again."""
        own = _copy(module)
        try:
            module.load_state_dict(self.values)
            yield
        finally:
            module.load_state_dict(own)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
