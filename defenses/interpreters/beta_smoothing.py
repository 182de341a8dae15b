"""Smoothing of the explained network: softplus in place of rectifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from robustexplain.autograd.rectifiers import Softplus, require_rectifiers
from robustexplain.fields import Positive
from robustexplain.interpreters import Smoothed
from robustexplain.interpreters.composed.base import walk
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse


@DEFENSES.register("beta-smoothing", paper="Dombrowski et al. 2019, section 5", needs=("rectifiers",))
@dataclass(frozen=True)
class BetaSmoothing(Defense):
    """Explain the network with softplus in place of rectifiers, whose bounded curvature bounds changes of the map.

    No training; the classifier and its predictions stay as they are. It costs one more forward pass per input.

    Args:
        beta: of ``softplus_beta``; the smaller, the smoother and the less faithful (the paper shows 10, 3, 1).
    """

    beta: Positive = 1.0

    layer = "interpreter"
    wraps: ClassVar[bool] = True

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        base = system.interpreter
        refuse(any(isinstance(part, Smoothed) for part in walk(base)), "the interpreter is smoothed already")
        if data is not None:
            sample = data[0][0][None].to(next(system.model.parameters(), torch.empty(0)))
            require_rectifiers(system.model, sample, "beta-smoothing")
        return replace(system, interpreter=Smoothed(system.model, base, Softplus(self.beta)))
