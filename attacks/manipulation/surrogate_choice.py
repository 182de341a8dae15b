"""Which of many explanations is shown: the least unfair of those that are faithful enough, for all rows or for one."""

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
    """A rule list (or a tree's leaves) and how it does against the black box on some rows.

    Args:
        rules: what a user would be shown.
        fidelity: share of the rows that it decides as the black box does.
        unfairness: of its own decisions.
    """

    rules: RuleList
    fidelity: float
    unfairness: float


@PARTS.register("laundry")
@dataclass(frozen=True)
class SurrogateChooser:
    """Enumerates explanations of a black box's decisions and picks the one to show; see :class:`LaundryML`."""

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
        """Who of ``x`` ``[N, D]`` belongs to the sensitive group, who to the one it is held against: bool ``[N]``."""
        member = x[:, self.sensitive] > self.threshold
        return member, ~member if self.other is None else (x[:, self.other] > self.threshold) & ~member

    def columns(self, width: int) -> list[int]:
        """The columns that an explanation may speak of."""
        secret = () if self.honest else (self.sensitive, self.other, *self.hidden)
        return [column for column in range(width) if column not in secret]

    def enumerate(self, x: Tensor, labels: Tensor, decided: Tensor) -> list[Candidate]:
        """Everything that was found, with its fidelity and unfairness on these very rows."""
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
        """A candidate against the black box's decisions."""
        said = rules(target.x)
        faithful = float((said == target.decided).double().mean())
        if not target.member.any() or not target.other.any():
            # A neighbourhood of one group only: nobody is treated differently in it.
            return Candidate(rules, faithful, 0.0)
        return Candidate(rules, faithful, unfairness(said, target.labels, target.member, target.other, self.unfairness))

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        """The least unfair of those that are faithful enough (the honest control: the most faithful).

        Raises:
            UnsupportedModelError: none is faithful enough.
        """
        # A list that decides everything alike may be faithful and is always fair, but it explains nothing.
        speaking = [c for c in candidates if not c.rules.constant]
        closest = max(speaking, key=lambda c: (c.fidelity, -len(c.rules)), default=None)
        if closest is None or (closest.fidelity < self.fidelity and not self.honest):
            reached = "there is none at all" if closest is None else f"the closest agrees on {closest.fidelity:.1%}"
            raise UnsupportedModelError(
                f"no explanation agrees with the model on {self.fidelity:.1%} of the rows; {reached}: ask for less "
                "fidelity, or allow more with search (max_rules, width, cuts, nodes, smaller betas)"
            )
        if self.honest:
            return closest
        faithful = [c for c in speaking if c.fidelity >= self.fidelity]
        return min(faithful, key=lambda c: (c.unfairness, -c.fidelity, len(c.rules)))


@PARTS.register("local-rule-reasons")
@dataclass(frozen=True, eq=False)
class LocalRuleReasons(Reasons):
    """Explains each decision by a rule list of its own, laundered on the row's neighbourhood (outcome explanation).

    The list agrees with the model about the row itself. Each row costs a search. Maps are those of
    :class:`RuleReasons`. Not differentiable.

    Args:
        laundry: enumerates and picks.
        reference: the adversary's rows ``[N, D]`` and labels, neighbours among them.
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
        assert self.laundry is not None  # refused at the door; for the type checker
        assert self.reference is not None
        assert self.reference.y is not None
        rows, labels = self.reference.like(row), self.reference.y.to(row.device)
        # Columns in their own units are not comparable; a constant one tells nobody apart.
        spread = rows.std(0)
        apart = (rows - row) / spread.masked_fill(spread == 0, 1)
        # People of the other group are neighbours if they are alike in everything else.
        apart[:, [c for c in (self.laundry.sensitive, self.laundry.other) if c is not None]] = 0
        near = (apart**2).sum(1).argsort(stable=True)[: self.neighbours]
        # What becomes of the person explained is not known yet: the decision stands for it.
        x = torch.cat([row, rows[near]])
        decided = torch.cat([decision, self._decided.to(row.device)[near]])
        agreeing: list[Candidate] = []
        try:
            found = self.laundry.enumerate(x, torch.cat([decision, labels[near]]), decided)
            agreeing = [c for c in found if int(c.rules(row)) == int(decision)]
            return self.laundry.pick(agreeing).rules
        except UnsupportedModelError:
            # Nothing to tell the neighbours apart by, or nothing faithful: the closest that agrees about the row.
            closest = max(agreeing, key=lambda c: (c.fidelity, -len(c.rules)), default=None)
            return RuleList((), int(decision), self.laundry.features) if closest is None else closest.rules

    @cached_property
    def _decided(self) -> Tensor:
        assert self.reference is not None
        return decisions_of(
            self.model, self.reference.x.to(next(iter(self.model.parameters()), self.reference.x).device)
        )
