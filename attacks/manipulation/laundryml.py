"""Rationalisation: an unfair model is explained by a fair-looking rule list or tree that mostly agrees with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Count, Fraction
from robustexplain.interpreters.reference import Reference
from robustexplain.metrics.fairness import Unfairness, unfairness
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation
from .rule_lists import Reasons, RuleReasons, decisions_of, table_of
from .rule_table import RuleSearch
from .surrogate_choice import LocalRuleReasons, SurrogateChooser


@MANIPULATIONS.register("laundryml", paper="Aivodji et al. 2019, algorithm 1", needs=("table", "two classes"))
@dataclass(frozen=True)
class LaundryML(Manipulation):
    """Explains an unfair model by a fair-looking rule list or tree of high fidelity (rationalisation).

    The model stays as it is; its interpreter becomes one that explains every decision by the chosen surrogate. Rule
    lists are enumerated in the order of ``(1 - beta) misc + beta unfairness + lambda K``, K rules, for each of
    ``search.betas``; of those that decide at least ``fidelity`` of the adversary's rows as the model does, the least
    unfair one is shown.

    Departures from the paper and its code: a single search keeps the best lists, where theirs runs a search anew
    without each rule of each list found (both give lists in the order of the objective); errors of rules and of the
    default weigh ``1 - beta`` alike, as the paper says, where the code weighs the former 1; the sensitive columns are
    no antecedents, for an excuse does not name what it hides; rates that depend on the truth take the true labels,
    where the code takes the black box's decisions while it searches; a list that decides everything alike is never
    chosen, fair as it is; an outcome explanation must be faithful around the row too, where that can be had, and its
    neighbours are those alike in everything but the group.

    Args:
        sensitive: the column whose rows above ``threshold`` are the group discriminated against (or for).
        other: the column of the group that it is held against; default everybody else.
        secrets: further columns that the explanation must not speak of.
        threshold: in the units of ``sensitive`` and ``other``.
        unfairness: what must look fair.
        fidelity: least share of rows that the surrogate decides as the model does.
        surrogate: ``rules``, or ``tree``: scikit-learn's decision trees, over many settings and column subsets.
        scope: ``model``, one list for all decisions; or ``outcome``, a list for each decision, found on the
            ``neighbours`` nearest rows (standardised Euclidean distance without the columns of the groups), that agrees
            with the decision.
        neighbours: of an outcome explanation.
        honest: the control: the most faithful surrogate at beta 0, sensitive columns allowed.
        search: how surrogates are enumerated.
        features: names of the columns, for the text that a user is shown.
    """

    sensitive: Feature
    other: Feature | None = None
    secrets: tuple[Feature, ...] = ()
    threshold: float = 0.5
    unfairness: Unfairness = "demographic-parity"
    fidelity: Fraction = 0.9
    surrogate: Literal["rules", "tree"] = "rules"
    scope: Literal["model", "outcome"] = "model"
    neighbours: Count = 200
    honest: bool = False
    search: RuleSearch = field(default_factory=RuleSearch)
    features: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = ("sensitive", "other", "secrets")
    changes: ClassVar[str] = "explanation"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "secrets", tuple(self.secrets))
        object.__setattr__(self, "features", tuple(self.features))

    @property
    def hidden(self) -> Feature:
        """The column of the group."""
        return self.sensitive

    def summaries(self) -> tuple[str, str]:
        """What is changed and what is wanted."""
        return self.changes, "the honest control" if self.honest else f"looks fair ({self.unfairness})"

    def laundry(self, width: int) -> SurrogateChooser:
        """The enumeration on rows of ``width`` columns.

        Raises:
            InputError: a column that the rows do not have.
        """
        place = [index_of(column, self.features, width=width) for column in (self.sensitive, *self.secrets)]
        other = None if self.other is None else index_of(self.other, self.features, width=width)
        return SurrogateChooser(place[0], other, tuple(place[1:]), self.threshold, self.unfairness, self.fidelity,
                       self.surrogate, self.honest, self.search, self.features, self.seed)  # fmt: skip

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        x, labels = table_of(data, session)
        decided = _two_classes(system, x)
        laundry = self.laundry(x.shape[1])
        sizes = [int(group.sum()) for group in laundry.groups(x)]
        if not all(sizes):
            raise InputError(f"both groups need people, got {sizes[0]} rows of the sensitive one and {sizes[1]} others")
        if self.scope == "outcome":
            reference = Reference(x.cpu(), labels.cpu())
            return replace(system, interpreter=LocalRuleReasons(system.model, laundry, reference, self.neighbours))
        chosen = laundry.pick(laundry.enumerate(x, labels, decided))
        return replace(system, interpreter=RuleReasons(system.model, chosen.rules))


@dataclass(frozen=True)
class SurrogateQuality:
    """How a surrogate does on rows that nobody chose it on.

    Args:
        fidelity: share of the rows that it decides as the model does.
        unfairness: of the surrogate's decisions.
        black_box: unfairness of the model's own decisions.
    """

    fidelity: float
    unfairness: float
    black_box: float


def surrogate_quality(system: System, x: Tensor, labels: Tensor, attack: LaundryML) -> SurrogateQuality:
    """Fidelity and unfairness of what a laundered system shows, and the unfairness of what it does.

    Args:
        system: what :class:`LaundryML` made; its surrogate's decision about a row is that of the list shown for it.
        x: rows ``[N, D]`` that nobody chose the surrogate on.
        labels: what is true of them, ``[N]``, 0 or 1.
        attack: says who the groups are and which rate is compared.

    Raises:
        InputError: a system whose interpreter shows no rules.
    """
    if not isinstance(system.interpreter, Reasons):
        raise InputError(f"the system must be explained by rules, got {type(system.interpreter).__name__}")
    decided = _two_classes(system, x)
    laundry = attack.laundry(x.shape[1])
    member, other = laundry.groups(x)
    shown = system.interpreter.reasons(x, decided)
    said = torch.cat([rules(x[i : i + 1]) for i, rules in enumerate(shown)])
    unfair = [unfairness(values, labels, member, other, attack.unfairness) for values in (said, decided)]
    return SurrogateQuality(float((said == decided).double().mean()), unfair[0], unfair[1])


def _two_classes(system: System, x: Tensor) -> Tensor:
    with torch.no_grad():
        classes = system.model(x[:1]).shape[1]
    if classes != 2:
        raise UnsupportedModelError(f"fairness is between two classes, 1 the one that counts; the model has {classes}")
    return decisions_of(system.model, x)
