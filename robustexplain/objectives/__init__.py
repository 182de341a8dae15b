"""What an adversary (or a defense) wants of logits and maps: one loss per sample, and whether it is met.

Objectives add up with weights: ``Misclassify() + 20.0 * MatchMap()``. The same ones serve whether the variable is the
input, a flow, a patch or the model's weights.

Every loss is a sum over nothing but its own definition: per sample, *mean* over the pixels of a map, so that a weight
can be carried to another map size. (Papers that sum over a ``7 x 7`` map have weights smaller by 49.)
"""

from .base import (
    Goal,
    Objective,
    Product,
    Ramp,
    Schedule,
    Seen,
    Sum,
    Weight,
    at,
    needs_of,
    sum_losses,
)
from .evasion import EvadeDetector
from .explanation import AgreeEncoder, MatchMap
from .prediction import Distance, KeepPrediction, Margin, Misclassify, Traded, margin

__all__ = [
    "AgreeEncoder",
    "Distance",
    "EvadeDetector",
    "Goal",
    "KeepPrediction",
    "Margin",
    "MatchMap",
    "Misclassify",
    "Objective",
    "Product",
    "Ramp",
    "Schedule",
    "Seen",
    "Sum",
    "Traded",
    "Weight",
    "at",
    "margin",
    "needs_of",
    "sum_losses",
]
