"""Which of the rows that LIME and KernelSHAP make up look real, by their neighbours and the model's answers there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ...errors import InputError
from ...fields import Count, Fraction, check_fields
from ...registry import PARTS

Answers = Callable[[np.ndarray], np.ndarray]
"""Rows ``[n, D]`` in the data's units to the classes that the model predicts, ``[n]``."""


@PARTS.register("neighbour-guard", paper="Carmichael and Scheirer 2023 (KNN-CAD) and code (unfooling)")
@dataclass(frozen=True, eq=False)
class NeighbourGuard:
    """KNN-CAD: scores rows by whether the model answers them as it answers real rows nearby, and keeps the higher ones.

    Of the ``k`` real rows next to a row that the model puts into class ``y``, ``d_y`` is the distance of those of class
    ``y`` (their median or largest) and ``d_other`` that of the others; the score is ``1 / (1 + d_y / d_other)``, 0
    without neighbours of the class, 1 where all are of it. Classes are the model's answers, for real rows too.
    Departure: with more than two classes ``d_other`` is that of the nearest other class, so that two are scored as in
    the code; columns are standardised here.

    Args:
        rows: real rows ``[N, D]`` in the data's own units.
        classes: the model's predictions on them, ``[N]``.
        keep: rows with at least this score are kept.
        k: neighbours.
        distance: of several rows of one class.
        p: of the Minkowski distance.
        at_least: where fewer rows are kept, the best-scored others are taken up to this number.

    Raises:
        InputError: rows and classes that do not fit, or fewer rows than ``k + 1``.
    """

    rows: Tensor
    classes: Tensor
    keep: Fraction = 0.9
    k: Count = 15
    distance: Literal["median", "max"] = "max"
    p: Count = 1
    at_least: Count = 50

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows.dim() != 2 or self.classes.shape != self.rows.shape[:1]:
            raise InputError(
                f"a guard needs rows [N, D] and as many classes, got {list(self.rows.shape)} and "
                f"{list(self.classes.shape)}"
            )
        # One more: a row of the guard's own is no neighbour of itself.
        if len(self.rows) <= self.k:
            raise InputError(
                f"a guard of {self.k} neighbours needs {self.k + 1} rows at least, got {len(self.rows)}: lower k"
            )

    def scores(self, rows: np.ndarray, classes: np.ndarray, *, itself: bool = True) -> np.ndarray:
        """``[n]`` in ``[0, 1]``: the larger, the more a row looks real.

        Args:
            rows: ``[n, D]`` in the data's units.
            classes: the model's answers ``[n]``.
            itself: whether a row may be its own neighbour; ``False`` for the guard's own rows.
        """
        tree, mean, std, known = self._fitted
        far, index = tree.kneighbors((rows - mean) / std, self.k + (0 if itself else 1))
        if not itself:
            far, index = far[:, 1:], index[:, 1:]
        near = known[index]
        own = self._far(far, near == classes[:, None])
        others = [self._far(far, (near == c) & (near != classes[:, None])) for c in np.unique(known)]
        other = np.min(others, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = 1 / (1 + own / other)
        return np.where((own == 0) & (other == 0), 1.0, np.where(np.isinf(own), 0.0, found))

    def kept(self, rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Which rows look real, bool ``[n]``."""
        return np.asarray(self.scores(rows, classes) >= self.keep)

    @cached_property
    def _fitted(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        from sklearn.neighbors import NearestNeighbors

        rows = self.rows.detach().cpu().double().numpy()
        std = rows.std(0)
        mean, std = rows.mean(0), np.where(np.ptp(rows, axis=0) == 0, 1.0, std)
        tree = NearestNeighbors(p=self.p).fit((rows - mean) / std)
        return tree, mean, std, self.classes.detach().cpu().numpy()

    def _far(self, far: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The distance of the neighbours that count, infinite without any."""
        if self.distance == "max":
            found = np.where(counts, far, -np.inf).max(1)
        else:
            ordered, number = np.sort(np.where(counts, far, np.inf), 1), counts.sum(1)
            low, high = np.maximum(number - 1, 0) // 2, np.minimum(number // 2, far.shape[1] - 1)
            each = np.arange(len(far))
            found = np.where(number > 0, 0.5 * (ordered[each, low] + ordered[each, high]), np.inf)
        return np.where(counts.any(1), found, np.inf)


def best(scores: np.ndarray, keep: float, at_least: int) -> np.ndarray:
    """Indices of the rows with at least that score, in order; of the best-scored ones, where that are too few."""
    kept = np.flatnonzero(scores >= keep)
    if len(kept) >= min(at_least, len(scores)):
        return kept
    return np.sort(np.argsort(-scores, kind="stable")[:at_least])


def guarded_lime(explainer: Any, guard: NeighbourGuard, answers: Answers) -> None:
    """Make a LIME explainer draw until it has as many rows that look real as it was asked for.

    Twice as many rows are drawn as are missing, up to ten times; what is missing then stays away.
    """
    name = "_LimeTabularExplainer__data_inverse"
    drawn = getattr(explainer, name)

    def looking_real(row: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        data, rows, scores = [], [], []
        missing = number - 1
        for _ in range(10):
            made, back = drawn(row, 2 * missing + 1)
            found = guard.scores(back[1:], answers(back[1:]))
            data.append(made[1:])
            rows.append(back[1:])
            scores.append(found)
            missing -= int((found >= guard.keep).sum())
            if missing <= 0:
                break
        first = made[:1], back[:1]
        chosen = best(np.concatenate(scores), guard.keep, guard.at_least)[: number - 1]
        parts = (np.concatenate(part)[chosen] for part in (data, rows))
        together = [np.concatenate([one, part]) for one, part in zip(first, parts, strict=True)]
        return together[0], together[1]

    setattr(explainer, name, looking_real)


def guarded_shap(
    explainer: Any,
    guard: NeighbourGuard,
    answers: Answers,
    decoded: Callable[[np.ndarray], np.ndarray],
    least: float = 0.3,
) -> None:
    """Make a KernelSHAP explainer take the mean of each coalition over those of its rows that look real.

    A coalition of which less than ``least`` look real counts for nothing, as in the code; where so few coalitions are
    left that the regression has no answer, the best ones stay.
    """
    run = explainer.run

    def looking_real() -> None:
        run()
        count = explainer.nsamplesAdded
        rows = decoded(explainer.synth_data[: count * explainer.N])
        scores = guard.scores(rows, answers(rows)).reshape(count, explainer.N)
        shares = np.asarray(explainer.data.weights, dtype=float)
        weights = (scores >= guard.keep) * shares
        share = weights.sum(1)
        ranked = share + 1e-6 * scores.mean(1)
        chosen = best(ranked, least, min(count, 2 * explainer.M))
        left = np.zeros(count, dtype=bool)
        left[chosen] = True
        # A coalition that is left without any row that looks real keeps the mean of all of them.
        weights = np.where(share[:, None] > 0, weights, shares)
        outputs = explainer.y[: count * explainer.N].reshape(count, explainer.N, -1)
        means = (outputs * weights[:, :, None]).sum(1) / weights.sum(1, keepdims=True)
        explainer.ey[:count] = means
        explainer.kernelWeights[:count] *= left

    explainer.run = looking_real


def classes_of(outputs: Callable[[np.ndarray], np.ndarray]) -> Answers:
    """The predicted classes, of a function that gives every class's output."""
    return lambda rows: np.asarray(outputs(rows).argmax(1))


def gap(real: np.ndarray, made: np.ndarray) -> float:
    """The area between the distributions of the scores of real and of made-up rows, in ``[0, 1]`` (1-Wasserstein)."""
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

    return float(wasserstein_distance(real, made))
