"""Choice of the surrogate shown: the least unfair of those that are faithful enough, for all rows or for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Count, Natural, check_fields
from robustexplain.interpreters.reference import Reference
from robustexplain.metrics.fairness import Unfairness, unfairness
from robustexplain.random_streams import derive
from robustexplain.registry import PARTS

from .rule_lists import Reasons, RuleList, decisions_of
from .rule_search import enumerate_lists, enumerate_trees
from .rule_table import Antecedents, RuleSearch, Target


@dataclass(frozen=True)
class Candidate:
    """A rule list (or a tree's leaves) with its fidelity and unfairness on some rows.

    Args:
        rules: the surrogate.
        fidelity: share of the rows on which it agrees with the black box.
        unfairness: of its own decisions.
    """

    rules: RuleList
    fidelity: float
    unfairness: float


@PARTS.register("laundry")
@dataclass(frozen=True)
class SurrogateChooser:
    """Enumerates surrogates of a black box and picks the one to show; fields: see :class:`LaundryML`."""

    sensitive: int
    other: int | None
    hidden: tuple[int, ...]
    threshold: float
    unfairness: Unfairness
    fidelity: float
    surrogate: Literal["rules", "tree"]
    honest: bool
    search: RuleSearch
    features: tuple[str, ...]
    seed: Natural

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "features", tuple(self.features))

    def groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``x`` ``[N, D]`` in the sensitive group, and in the one it is compared with: bool ``[N]`` each."""
        member = x[:, self.sensitive] > self.threshold
        return member, ~member if self.other is None else (x[:, self.other] > self.threshold) & ~member

    def columns(self, width: int) -> list[int]:
        """The columns that an explanation may mention."""
        secret = () if self.honest else (self.sensitive, self.other, *self.hidden)
        return [column for column in range(width) if column not in secret]

    def enumerate(self, x: Tensor, labels: Tensor, decided: Tensor) -> list[Candidate]:
        """All surrogates found, with fidelity and unfairness on these rows."""
        target = Target(x, decided, labels, *self.groups(x))
        columns = self.columns(x.shape[1])
        if self.surrogate == "tree":
            found = enumerate_trees(target, columns, self.search, derive(self.seed, "trees"), self.features)
        else:
            table = Antecedents.of(target, columns, self.search)
            betas = (0.0,) if self.honest else self.search.betas
            lists = [f for beta in betas for f in enumerate_lists(table, beta, self.unfairness, self.search)[0]]
            found = [table.rule_list(f.rules, f.default, self.features) for f in lists]
        return [self.candidate(rules, target) for rules in dict.fromkeys(found)]

    def candidate(self, rules: RuleList, target: Target) -> Candidate:
        """A rule list with its fidelity and unfairness on the target's rows."""
        decisions = rules(target.x)
        faithful = float((decisions == target.decided).double().mean())
        if not target.member.any() or not target.other.any():
            # A neighbourhood of one group only: there is no unfairness between groups.
            return Candidate(rules, faithful, 0.0)
        return Candidate(
            rules, faithful, unfairness(decisions, target.labels, target.member, target.other, self.unfairness)
        )

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        """The least unfair of those that are faithful enough (the honest control: the most faithful).

        Raises:
            UnsupportedModelError: none is faithful enough.
        """
        # A constant list may be faithful and is always fair, but it explains nothing.
        informative = [c for c in candidates if not c.rules.constant]
        closest = max(informative, key=lambda c: (c.fidelity, -len(c.rules)), default=None)
        if closest is None or (closest.fidelity < self.fidelity and not self.honest):
            reached = "there is none at all" if closest is None else f"the closest agrees on {closest.fidelity:.1%}"
            raise UnsupportedModelError(
                f"no explanation agrees with the model on {self.fidelity:.1%} of the rows; {reached}: ask for less "
                "fidelity, or allow more with search (max_rules, width, cuts, nodes, smaller betas)"
            )
        if self.honest:
            return closest
        faithful = [c for c in informative if c.fidelity >= self.fidelity]
        return min(faithful, key=lambda c: (c.unfairness, -c.fidelity, len(c.rules)))


@PARTS.register("local-rule-reasons")
@dataclass(frozen=True, eq=False)
class LocalRuleReasons(Reasons):
    """Explains each decision by a rule list chosen on the row's neighbourhood (LaundryML, outcome explanation).

    The list agrees with the model on the row itself. Each row needs its own search. Maps are those of
    :class:`RuleReasons`. Not differentiable.

    Args:
        laundry: enumerates surrogates and picks one.
        reference: the adversary's rows ``[N, D]`` and labels, among which neighbours are found.
        neighbours: how many, beside the row itself.
    """

    laundry: SurrogateChooser | None = None
    reference: Reference | None = None
    neighbours: Count = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.laundry is None or self.reference is None or self.reference.y is None:
            raise InputError("LocalRuleReasons needs a laundry and a reference with labels")

    def reasons(self, x: Tensor, decisions: Tensor) -> list[RuleList]:
        """A list for each row ``[B, D]``."""
        return [self._reason(row[None], decision[None]) for row, decision in zip(x, decisions, strict=True)]

    def _reason(self, row: Tensor, decision: Tensor) -> RuleList:
        assert self.laundry is not None  # checked before; for the type checker
        assert self.reference is not None
        assert self.reference.y is not None
        rows, labels = self.reference.like(row), self.reference.y.to(row.device)
        # Columns are standardised; a constant column has no distances, whatever the explained row has in it.
        spread = rows.double().std(0)
        apart = (rows - row).double() / spread.masked_fill(spread == 0, 1)
        apart[:, spread == 0] = 0
        # Distances leave the group columns out: rows of the other group can be neighbours.
        apart[:, [c for c in (self.laundry.sensitive, self.laundry.other) if c is not None]] = 0
        near = (apart**2).sum(1).argsort(stable=True)[: self.neighbours]
        # The true label of the explained row is not known: the decision is used for it.
        x = torch.cat([row, rows[near]])
        decided = torch.cat([decision, self._decided.to(row.device)[near]])
        agreeing: list[Candidate] = []
        try:
            found = self.laundry.enumerate(x, torch.cat([decision, labels[near]]), decided)
            agreeing = [c for c in found if int(c.rules(row)) == int(decision)]
            return self.laundry.pick(agreeing).rules
        except UnsupportedModelError:
            # No antecedent separates the neighbours, or no list is faithful: the most faithful that agrees on the row.
            closest = max(agreeing, key=lambda c: (c.fidelity, -len(c.rules)), default=None)
            return RuleList((), int(decision), self.laundry.features) if closest is None else closest.rules

    @cached_property
    def _decided(self) -> Tensor:
        assert self.reference is not None
        return decisions_of(self.model, self.reference.x)
