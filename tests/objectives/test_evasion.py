"""What an adversary who knows the detector must reach is what the system calls no alarm."""

from __future__ import annotations

import torch
from torch import Tensor

from robustexplain.objectives import EvadeDetector, Goal, Observation


class Undefined:
    """A score that is NaN for the second of two inputs."""

    threshold, soft_threshold = 0.5, 0.5

    def score(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, torch.nan])

    def soft_score(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))


def test_a_score_that_is_nan_rings_for_the_attacker_as_it_does_for_the_system() -> None:
    x, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    seen = Observation(x, torch.zeros(2, 3), score=torch.zeros(2))
    assert EvadeDetector(0.5, watch=Undefined()).met(seen, Goal(x, labels)).tolist() == [True, False]
