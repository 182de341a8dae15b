"""What became of the prediction, per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def hit(logits: Tensor, y: Tensor, goal_class: Tensor | None = None) -> Tensor:
    """``[B]`` bool: predicted as ``goal_class`` (targeted), or as anything but ``y``; its mean is the ASR."""
    prediction = logits.argmax(1)
    return prediction != y if goal_class is None else prediction == goal_class


def confidence(logits: Tensor, y: Tensor, goal_class: Tensor | None = None) -> Tensor:
    """``[B]``: misclassification confidence (MC): probability of ``goal_class``, or of the likeliest wrong class."""
    p = logits.softmax(1)
    if goal_class is not None:
        return p.gather(1, goal_class[:, None])[:, 0]
    return p.scatter(1, y[:, None], -1.0).amax(1)


def joint_success(wanted: Tensor, plausible: Tensor, alarm: Tensor | None = None) -> Tensor:
    """``[B]`` bool: predicted as wanted, a plausible map, and no alarm: what a defender fears."""
    quiet = torch.ones_like(wanted) if alarm is None else ~alarm
    return wanted & plausible & quiet
