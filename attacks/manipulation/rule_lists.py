"""Rule lists, and interpreters that explain a decision by one of their rules."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustexplain.checks import Kind
from robustexplain.door import answer, suited
from robustexplain.errors import InputError
from robustexplain.fields import Natural, check_fields
from robustexplain.interpreters.base import Explanation, Interpreter, explained_class
from robustexplain.registry import PARTS
from robustexplain.training import Samples, Session


@PARTS.register("rule-condition")
@dataclass(frozen=True)
class Condition:
    """One column above a threshold, or not above it.

    Args:
        column: the index of the column.
        threshold: in the column's own units.
        above: whether it holds above ``threshold``; else at or below it.
    """

    column: Natural
    threshold: float
    above: bool

    def __post_init__(self) -> None:
        check_fields(self)

    def holds(self, x: Tensor) -> Tensor:
        """Bool ``[B]`` for rows ``[B, D]``; in float64, for thresholds between adjacent float32 values."""
        if self.column >= x.shape[1]:
            raise InputError(f"the rules use column {self.column}, but rows have {x.shape[1]} columns")
        over = x[:, self.column].double() > self.threshold
        return over if self.above else ~over

    def text(self, features: tuple[str, ...] = ()) -> str:
        """Such as ``age <= 24.5``."""
        name = features[self.column] if self.column < len(features) else f"x[{self.column}]"
        return f"{name} {'>' if self.above else '<='} {self.threshold:.6g}"


@PARTS.register("rule")
@dataclass(frozen=True)
class Rule:
    """IF all conditions hold THEN a class.

    Args:
        conditions: at least one.
        decision: the class.
    """

    conditions: tuple[Condition, ...]
    decision: Natural

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not self.conditions:
            raise InputError("a rule needs at least one condition")

    def holds(self, x: Tensor) -> Tensor:
        """Bool ``[B]`` for rows ``[B, D]``."""
        return torch.stack([condition.holds(x) for condition in self.conditions]).all(0)

    def text(self, features: tuple[str, ...] = ()) -> str:
        """Such as ``IF age <= 24.5 AND priors > 3 THEN 1``."""
        return f"IF {' AND '.join(c.text(features) for c in self.conditions)} THEN {self.decision}"


@PARTS.register("rule-list")
@dataclass(frozen=True)
class RuleList:
    """IF ... ELSE IF ... ELSE: the first rule that applies decides (Angelino et al. 2018).

    A decision tree is the list of its leaves, of which exactly one applies.

    Args:
        rules: in order.
        default: the class where no rule applies.
        features: names of the columns, for the text.
        exclusive: whether no two rules can apply to one row, so that a rule says by itself why it applied.
    """

    rules: tuple[Rule, ...]
    default: Natural
    features: tuple[str, ...] = ()
    exclusive: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "features", tuple(self.features))

    def __len__(self) -> int:
        return len(self.rules)

    def fires(self, x: Tensor) -> Tensor:
        """``[B]`` for rows ``[B, D]``: the index of the rule that decides; ``len(rules)`` is the default."""
        holds = [rule.holds(x) for rule in self.rules]
        last = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return torch.stack([*holds, last]).int().argmax(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The classes ``[B]`` of rows ``[B, D]``."""
        decisions = torch.tensor([*(rule.decision for rule in self.rules), self.default], device=x.device)
        return decisions[self.fires(x)]

    @property
    def mentions(self) -> frozenset[int]:
        """The columns that occur in any rule."""
        return frozenset(c.column for rule in self.rules for c in rule.conditions)

    @property
    def constant(self) -> bool:
        """Whether every row gets the same decision."""
        return len({self.default, *(rule.decision for rule in self.rules)}) == 1

    def shares(self, columns: int, like: Tensor) -> Tensor:
        """``[len(rules) + 1, D]``: for each rule and the default, each column's share of the conditions checked.

        These are the rule's own conditions and, unless the rules are exclusive, those of all rules before it, which did
        not apply. Rows sum to 1 (to 0 for the default of a list without rules).
        """
        counts = like.new_zeros(len(self.rules) + 1, columns)
        for index, rule in enumerate(self.rules):
            for condition in rule.conditions:
                counts[index, condition.column] += 1
        if not self.exclusive:
            counts = counts.cumsum(0)
        return counts / counts.sum(1, keepdim=True).clamp_min(1)

    def text(self) -> str:
        """The text shown to a user, one line per rule."""
        lines = [
            ("" if i == 0 or self.exclusive else "ELSE ") + r.text(self.features) for i, r in enumerate(self.rules)
        ]
        return "\n".join([*lines, f"ELSE {self.default}"] if not self.exclusive or not lines else lines)


