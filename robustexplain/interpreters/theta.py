"""The coefficients of a self-explaining network, which are its own explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autograd import layers
from ..checks import Kind
from ..door import answer
from ..models.senn import explains_itself, self_explaining
from ..registry import INTERPRETERS
from .base import Channels, Explanation, Interpreter, explained_class, reduce_channels


@INTERPRETERS.register("theta", paper="Alvarez-Melis & Jaakkola 2018, section 3", needs=("self-explaining network",))
@dataclass(frozen=True, eq=False)
class Theta(Interpreter):
    """The coefficients ``theta_c(x)`` of a self-explaining network, ``f_c(x) = sum_i theta_ci(x) x_i + b_c``.

    They are read in the forward pass that classifies; nothing is differentiated. How far they are from the gradient of
    ``f_c``, and how fast they change, is a matter of training: the defense ``senn`` penalises the difference.

    Args:
        channels: how the coefficients of a pixel become one number: signed sum, sum of magnitudes, or largest
            magnitude.

    Raises:
        UnsupportedModelError: a model without a self-explaining network (``models.load("senn")``) in it.
    """

    channels: Channels = "sum"

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    explains_scalars: ClassVar[bool] = False

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        if not explains_itself(self.model):
            answer(self.model, x)  # a fault of the model's own comes first
        inside = self_explaining(self.model)
        name = f"{inside}.parametriser" if inside else "parametriser"
        with layers.captured(self.model, [name]) as outputs:
            logits = answer(self.model, x)
        classes = explained_class(logits, target)
        theta = outputs[name].unflatten(1, (logits.shape[1], -1))
        rows = torch.arange(len(x), device=x.device)
        return Explanation(logits, reduce_channels(theta[rows, classes], self.channels))
