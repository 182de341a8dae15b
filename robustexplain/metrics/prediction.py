"""Attack success and confidence, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..errors import InputError


def hit(logits: Tensor, y: Tensor, goal_class: Tensor | None = None) -> Tensor:
    """``[B]`` bool: predicted as ``goal_class`` (targeted), or as anything but ``y``; its mean is the ASR.

    False where a logit is NaN: such an answer is no prediction.
    """
    prediction = logits.argmax(1)
    wanted = prediction != y if goal_class is None else prediction == goal_class
    return wanted & ~logits.isnan().any(1)


def confidence(logits: Tensor, y: Tensor, goal_class: Tensor | None = None) -> Tensor:
    """``[B]``: misclassification confidence (MC): probability of ``goal_class``, or of the likeliest wrong class.

    Raises:
        InputError: NaN among the logits.
    """
    if logits.isnan().any():
        raise InputError(f"logits are NaN for {int(logits.isnan().any(1).sum())} of {len(logits)} samples")
    p = logits.softmax(1)
    if goal_class is not None:
        return p.gather(1, goal_class[:, None])[:, 0]
    return p.scatter(1, y[:, None], -1.0).amax(1)


def joint_success(wanted: Tensor, plausible: Tensor, alarm: Tensor | None = None) -> Tensor:
    """``[B]`` bool: predicted as wanted, a plausible map, and no alarm."""
    quiet = torch.ones_like(wanted) if alarm is None else ~alarm
    return wanted & plausible & quiet


def accuracy(logits: Tensor, y: Tensor, k: int = 1) -> Tensor:
    """``[B]`` bool: the label is among the ``k`` likeliest classes; its mean is the top-``k`` accuracy.

    Raises:
        InputError: shapes or labels that do not fit, NaN, or a ``k`` below 1 or above the number of classes.
    """
    if logits.dim() != 2 or not torch.isfinite(logits).all():
        raise InputError(f"logits must be finite [B, K], got {list(logits.shape)}")
    checks.classes(y, logits.shape[0], logits.shape[1], "y")
    if not 1 <= k <= logits.shape[1]:
        raise InputError(f"k must lie in [1, {logits.shape[1]}], got {k!r}")
    # A class tied with the label counts against it: constant logits must not be right.
    own = logits.gather(1, y[:, None].long())
    return (logits >= own).sum(1) <= k
