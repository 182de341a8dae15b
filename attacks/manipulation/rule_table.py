"""Input of the search for rule lists: its settings, the rows with decisions, and the antecedents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustexplain.errors import FieldError, UnsupportedModelError
from robustexplain.fields import Count, Fraction, NonNegative, check_fields
from robustexplain.registry import PARTS

from .rule_lists import Condition, Rule, RuleList

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ONE, ZERO, MINOR = 4, 5, 6
"""Columns of a table's cells behind those of the two groups: decided 1, decided 0, rows of the rarer decision."""


@PARTS.register("rule-search")
@dataclass(frozen=True)
class RuleSearch:
    """How rule lists are enumerated.

    Args:
        betas: weights of unfairness in the objective, one enumeration each (the paper's six).
        penalty: the paper's ``lambda``, per rule.
        models: lists (or trees) enumerated for each beta.
        max_rules: most rules of a list (leaves of a tree).
        width: most conditions of a rule, 1 or 2 (lists only).
        cuts: most thresholds of a column with more than two values, at its quantiles.
        support: least share of the rows for which a rule's conditions hold.
        nodes: most prefixes expanded for each beta; the search is exact if it needs no more.
    """

    betas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 0.7, 0.9)
    penalty: NonNegative = 0.005
    models: Count = 50
    max_rules: Count = 6
    width: Count = 1
    cuts: Count = 7
    support: Fraction = 0.01
    nodes: Count = 3000

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if not self.betas or not all(0 <= beta <= 1 for beta in self.betas):
            raise FieldError(type(self).__name__, "betas", f"must be weights between 0 and 1, got {self.betas!r}")
        if self.width > 2:
            raise FieldError(type(self).__name__, "width", f"must be 1 or 2, got {self.width!r}")


@dataclass(frozen=True)
class Target:
    """The rows, with decisions, labels and groups, on which lists are searched and compared.

    Args:
        x: rows ``[N, D]``.
        decided: ``[N]``, 0 or 1: the black box's decisions.
        labels: ``[N]``, 0 or 1: true labels.
        member: bool ``[N]``, the sensitive group.
        other: bool ``[N]``, the group that it is compared with.
    """

    x: Tensor
    decided: Tensor
    labels: Tensor
    member: Tensor
    other: Tensor


@dataclass(frozen=True)
class Antecedents:
    """The antecedents and where they hold; rows with the same values of all antecedents are merged to one kind.

    Args:
        conditions: the conditions of each of ``P`` antecedents.
        held: ``[P, U]``, whether an antecedent holds on a kind of row.
        cells: ``[U, 7]``, number of rows of each kind: of each (group, label) in four columns, then decided 1, decided
            0, and of the rarer decision, on which every list is wrong.
    """

    conditions: tuple[tuple[Condition, ...], ...]
    held: Bools
    cells: Floats

    @cached_property
    def weights(self) -> Floats:
        """``held`` as float64, since products of bool and float arrays are slow."""
        return self.held.astype(np.float64)

    @classmethod
    def of(cls, target: Target, columns: Sequence[int], search: RuleSearch) -> Antecedents:
        """Binarise the columns, combine conditions, merge equal rows."""
        singles = [
            condition for column in columns for condition in _conditions(target.x[:, column], column, search.cuts)
        ]
        choices: list[tuple[Condition, ...]] = [(condition,) for condition in singles]
        if search.width == 2:
            choices += [(a, b) for a, b in combinations(singles, 2) if (a.column, a.above) != (b.column, b.above)]
        masks = {c: c.holds(target.x).cpu().numpy() for c in singles}
        kept: dict[bytes, tuple[tuple[Condition, ...], Bools]] = {}
        for conditions in choices:
            mask = np.logical_and.reduce([masks[c] for c in conditions])
            if search.support <= mask.mean() < 1 and mask.any():
                kept.setdefault(mask.tobytes(), (conditions, mask))
        if not kept:
            raise UnsupportedModelError(f"no condition on columns {list(columns)} holds for some rows and not for all")
        held = np.stack([mask for _, mask in kept.values()])
        kinds, index = np.unique(held.T, axis=0, return_inverse=True)
        return cls(
            tuple(conditions for conditions, _ in kept.values()), kinds.T, _cells(target, index.ravel(), len(kinds))
        )

    def rule_list(self, rules: Sequence[tuple[int, bool]], default: bool, features: tuple[str, ...]) -> RuleList:
        """The rule list of antecedents given by index, each with its decision."""
        return RuleList(tuple(Rule(self.conditions[p], int(q)) for p, q in rules), int(default), features)


def _conditions(values: Tensor, column: int, cuts: int) -> list[Condition]:
    distinct = values.double().unique()
    if len(distinct) < 2:
        return []
    middles = (distinct[1:] + distinct[:-1]) / 2
    if len(middles) > cuts:
        levels = values.double().quantile(torch.arange(1, cuts + 1, device=values.device).double() / (cuts + 1))
        # A quantile of few distinct values is one of them: the cut lies just above it.
        middles = middles[torch.searchsorted(distinct, levels, right=True).sub(1).clamp(0, len(middles) - 1)].unique()
    return [Condition(column, float(middle), above) for middle in middles for above in (False, True)]


def _cells(target: Target, kind: NDArray[Any], kinds: int) -> Floats:
    decided, labels = (values.cpu().numpy().astype(bool) for values in (target.decided, target.labels))
    member, other = target.member.cpu().numpy(), target.other.cpu().numpy()
    which = [member & ~labels, member & labels, other & ~labels, other & labels, decided, ~decided]
    cells = np.stack([np.bincount(kind, weights=rows, minlength=kinds) for rows in which], 1)
    return np.concatenate([cells, cells[:, [ONE, ZERO]].min(1, keepdims=True)], 1)
