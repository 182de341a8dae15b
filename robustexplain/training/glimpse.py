"""A look at a few samples, by which a checkpoint tells whether its data are the same."""

from __future__ import annotations

import torch

from ..data.base import Samples, stack

Glimpse = list[list[float]]
"""Label, mean and mean square of some samples."""


def glimpse_of(data: Samples, count: int = 16) -> Glimpse:
    """Some samples, evenly spaced. On another kind of machine they differ in last bits, which a hash would see."""
    x, y = stack(data, range(0, len(data), max(1, len(data) // count)))
    flat = x.double().flatten(1)
    found: Glimpse = torch.stack([y.double(), flat.mean(1), flat.square().mean(1)], 1).tolist()
    return found


def alike(one: Glimpse, other: Glimpse) -> bool:
    """Whether two glimpses are of the same data, on whatever machine they were decoded."""
    if len(one) != len(other):
        return False
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
