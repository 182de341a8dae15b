"""How well a score separates attacked from clean inputs."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..errors import FewScoresWarning, InputError


def auc(clean: Tensor, attacked: Tensor) -> float:
    """Area under the ROC curve: the chance that an attacked input scores above a clean one, ties counted half.

    Args:
        clean: scores ``[N]``.
        attacked: scores ``[M]``.

    Raises:
        InputError: no scores of either kind, or NaN among them.
    """
    if not len(clean) or not len(attacked):
        raise InputError(f"AUC needs scores of both kinds, got {len(clean)} clean and {len(attacked)} attacked")
    _refuse_nan(clean, attacked)
    pooled = torch.cat([clean, attacked]).double()
    # Mann-Whitney by mid-ranks: N log N, where comparing all pairs would need N x M memory.
    _, inverse, counts = pooled.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse][len(clean) :]
    m = len(attacked)
    return float((ranks.sum() - m * (m + 1) / 2) / (m * len(clean)))


def threshold_at(clean: Tensor, false_alarms: float) -> float:
    """The smallest of the clean scores that a new clean input exceeds with probability ``false_alarms`` at most.

    The probability is over the clean inputs and the new one together (split conformal, Vovk et al. 2005): ``k`` of
    ``N`` scores may be above the threshold if ``(k + 1) / (N + 1)`` is such a share. With fewer than
    ``1 / false_alarms - 1`` scores there is no such threshold; it is then the largest of them, with a
    :class:`FewScoresWarning`.

    Args:
        clean: scores ``[N]`` of clean inputs that the detector was not trained on.
        false_alarms: in ``[0, 1]``; 0.05 is usual.

    Raises:
        InputError: no scores, NaN among them, or a share outside ``[0, 1]``.
    """
    if not 0 <= false_alarms <= 1:
        raise InputError(f"false_alarms must lie in [0, 1], got {false_alarms!r}")
    # Rounding must not take one alarm away where the product is whole.
    allowed = math.floor(false_alarms * (len(clean) + 1) + 1e-9) - 1
    threshold = _exceeded_by(allowed, clean)
    if false_alarms > 0 > allowed:
        warnings.warn(
            f"an alarm at {false_alarms:.2%} false alarms is calibrated on {len(clean)} clean scores; it takes "
            f"{math.ceil(1 / false_alarms - 1e-9) - 1} for a new input to be the highest so rarely",
            FewScoresWarning,
            stacklevel=2,
        )
    return threshold


def _exceeded_by(allowed: int, clean: Tensor) -> float:
    """The smallest of the clean scores that at most so many of them exceed."""
    if not len(clean):
        raise InputError("a threshold needs clean scores to calibrate on, got none")
    _refuse_nan(clean)
    return float(clean.sort().values[len(clean) - 1 - max(0, min(allowed, len(clean) - 1))])


def _refuse_nan(*scores: Tensor) -> None:
    bad, total = sum(int(s.isnan().sum()) for s in scores), sum(map(len, scores))
    if bad:
        raise InputError(f"{bad} of {total} scores are NaN: the detector says nothing of those inputs")


def detected_at(clean: Tensor, attacked: Tensor, false_alarms: float) -> float:
    """Share of attacked inputs above the threshold that at most a share ``false_alarms`` of clean ones exceeds (TPR).

    A point of the ROC curve of these scores: the threshold is the smallest of the clean scores that at most this share
    *of them* exceeds. It is no threshold for new inputs, which :func:`threshold_at` gives.

    Args:
        clean: scores ``[N]``.
        attacked: scores ``[M]``.
        false_alarms: in ``[0, 1]``.

    Raises:
        InputError: no scores of either kind, NaN among them, or a share outside ``[0, 1]``.
    """
    if not len(clean) or not len(attacked):
        raise InputError(f"detection needs scores of both kinds, got {len(clean)} clean and {len(attacked)} attacked")
    if not 0 <= false_alarms <= 1:
        raise InputError(f"false_alarms must lie in [0, 1], got {false_alarms!r}")
    _refuse_nan(clean, attacked)
    threshold = _exceeded_by(math.floor(false_alarms * len(clean) + 1e-9), clean)
    return float((attacked > threshold).double().mean())
