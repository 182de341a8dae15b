"""An interpreter as a module: what a loss on maps trains, also on several processes."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from ..autograd.rectifiers import Softplus, swapped
from .base import Interpreter


class ExplainingModel(nn.Module):
    """Logits and maps from one forward pass, so that data-parallel training sees both.

    A loss on maps differentiates the model twice. Under ``DistributedDataParallel`` gradients are averaged only for
    what comes out of the wrapped module's own forward pass: the maps must be among it, and so must the logits.

    Args:
        interpreter: of the model in training.
        beta: of the softplus in place of the rectifiers; ``None`` leaves them.
    """

    def __init__(self, interpreter: Interpreter, beta: float | None = None) -> None:
        super().__init__()
        self.model = interpreter.model
        self.interpreter = interpreter
        self.beta = beta

    def forward(
        self, x: Tensor, target: Tensor | None = None, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits ``[B, K]`` and maps (on the method's own grid) of ``x``, and logits of ``other`` ``[N, K]``.

        Args:
            x: explained inputs.
            target: ``[B]`` classes to explain; default the prediction.
            other: inputs that are only classified, in the same pass of the wrapped module.
        """
        with swapped(Softplus(self.beta)) if self.beta else nullcontext():
            found = self.interpreter.explain(x, target, native=True)
            return found.logits, found.maps, None if other is None else self.model(other)
