"""A network whose rectifiers are half Huber losses, with the same weights."""

from __future__ import annotations

from torch import Tensor, nn

from ..autograd.rectifiers import HalfHuber, swapped
from ..hidden import refuse_hidden
from ..registry import PARTS
from .around import PlacedAround
from .classifier import ModelSpec


class HalfHuberNetwork(PlacedAround):
    """A model whose rectifiers compute a half Huber loss (Woods et al. 2019), as part of the model.

    Attacks find no rectifiers in it: its input gradients have derivatives as they are.

    Args:
        model: the network.
        delta: where the bowl ends.

    Raises:
        UnsupportedModelError: a model whose function calls cannot be seen.
    """

    def __init__(self, model: nn.Module, delta: float = 0.5) -> None:
        super().__init__(model)
        refuse_hidden(model, "a half Huber loss replaces rectifiers")
        self.delta = delta

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return self.placed_as("half-huber", delta=self.delta)

    def around(self, model: nn.Module) -> HalfHuberNetwork:
        """The same around another model."""
        return HalfHuberNetwork(model, self.delta)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        with swapped(HalfHuber(self.delta)):
            logits: Tensor = self.model(x)
        return logits


PARTS.register("half-huber", paper="Woods et al. 2019")(HalfHuberNetwork)
