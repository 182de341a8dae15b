"""How curved the explained network is around an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..fields import Count, Natural
from ..registry import METRICS
from .base import Better, Metric
from .cell import Cell

if TYPE_CHECKING:
    from ..interpreters.base import Interpreter


@METRICS.register("curvature", paper="Dombrowski et al. 2019 (curvature)", needs=("interpreter",))
@dataclass(frozen=True)
class Curvature(Metric):
    """Largest principal curvature of the class's level set at the input, of the smoothed network that is explained.

    To first order, how far the normalised gradient turns for a unit of the way (L2) along which the output stays. NaN
    for an interpreter that is not smoothed: on rectifiers the curvature is zero but for the kinks, which it does not
    see. An estimate from below, at one place: no bound on what a path to elsewhere does.

    Args:
        steps: of the power iteration.
        seed: of its start.
    """

    steps: Count = 20
    seed: Natural = 0

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, torch.inf)

    def __call__(self, interpreter: Interpreter, x: Tensor, target: Tensor | None = None) -> Tensor:
        """``[B]`` at ``x`` for class ``target`` (default: the prediction).

        Raises:
            InputError: bad ``x`` or ``target``.
        """
        # Imported here: at the top it would make metrics depend on interpreters at import.
        from ..interpreters import Smoothed, curvature

        checks.inputs(x)
        if not isinstance(interpreter, Smoothed):
            return torch.full_like(x.flatten(1)[:, 0], torch.nan)
        return curvature(interpreter, x, target, self.steps, self.seed)

    def of_cell(self, cell: Cell) -> Tensor:
        """At the attacked inputs, for the class that is predicted on them."""
        return self(cell.system.interpreter, cell.attacked, cell.seen.prediction)
