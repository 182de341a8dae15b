"""The consistency probe: an auditor looks for two answers of a service that contradict each other."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..door import answer
from ..errors import InputError
from ..random_streams import derive

if TYPE_CHECKING:
    from ..system import System


@dataclass(frozen=True)
class Consistency:
    """The result of the probe.

    Args:
        pairs: ``[P, 2, D]``, the incoherent pairs: a profile, and one that its explanation does not separate from it.
        rows: ``[P, 2]``, for each pair the row of the first profile and the row whose values replaced some of its own.
        asked: the number of pairs that were tried.
        queries: the number of rows that the service decided on.
    """

    pairs: Tensor
    rows: Tensor
    asked: int
    queries: int

    @property
    def share(self) -> float:
        """Share of the pairs tried that are incoherent."""
        return len(self.pairs) / self.asked

    @property
    def expected(self) -> float:
        """Pairs to try, on average, until an incoherent one is met (each drawn anew); infinite if there is none."""
        return 1 / self.share if len(self.pairs) else math.inf

    def chance(self, pairs: int) -> float:
        """The probability of meeting an incoherent pair within so many, each drawn anew: ``1 - (1 - share)^pairs``."""
        return 1 - (1 - self.share) ** pairs


@torch.no_grad()
def incoherent_pairs(
    system: System,
    x: Tensor,
    swap: Sequence[int] | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 256,
) -> Consistency:
    """Look for pairs of profiles that a service decides differently although its explanations do not distinguish them.

    For profiles i and j the auditor queries i, and i with some values of j (Le Merrer and Tredan 2020, section
    4). The pair is incoherent if the two are decided differently although they agree on every column that the
    explanation of one of them uses (a column whose map is not 0): that explanation is then incomplete. A service whose
    explanations are sufficient, such as the path through its own decision tree, has no such pair. Attributions without
    exact zeros use every column and are never incoherent. For explanations not meant to be sufficient (a gradient with
    zeros), a pair shows that they are incomplete, not that they are wrong.

    The authors' experiment swaps the columns that it knows to be discriminatory and takes every change of the decision
    for an incoherent pair, whatever the explanations are; with explanations that never use those columns this is equal.

    Args:
        system: the service; only its outputs are used.
        x: profiles ``[N, D]``, at least two.
        swap: columns that take the values of j; default, for each i, all that the explanation of i does not use.
        limit: the number of pairs to try, drawn without replacement from the ``N (N - 1)`` ordered ones; default all.
        seed: of the draw.
        batch: rows in a pass.

    Raises:
        InputError: fewer than two rows, a column that does not exist, a limit below 1.
    """
    _check(x, swap, limit)
    first = _ask(system, x, batch)
    i, j = (rows.to(x.device) for rows in _drawn(len(x), limit, seed))
    if swap is None:
        moved = ~first[1][i]
    else:
        moved = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        moved[list(swap)] = True
        moved = moved.expand(len(i), -1)
    changed = torch.where(moved, x[j], x[i])
    # A profile that equals the original needs no query.
    new = (changed != x[i]).any(1)
    asked, start, put = len(i), i[new], torch.stack([i, j], 1)[new]
    changed = changed[new]
    if not len(changed):
        return Consistency(x.new_zeros(0, 2, x.shape[1]), put, asked, len(x))
    differs = x[start] != changed
    caught = _decided(system, changed, batch) != first[0][start]
    # An explanation costs far more than a decision: asked is only where the one at hand tells the two apart.
    told = caught & (differs & first[1][start]).any(1)
    if told.any():
        caught[told] = ~(differs[told] & _ask(system, changed[told], batch)[1]).any(1)
    pairs = torch.stack([x[start], changed], 1)[caught]
    return Consistency(pairs, put[caught], asked, len(x) + len(changed))


def _decided(system: System, x: Tensor, batch: int) -> Tensor:
    return torch.cat([answer(system.model, part).argmax(1) for part in x.split(batch)])


def _ask(system: System, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    # The decision, [N], and which columns the explanation uses, bool [N, D].
    answers = [system(part) for part in x.split(batch)]
    return torch.cat([a.prediction for a in answers]), torch.cat([a.maps for a in answers]) != 0


def _drawn(rows: int, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    total = rows * (rows - 1)
    if limit is None or limit >= total:
        order = torch.arange(total)
    else:
        # Python draws distinct numbers of a range without writing the range out.
        order = torch.tensor(random.Random(derive(seed, "pairs")).sample(range(total), limit))
    i, j = order // (rows - 1), order % (rows - 1)
    return i, j + (j >= i).long()


def _check(x: Tensor, swap: Sequence[int] | None, limit: int | None) -> None:
    checks.inputs(x)
    if x.dim() != 2 or len(x) < 2:
        raise InputError(f"x must hold at least two profiles [N, D], got {list(x.shape)}")
    bad = [column for column in swap or () if not 0 <= column < x.shape[1]]
    if bad or (swap is not None and not len(swap)):
        raise InputError(f"swap must name columns 0 to {x.shape[1] - 1}, got {list(swap or ())!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit!r}")
