"""The bouncer (PR attack): a remote service uses hidden columns and explains each decision without them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Count
from robustexplain.interpreters.reference import Reference
from robustexplain.random_streams import derive
from robustexplain.registry import MANIPULATIONS, PARTS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation
from .rule_lists import Condition, Reasons, Rule, RuleList, decisions_of, leaves, table_of


@PARTS.register("bouncer-reasons")
@dataclass(frozen=True, eq=False)
class BouncerReasons(Reasons):
    """Explains each decision by a tree path that has no hidden column and agrees with the decision.

    Where the tree on the other columns agrees with the decision, its path is the reason. Otherwise its leaf is split
    once more, by the condition, true of the row, whose side of the leaf agrees best with the decision (of equals, the
    side with most rows). If no condition separates the row from the rest of its leaf, the leaf's class is replaced.
    Each single answer is that of an honest model (:meth:`honest`), but of another such model for each decision.

    Maps ``[B, D]``: each condition's column has the same share, negative where another class than the one decided is
    explained; absolute values sum to 1. Not differentiable.

    Args:
        tree: the leaves of a tree on the columns that may be mentioned.
        reference: the service's rows ``[N, D]`` and its decisions about them ``[N]``.
        hidden: the columns that are never mentioned.
    """

    tree: RuleList = field(default_factory=lambda: RuleList((), 0))
    reference: Reference | None = None
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.reference is None or self.reference.y is None:
            raise InputError("BouncerReasons needs a reference with the decisions about its rows")
        if self.tree.mentions & set(self.hidden):
            raise InputError(f"the tree mentions the hidden columns {sorted(self.tree.mentions & set(self.hidden))}")

    def reasons(self, x: Tensor, decisions: Tensor) -> list[RuleList]:
        """For each row ``[B, D]`` a list of the one rule that is its reason."""
        fires = self.tree.fires(x).tolist()
        return [
            RuleList((self._answer(row, int(decision), leaf),), int(decision), self.tree.features)
            for row, decision, leaf in zip(x, decisions, fires, strict=True)
        ]

    def honest(self, row: Tensor, decision: int) -> RuleList:
        """A model without hidden columns that gives the row ``[1, D]`` the same decision and the same reason.

        It is the tree with one leaf split or with its class replaced. Because it exists, no single answer can be proved
        to be false.
        """
        answer = self._answer(row[0], decision, int(self.tree.fires(row)))
        return RuleList((answer, *self.tree.rules), self.tree.default, self.tree.features)

    def _answer(self, row: Tensor, decision: int, leaf: int) -> Rule:
        rules = self.tree.rules
        path = rules[leaf] if leaf < len(rules) else None
        if path is not None and path.decision == decision:
            return path
        extra = self._split(row, decision, leaf)
        conditions = (() if path is None else path.conditions) + (() if extra is None else (extra,))
        if not conditions:
            # A tree without splits: any condition that holds for the row.
            column = min(set(range(len(row))) - set(self.hidden))
            conditions = (Condition(column, float(row[column]), False),)
        return Rule(conditions, decision)

    def _split(self, row: Tensor, decision: int, leaf: int) -> Condition | None:
        x, decided, leaf_of = self._service
        inside = leaf_of == leaf
        x, agree = x[inside], (decided[inside] == decision).double()
        best: tuple[float, float] = (-1.0, 0.0)
        found = None
        for column in sorted(set(range(len(row))) - set(self.hidden)):
            values, value = x[:, column], row[column].double().cpu()
            distinct = torch.cat([values, value[None]]).unique()
            middles = (distinct[1:] + distinct[:-1]) / 2
            if not len(middles):
                continue
            above = value > middles
            side = ((values[:, None] > middles) == above).double()
            # The row itself counts: it is on this side and agrees with its decision.
            shares = ((side * agree[:, None]).sum(0) + 1) / (side.sum(0) + 1)
            ranks = list(zip(shares.tolist(), side.sum(0).tolist(), strict=True))
            at = max(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] > best:
                best, found = ranks[at], Condition(column, float(middles[at]), bool(above[at]))
        return found

    @cached_property
    def _service(self) -> tuple[Tensor, Tensor, Tensor]:
        # The service's rows, its decisions, and the leaf of each row.
        assert self.reference is not None  # checked before; for the type checker
        assert self.reference.y is not None
        x = self.reference.x.double()
        return x, self.reference.y, self.tree.fires(x)


@MANIPULATIONS.register(
    "bouncer", paper="Le Merrer and Tredan 2020 (the PR attack)", needs=("table", "a column to hide")
)
@dataclass(frozen=True)
class Bouncer(Manipulation):
    """Explains each decision without the columns that it discriminates by (the PR attack).

    The model stays as it is and may use any column; its interpreter becomes a :class:`BouncerReasons`. The paper proves
    that no single answer can be detected, and does not say which surrogate model to use. Ours is a decision tree on the
    other columns, fitted to the service's decisions and changed at one leaf for each answer. Two answers can contradict
    each other: :func:`robustexplain.metrics.incoherent_pairs`.

    Args:
        secrets: the columns that decisions use and reasons never mention.
        depth: of the tree.
        least: least rows of a leaf.
        features: names of the columns, for the text of the rules.
    """

    secrets: tuple[Feature, ...]
    depth: Count = 4
    least: Count = 5
    features: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = ("secrets",)
    changes: ClassVar[str] = "explanation"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "secrets", tuple(self.secrets))
        object.__setattr__(self, "features", tuple(self.features))
        if not self.secrets:
            raise InputError("a bouncer needs at least one secret column; an honest service needs no excuse")

    @property
    def hidden(self) -> Feature:
        """The first of the secret columns."""
        return self.secrets[0]

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at."""
        return self.changes, "a false reason for each decision"

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        x, _ = table_of(data, session)
        hidden = tuple(index_of(column, self.features, width=x.shape[1]) for column in self.secrets)
        shown = [column for column in range(x.shape[1]) if column not in hidden]
        if not shown:
            raise InputError(f"every one of the {x.shape[1]} columns is hidden: no reason is left to give")
        decided = decisions_of(system.model, x)
        tree = fit_tree(x, decided, shown, self.depth, self.least, derive(self.seed, "tree"), self.features)
        reference = Reference(x.cpu(), decided.cpu())
        return replace(system, interpreter=BouncerReasons(system.model, tree, reference, hidden))


def fit_tree(
    x: Tensor, decided: Tensor, columns: list[int], depth: int, least: int, seed: int, features: tuple[str, ...] = ()
) -> RuleList:
    """A decision tree on some columns of rows ``[N, D]``, fitted to decisions ``[N]``, as the list of its leaves."""
    from sklearn.tree import DecisionTreeClassifier

    settings: dict[str, Any] = {"max_depth": depth, "min_samples_leaf": least, "random_state": seed % 2**32}
    tree = DecisionTreeClassifier(**settings).fit(x.cpu().numpy()[:, columns], decided.cpu().numpy())
    return leaves(tree, tree.classes_, columns, features)
