"""LaundryML (rationalisation): explain an unfair model by a fair-looking rule list or tree of high fidelity."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.door import answer, suited
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
    lists are enumerated in the order of ``(1 - beta) misc + beta unfairness + lambda K`` with ``K`` rules, for each of
    ``search.betas``. Of those that agree with the model on at least a share ``fidelity`` of the adversary's rows, the
    least unfair one is shown.

    Departures from the paper and its code: a single search keeps the best lists, where theirs starts a new search
    without each rule of each list found (both give lists in the order of the objective); errors of rules and of the
    default both have the weight ``1 - beta``, as in the paper, where the code gives the former 1; the sensitive columns
    are not used as antecedents, since the explanation is meant to hide them; rates that depend on the truth use the
    true labels, where the code uses the black box's decisions during the search; a list that gives all rows the same
    decision is never chosen, although it is fair; an outcome explanation must, where possible, also be faithful on the
    row's neighbours, and distances to neighbours leave the group columns out.

    Args:
        sensitive: the column whose rows above ``threshold`` are the group discriminated against (or for).
        other: the column of the group that it is compared with; default: all other rows.
        secrets: further columns that the explanation must not mention.
        threshold: in the units of ``sensitive`` and ``other``.
        unfairness: the fairness measure to be minimised.
        fidelity: least share of rows on which surrogate and model agree.
        surrogate: ``rules``, or ``tree``: scikit-learn's decision trees, over many settings and column subsets.
        scope: ``model``, one list for all decisions; or ``outcome``, a list for each decision, found on the
            ``neighbours`` nearest rows (standardised Euclidean distance without the group columns), that agrees with
            the decision.
        neighbours: how many, for an outcome explanation.
        honest: control without an attack: the most faithful surrogate at ``beta = 0``, sensitive columns allowed.
        search: how surrogates are enumerated.
        features: names of the columns, for the text of the rules.
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

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at."""
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
        chooser = self.laundry(x.shape[1])
        sizes = [int(group.sum()) for group in chooser.groups(x)]
        if not all(sizes):
            raise InputError(f"both groups need rows, got {sizes[0]} rows of the sensitive one and {sizes[1]} others")
        if self.scope == "outcome":
            reference = Reference(x.cpu(), labels.cpu())
            return replace(system, interpreter=LocalRuleReasons(system.model, chooser, reference, self.neighbours))
        chosen = chooser.pick(chooser.enumerate(x, labels, decided))
        return replace(system, interpreter=RuleReasons(system.model, chosen.rules))


@dataclass(frozen=True)
class SurrogateQuality:
    """Quality of a surrogate on rows that were not used to choose it.

    Args:
        fidelity: share of the rows on which it agrees with the model.
        unfairness: of the surrogate's decisions.
        black_box: unfairness of the model's own decisions.
    """

    fidelity: float
    unfairness: float
    black_box: float


def surrogate_quality(system: System, x: Tensor, labels: Tensor, attack: LaundryML) -> SurrogateQuality:
    """Fidelity and unfairness of a manipulated system's surrogate, and the unfairness of its model.

    Args:
        system: the result of :class:`LaundryML`; the surrogate's decision about a row is that of the list shown for it.
        x: rows ``[N, D]`` that were not used to choose the surrogate.
        labels: true labels ``[N]``, 0 or 1.
        attack: defines the groups and the fairness measure.

    Raises:
        InputError: a system whose interpreter shows no rules.
    """
    if not isinstance(system.interpreter, Reasons):
        raise InputError(f"the system must be explained by rules, got {type(system.interpreter).__name__}")
    decided = _two_classes(system, x)
    member, other = attack.laundry(x.shape[1]).groups(x)
    shown = system.interpreter.reasons(x, decided)
    surrogate = torch.cat([rules(x[i : i + 1]) for i, rules in enumerate(shown)])
    unfair = [unfairness(values, labels, member, other, attack.unfairness) for values in (surrogate, decided)]
    return SurrogateQuality(float((surrogate == decided).double().mean()), unfair[0], unfair[1])


def _two_classes(system: System, x: Tensor) -> Tensor:
    with torch.no_grad():
        classes = answer(system.model, suited(system.model, x[:1])).shape[1]
    if classes != 2:
        raise UnsupportedModelError(f"fairness is between two classes, 1 the one that counts; the model has {classes}")
    return decisions_of(system.model, x)
