"""What an adversary (or a defense) wants of logits and maps: one loss per sample, and whether it is met.

Objectives add up with weights: ``Misclassify() + 20.0 * MatchMap()``. The same ones serve whether the variable is the
input, a flow, a patch or the model's weights.

Every loss is a sum over nothing but its own definition: per sample, *mean* over the pixels of a map, so that a weight
can be carried to another map size. (Papers that sum over a ``7 x 7`` map have weights smaller by 49.)
"""

from .base import (
    Decay,
    Goal,
    Objective,
    Observation,
    Product,
    Ramp,
    Schedule,
    Sum,
    Weight,
    at,
    needs_of,
    sum_losses,
)
from .evasion import AgreeSqueezed, EvadeDetector, EvadeSqueezing, MatchProbabilities
from .explanation import AgreeEncoder, DropTopK, FillRegion, LeaveMap, MatchMap, ShiftCenter, TopKLeft
from .manipulation import FadeTopK, HideFeature, MatchStructure, MoveCenter, SpreadUniformly
from .patch import Capped, LeaveRegion, UntilMet
from .prediction import Distance, Distill, KeepPrediction, Lead, Margin, Misclassify, Traded, margin
from .spatial import FlowLoss

__all__ = [
    "AgreeEncoder",
    "AgreeSqueezed",
    "Capped",
    "Decay",
    "Distance",
    "Distill",
    "DropTopK",
    "EvadeDetector",
    "EvadeSqueezing",
    "FadeTopK",
    "FillRegion",
    "FlowLoss",
    "Goal",
    "HideFeature",
    "KeepPrediction",
    "Lead",
    "LeaveMap",
    "LeaveRegion",
    "Margin",
    "MatchMap",
    "MatchProbabilities",
    "MatchStructure",
    "Misclassify",
    "MoveCenter",
    "Objective",
    "Observation",
    "Product",
    "Ramp",
    "Schedule",
    "ShiftCenter",
    "SpreadUniformly",
    "Sum",
    "TopKLeft",
    "Traded",
    "UntilMet",
    "Weight",
    "at",
    "margin",
    "needs_of",
    "sum_losses",
]
