"""An interpreter as a module, for losses on maps, also on several processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

from torch import Tensor, nn

from ..autograd.rectifiers import Softplus, swapped
from ..door import answer
from ..hidden import refuse_hidden
from .base import Interpreter


class ExplainingModel(nn.Module):
    """Logits and maps from one forward pass, as data-parallel training needs them.

    A loss on maps differentiates the model twice. Under ``DistributedDataParallel`` gradients are averaged only for
    the outputs of the wrapped module's own forward pass, so both logits and maps must be among them.

    Args:
        interpreter: explains the model that is trained.
        beta: of the softplus that replaces the rectifiers; ``None`` keeps the rectifiers.

    Raises:
        UnsupportedModelError: ``beta`` for a model whose function calls cannot be seen.
    """

    layers_inside: ClassVar[str] = "model"

    def __init__(self, interpreter: Interpreter, beta: float | None = None) -> None:
        super().__init__()
        if beta:
            refuse_hidden(interpreter.model, "a softplus replaces rectifiers")
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
            logits, maps, *_ = self.interpreter.explain(x, target, native=True)
            return logits, maps, None if other is None else answer(self.model, other)
