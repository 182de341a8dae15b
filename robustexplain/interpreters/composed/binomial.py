"""Exact statements about a probability from how often something happened in independent draws."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...maps import positive

Correction = Literal["bonferroni", "holm"]
"""How the tests of many cells keep one chance of error: every cell at ``alpha / n``, or Holm's (1979) steps."""
Bound = Literal["hoeffding", "clopper-pearson"]
"""Bounds of a share: Hoeffding's, of one width for all, or Clopper and Pearson's (1934), exact and never wider."""


@lru_cache(maxsize=64)
def tails(draws: int, share: float) -> Tensor:
    """``P(X >= k)`` of ``draws`` at probability ``share``, for ``k = 0..draws``: float64 ``[draws + 1]``."""
    from scipy.special import bdtrc  # type: ignore[import-untyped]

    above: list[float] = [1.0, *(float(bdtrc(k - 1, draws, share)) for k in range(1, draws + 1))]
    return torch.tensor(above, dtype=torch.float64)


def rejected(p: Tensor, alpha: float, correction: Correction) -> Tensor:
    """Bool ``[B, n]``: which of a row's hypotheses are rejected, with a chance of at most ``alpha`` of any error.

    Args:
        p: p-values ``[B, n]``.
        alpha: of a row.
        correction: ``holm`` rejects whatever ``bonferroni`` does, and perhaps more.
    """
    n = p.shape[1]
    if correction == "bonferroni":
        return p <= alpha / n
    ordered, places = p.sort(dim=1, stable=True)
    steps = alpha / torch.arange(n, 0, -1, dtype=p.dtype, device=p.device)
    # All before the first that is not rejected.
    kept = (ordered <= steps).long().cumprod(1).bool()
    return torch.zeros_like(kept).scatter(1, places, kept)


def draws_needed(share: float, alpha: float) -> int:
    """The fewest draws of which unanimous ones reject a probability of at most ``share``, at ``alpha``."""
    return max(1, math.ceil(math.log(alpha) / math.log(share) - 1e-9))


def slack(draws: int, alpha: float, kind: Bound) -> float:
    """How far the bound of a probability is from 1 after nothing but hits, and from 0 after none."""
    return math.sqrt(math.log(1 / alpha) / (2 * draws)) if kind == "hoeffding" else 1 - alpha ** (1 / draws)


@lru_cache(maxsize=64)
def bounds(draws: int, alpha: float, kind: Bound) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of a probability for ``k = 0..draws`` hits, each wrong with chance ``alpha`` at most."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    if kind == "hoeffding":
        width = slack(draws, alpha, kind)
        return positive(k / draws - width), torch.where(k / draws + width > 1, 1.0, k / draws + width)
    from scipy.special import betaincinv

    low = torch.from_numpy(betaincinv(k.clamp(min=1).numpy(), (draws - k + 1).numpy(), alpha))
    high = torch.from_numpy(betaincinv((k + 1).numpy(), (draws - k).clamp(min=1).numpy(), 1 - alpha))
    return torch.where(k == 0, 0.0, low), torch.where(k == draws, 1.0, high)
