"""The search for rule lists: branch and bound over binarised columns, and decision trees over settings."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from robustexplain.metrics.fairness import Unfairness, gap

from .rule_lists import RuleList, leaves
from .rule_table import MINOR, ONE, ZERO, Antecedents, Bools, Floats, RuleSearch, Target


@dataclass(frozen=True)
class RankedList:
    """A rule list and its objective on the rows that it was found on.

    Args:
        rules: indices of antecedents, each with its decision.
        default: the decision where no rule applies.
        objective: ``(1 - beta) misclassification + beta unfairness + lambda K``.
    """

    rules: tuple[tuple[int, bool], ...]
    default: bool
    objective: float


@dataclass(frozen=True)
class _Prefix:
    rules: tuple[tuple[int, bool], ...]
    rest: Bools
    """Kinds of rows that no rule of the prefix holds for."""
    ones: Bools
    """Kinds of rows that the prefix decides 1."""
    errors: float
    positive: Floats
    """How many rows of each (group, label) the prefix decides 1, ``[4]``."""


def enumerate_lists(
    table: Antecedents, beta: float, of: Unfairness, search: RuleSearch
) -> tuple[list[RankedList], bool]:
    """The best ``search.models`` rule lists by ``(1 - beta) misc + beta unfairness + lambda K``, best first.

    Each rule decides by majority of the rows that it catches (a tie: 1), as in CORELS. Prefixes are expanded in the
    order of their objectives. A prefix whose bound
    ``(1 - beta) (errors so far + rows that no list can match) + lambda (K + 1)`` is no better than the worst list kept
    is dropped. Of two lists with the same decisions on all rows, the shorter is kept; prefixes that catch the same rows
    and decide them alike are treated as one.

    Returns:
        The lists, and whether the search was exhausted, so that they are provably the best.
    """
    everything = table.cells.sum(0)
    rows = everything[ONE] + everything[ZERO]
    best = _Best(search.models)
    root = _Prefix((), np.ones(table.held.shape[1], bool), np.zeros(table.held.shape[1], bool), 0.0, np.zeros(4))
    default = bool(everything[ONE] >= everything[ZERO])
    alone = gap(_counts(everything[:4] * default, everything[:4]), of)
    missed = float(min(everything[ONE], everything[ZERO]))
    best.add(
        np.full(len(root.rest), default), RankedList((), default, (1 - beta) * missed / rows + beta * float(alone))
    )
    queue: list[tuple[float, int, float, _Prefix]] = [(0.0, 0, 0.0, root)]
    known: dict[bytes, int] = {}
    order, expanded = count(1), 0
    while queue and expanded < search.nodes:
        _, _, bound, prefix = heapq.heappop(queue)
        if bound >= best.worst:
            continue
        expanded += 1
        length = len(prefix.rules) + 1
        step = _Extension.of(table, prefix, everything)
        unfair = gap(_counts(step.positive + step.default[:, None] * step.left[:, :4], everything[:4]), of)
        objective = (1 - beta) * (step.errors + step.left[:, [ONE, ZERO]].min(1)) / rows
        objective = objective + beta * unfair + search.penalty * length
        bounds = (1 - beta) * (step.errors + step.left[:, MINOR]) / rows + search.penalty * (length + 1)
        for p in np.flatnonzero(step.useful & (np.minimum(objective, bounds) < best.worst)):
            child, all_ones = step.child(table, prefix, int(p))
            if objective[p] < best.worst:
                best.add(all_ones, RankedList(child.rules, bool(step.default[p]), float(objective[p])))
            if length < search.max_rules and bounds[p] < best.worst:
                key = np.packbits(child.rest).tobytes() + np.packbits(child.ones).tobytes()
                if known.get(key, length + 1) > length:
                    known[key] = length
                    heapq.heappush(queue, (float(objective[p]), next(order), float(bounds[p]), child))
    return best.found(), not any(bound < best.worst for _, _, bound, _ in queue)


@dataclass(frozen=True)
class _Extension:
    """A prefix extended by each of the ``P`` antecedents at once; arrays over these."""

    left: Floats
    decide: Bools
    default: Bools
    errors: Floats
    positive: Floats
    useful: Bools

    @classmethod
    def of(cls, table: Antecedents, prefix: _Prefix, everything: Floats) -> _Extension:
        open_cells = table.cells * prefix.rest[:, None]
        caught = table.weights @ open_cells
        left = open_cells.sum(0) - caught
        decide, default = caught[:, ONE] >= caught[:, ZERO], left[:, ONE] >= left[:, ZERO]
        errors = prefix.errors + caught[:, [ONE, ZERO]].min(1)
        positive = prefix.positive + decide[:, None] * caught[:, :4]
        useful = (caught[:, ONE] + caught[:, ZERO] > 0) & (left[:, ONE] + left[:, ZERO] > 0)
        return cls(left, decide, default, errors, positive, useful)

    def child(self, table: Antecedents, prefix: _Prefix, p: int) -> tuple[_Prefix, Bools]:
        """The longer prefix, and the kinds of rows that it decides 1 as a complete list with its default."""
        now, decision = prefix.rest & table.held[p], bool(self.decide[p])
        rest, ones = prefix.rest & ~now, prefix.ones | now if decision else prefix.ones
        child = _Prefix((*prefix.rules, (p, decision)), rest, ones, float(self.errors[p]), self.positive[p])
        return child, ones | rest if self.default[p] else ones


class _Best:
    """The best lists so far, one for each set of decisions on the rows."""

    def __init__(self, size: int) -> None:
        self.size, self.worst = size, float("inf")
        self._kept: dict[bytes, RankedList] = {}

    def add(self, ones: Bools, found: RankedList) -> None:
        key = np.packbits(ones).tobytes()
        if key not in self._kept or found.objective < self._kept[key].objective:
            self._kept[key] = found
        if len(self._kept) > self.size:
            del self._kept[max(self._kept, key=lambda k: self._kept[k].objective)]
        if len(self._kept) == self.size:
            self.worst = max(kept.objective for kept in self._kept.values())

    def found(self) -> list[RankedList]:
        return sorted(self._kept.values(), key=lambda found: (found.objective, len(found.rules)))


def _counts(positive: Floats, everybody: Floats) -> Floats:
    """``[..., 4]`` decided 1 of ``[4]`` rows of (group, label), as ``[..., group, label, decision]``."""
    counts: Floats = np.stack([everybody - positive, positive], -1).reshape(*positive.shape[:-1], 2, 2, 2)
    return counts


def enumerate_trees(
    target: Target, columns: Sequence[int], search: RuleSearch, seed: int, features: tuple[str, ...]
) -> list[RuleList]:
    """Decision trees fitted to the decisions, as lists of their leaves.

    They differ in the number of leaves, the least rows a leaf, the columns that a split may look at, and the draws.
    """
    from sklearn.tree import DecisionTreeClassifier

    rng = np.random.default_rng(seed)
    x, decided = target.x.cpu().numpy()[:, list(columns)], target.decided.cpu().numpy()
    found = []
    for _ in range(search.models * len(search.betas)):
        tree = DecisionTreeClassifier(
            max_leaf_nodes=int(rng.integers(2, max(search.max_rules, 2) + 1)),
            min_samples_leaf=max(1, round(search.support * len(x))),
            max_features=float(rng.choice([0.3, 0.6, 1.0])),
            random_state=int(rng.integers(2**31)),
        ).fit(x, decided)
        found.append(leaves(tree, tree.classes_, list(columns), features))
    return found
