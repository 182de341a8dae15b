"""An interpreter that explains the model with smoothed rectifiers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from ...autograd.rectifiers import Softplus, require_rectifiers, swapped
from ...registry import INTERPRETERS
from ..base import Explanation
from ..gradients.integrated import predicted
from .base import Wrapper


@INTERPRETERS.register("smoothed", paper="Dombrowski et al. 2019, section 5", needs=("rectifiers",))
@dataclass(frozen=True, eq=False)
class Smoothed(Wrapper):
    """``base`` computed with every rectifier replaced by ``softplus_beta``; the logits stay the model's own.

    The explained class is the real model's prediction. Costs one more forward pass.

    Raises:
        UnsupportedModelError: on the first input, for a model without rectifiers: smoothing would not change it.

    Args:
        base: the interpreter to smooth; it must explain ``model``.
        smooth: the softplus and its ``beta``: the smaller, the smoother.
    """

    smooth: Softplus = field(default_factory=Softplus)

    is_gradient: ClassVar[bool] = False

    @cached_property
    def _checked(self) -> set[str]:
        """``rectifiers``, once the model is known to have some."""
        return set()

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        if not self._checked:
            require_rectifiers(self.model, x.detach(), "smoothing")
            self._checked.add("rectifiers")
        # The real network's graph is kept only where the caller differentiates.
        logits, target = predicted(self.model, x, target, graph)
        with swapped(self.smooth):
            found = self.base._explain(x, target, graph)
        return found._replace(logits=logits)
