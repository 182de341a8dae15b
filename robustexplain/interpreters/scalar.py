"""Any scalar of a model's answer as a class to explain: a logit difference, a regression, a region's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.around import Around

Scalar: TypeAlias = Callable[[Any], Tensor]
"""From a model's answer, whatever it is, to one number an input, ``[B]``."""
Target: TypeAlias = Tensor | Scalar
"""What is explained: classes ``[B]``, or any scalar of the model's answer."""


class ScalarOutput(Around):
    """A model whose class 0 is a scalar of its answer; its own logits stand behind, where it answers with logits.

    Args:
        model: answers with anything.
        function: gives the scalar.
        differentiated: whether it is going to be differentiated.
    """

    def __init__(self, model: nn.Module, function: Scalar, differentiated: bool = True) -> None:
        super().__init__(model)
        self.function, self.differentiated = function, differentiated

    def around(self, model: nn.Module) -> ScalarOutput:
        """The same scalar of another model's answer."""
        return ScalarOutput(model, self.function, self.differentiated)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + K]``: the scalar, then the logits; ``[B, 2]``, the scalar twice, where there are none.

        Raises:
            InputError: the function fails, or does not give one finite number an input, or one without a gradient.
        """
        answer = self.model(x)
        scalar = self._checked(answer, x)[:, None]
        logits = isinstance(answer, Tensor) and answer.dim() == 2 and len(answer) == len(x)
        return torch.cat([scalar, answer if logits and answer.is_floating_point() else scalar], 1)

    def _checked(self, answer: Any, x: Tensor) -> Tensor:
        batch, name = len(x), type(self.model).__name__
        try:
            value: object = self.function(answer)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise InputError(
                f"target, a function of what {name} answers, failed on its answer to {batch} inputs (it must take any "
                f"number of them): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != (batch,) or not value.is_floating_point():
            got = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"target, a function of what {name} answers, must give one floating point number an input, a tensor "
                f"[{batch}], got {got}"
            )
        bad = ~value.detach().isfinite()
        if bad.any():
            raise InputError(
                f"target, a function of what {name} answers, gave NaN or infinity for {int(bad.sum())} of "
                f"{batch} inputs"
            )
        if self.differentiated and torch.is_grad_enabled() and x.requires_grad and not value.requires_grad:
            raise InputError(
                f"target, a function of what {name} answers, gave a number without a gradient: leave out detach, item, "
                "argmax and comparisons, or explain it with a method that only evaluates the model (Occlusion, RISE)"
            )
        return value