@dataclass(frozen=True, eq=False)
class Reasons(Interpreter):
    """Interpreter that gives a rule as the reason of each decision; maps mark the columns in its conditions."""

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)

    @abstractmethod
    def reasons(self, x: Tensor, decisions: Tensor) -> list[RuleList]:
        """The rule list shown for each row ``[B, D]`` with its decision ``decisions`` ``[B]``."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        with torch.no_grad():
            logits = answer(self.model, x)
            classes = explained_class(logits, target)
            shown = self.reasons(x.detach(), logits.argmax(1))
            maps = torch.cat([_signed(rules, x[i : i + 1], classes[i]) for i, rules in enumerate(shown)])
        return Explanation(logits, maps)


def _signed(rules: RuleList, row: Tensor, explained: Tensor) -> Tensor:
    share = rules.shares(row.shape[1], row)[rules.fires(row)]
    return torch.where(rules(row) == explained, share, -share)


@PARTS.register("rule-reasons")
@dataclass(frozen=True, eq=False)
class RuleReasons(Reasons):
    """Explains every decision by the rule of one list that applies to it.

    Maps ``[B, D]``: each column's share of the conditions checked (:meth:`RuleList.shares`), negative where the list
    decides for another class than the one explained. Absolute values sum to 1. Not differentiable.

    Args:
        rules: the surrogate of the model.
    """

    rules: RuleList = field(default_factory=lambda: RuleList((), 0))

    def reasons(self, x: Tensor, decisions: Tensor) -> list[RuleList]:
        """The same list for every row."""
        return [self.rules] * len(x)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        with torch.no_grad():
            logits = answer(self.model, x)
            share = self.rules.shares(x.shape[1], x)[self.rules.fires(x)]
            agrees = self.rules(x) == explained_class(logits, target)
        return Explanation(logits, torch.where(agrees[:, None], share, -share))


def leaves(tree: Any, classes: Any, columns: list[int], features: tuple[str, ...] = ()) -> RuleList:
    """A fitted scikit-learn decision tree as the list of its leaves.

    Args:
        tree: a ``DecisionTreeClassifier``, fitted on some columns.
        classes: the class of each of the tree's outputs.
        columns: the index, in whole rows, of each column that it was fitted on.
        features: names of the columns of whole rows.
    """
    nodes = tree.tree_
    rules: list[Rule] = []

    def walk(node: int, path: dict[tuple[int, bool], float]) -> None:
        if nodes.children_left[node] == -1:
            conditions = tuple(Condition(column, value, above) for (column, above), value in path.items())
            decision = int(classes[nodes.value[node][0].argmax()])
            if conditions:
                rules.append(Rule(conditions, decision))
            else:
                root_decision.append(decision)
            return
        column, threshold = columns[nodes.feature[node]], float(nodes.threshold[node])
        for above, child in ((False, nodes.children_left[node]), (True, nodes.children_right[node])):
            # A later condition on the same side of a column is the tighter one: it replaces the earlier.
            walk(int(child), {**path, (column, above): threshold})

    root_decision: list[int] = []  # of a tree without splits
    walk(0, {})
    return RuleList(tuple(rules), root_decision[0] if root_decision else rules[-1].decision, features, exclusive=True)


@torch.no_grad()
def decisions_of(model: nn.Module, x: Tensor, size: int = 1024) -> Tensor:
    """``[N]``: the classes that a model predicts for rows ``[N, D]``, in batches of ``size``; on the rows' device."""
    return torch.cat([answer(model, suited(model, part)).argmax(1).to(x.device) for part in x.split(size)])


def table_of(data: Samples | None, session: Session) -> tuple[Tensor, Tensor]:
    """The adversary's rows ``[N, D]`` and labels ``[N]``.

    Raises:
        InputError: samples that are not table rows.
    """
    from robustexplain.data import stack

    assert data is not None  # checked before; for the type checker
    x, y = stack(data)
    if x.dim() != 2:
        raise InputError(f"rules explain table rows [D], got samples of shape {list(x.shape[1:])}")
    return x.to(session.device), y.to(session.device)
