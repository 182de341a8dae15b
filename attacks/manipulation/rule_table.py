"""What rule lists are made of: settings of the search, rows to be matched, and the rules to choose from."""

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
"""Columns of a table's cells behind those of the two groups: decided 1, decided 0, never to be matched."""


@PARTS.register("rule-search")
@dataclass(frozen=True)
class RuleSearch:
    """How rule lists are enumerated.

    Args:
        betas: weights of unfairness in the objective, one enumeration each (the paper's six).
        penalty: the paper's lambda, the price of a rule.
        models: lists (or trees) enumerated for each beta.
        max_rules: rules a list (leaves a tree).
        width: conditions a rule, at most 2 (lists only).
        cuts: thresholds a column of more than two values, at its quantiles.
        support: least share of the rows that a rule's conditions hold for.
        nodes: prefixes expanded for each beta; a search that needs fewer is exact.
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
    """What lists are held against.

    Args:
        x: rows ``[N, D]``.
        decided: ``[N]``, 0 or 1: the black box's decisions.
        labels: ``[N]``, 0 or 1: what was true.
        member: bool ``[N]``.
        other: bool ``[N]``.
    """

    x: Tensor
    decided: Tensor
    labels: Tensor
    member: Tensor
    other: Tensor


@dataclass(frozen=True)
class Antecedents:
    """The rules to choose from and where they hold, on rows that no rule tells apart merged into one.

    Args:
        conditions: the conditions of each of P.
        held: ``[P, U]``, whether it holds on a kind of row.
        cells: ``[U, 7]``, rows of each kind: those of (group, label) in four columns, then those decided 1, decided 0,
            and those of the rarer decision, which no list can match.
    """

    conditions: tuple[tuple[Condition, ...], ...]
    held: Bools
    cells: Floats

    @cached_property
    def weights(self) -> Floats:
        """``held`` as numbers: a product of bools with numbers is slow."""
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
        """The list of antecedents by index, each with its decision."""
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
