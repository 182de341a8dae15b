"""How differently decisions treat two groups of people: the usual measures of group fairness."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

Unfairness = Literal[
    "demographic-parity",
    "predictive-parity",
    "predictive-equality",
    "equal-opportunity",
    "equalised-odds",
    "accuracy-equality",
]
"""The rate that two groups are compared by: of favourable decisions, of precision, of false positives, of false
negatives, the worse of these last two, of accuracy."""


def unfairness(
    decided: Tensor, labels: Tensor, member: Tensor, other: Tensor | None = None, of: Unfairness = "demographic-parity"
) -> float:
    """How far apart two groups are in a rate: ``|rate(member) - rate(other)|``, in ``[0, 1]``, 0 is fair.

    Demographic parity (Calders et al. 2009) compares ``P(decided = 1)``; predictive parity ``P(label = 1 | decided =
    1)``; predictive equality the rates of false positives, equal opportunity those of false negatives, equalised odds
    (Hardt et al. 2016) the larger of these two gaps; accuracy equality ``P(decided = label)``. The rate of an
    empty group is 0.

    Args:
        decided: ``[N]``, 0 or 1: the decisions.
        labels: ``[N]``, 0 or 1: the true labels.
        member: bool ``[N]``, membership of the first group.
        other: bool ``[N]``, membership of the second; default everybody else.
        of: the rate.

    Raises:
        InputError: unequal lengths, decisions or labels that are not 0 or 1, somebody in both groups, nobody in one.
    """
    other = ~member if other is None else other
    for name, values in (("decided", decided), ("labels", labels)):
        if values.shape != member.shape or bool(((values != 0) & (values != 1)).any()):
            raise InputError(f"{name} must be 0 or 1 for each of {list(member.shape)} rows, got {list(values.shape)}")
    if other.shape != member.shape or bool((member & other).any()):
        raise InputError("the two groups must be bool of equal length and have nobody in common")
    if not member.any() or not other.any():
        raise InputError(f"both groups need people, got {int(member.sum())} and {int(other.sum())}")
    counts = np.zeros((2, 2, 2))
    for index, group in enumerate((member, other)):
        for label, decision in np.ndindex(2, 2):
            counts[index, label, decision] = int((group & (labels == label) & (decided == decision)).sum())
    return float(gap(counts, of))


def gap(counts: NDArray[Any], of: Unfairness) -> NDArray[Any]:
    """The same from numbers of people ``[..., group, label, decision]``, each of the last three of size 2; ``[...]``.

    Raises:
        InputError: an unknown rate.
    """
    (tn, fp), (fn, tp) = (np.moveaxis(counts[..., label, :], -1, 0) for label in (0, 1))
    everybody = tn + fp + fn + tp
    if of == "equalised-odds":
        worse: NDArray[Any] = np.maximum(gap(counts, "predictive-equality"), gap(counts, "equal-opportunity"))
        return worse
    rates = {
        "demographic-parity": (tp + fp, everybody),
        "predictive-parity": (tp, tp + fp),
        "predictive-equality": (fp, fp + tn),
        "equal-opportunity": (fn, fn + tp),
        "accuracy-equality": (tp + tn, everybody),
    }
    if of not in rates:
        raise InputError(f"unfairness must be one of {', '.join(map(repr, get_args(Unfairness)))}, got {of!r}")
    part, whole = rates[of]
    rate = part / np.maximum(whole, 1)
    found: NDArray[Any] = np.abs(rate[..., 0] - rate[..., 1])
    return found
