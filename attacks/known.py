"""What an attacker may be told of the system that it attacks, besides the system."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustexplain.metrics import L1, MapMetric
from robustexplain.system import System


@dataclass(frozen=True, eq=False)
class Known:
    """How maps are judged, and the system before it was defended.

    Args:
        distance: how far apart maps are.
        limit: of the distance: nearer maps are plausible, farther ones moved; for each sample ``[B]``, or for all;
            ``None``: unknown.
        root: the undefended system, if the attacked one is another.
    """

    distance: MapMetric = field(default_factory=L1)
    limit: float | Tensor | None = None
    root: System | None = None

    def apart(self, maps: Tensor, wanted: Tensor) -> Tensor:
        """``[B]``: the distance; of a metric that is higher for closer maps, what it lacks to its upper bound.

        Infinite where undefined.
        """
        found = self.distance(maps, wanted)
        return (self.distance.bounds[1] - found if self.distance.higher_is_closer else found).nan_to_num(torch.inf)


NOTHING = Known()
"""Maps are compared by L1, and nothing else is known."""
