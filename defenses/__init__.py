"""Defenses: system -> system that is harder to deceive."""

from .aggregation import Aggregate, AggregatedInterpreter
from .base import Defense
from .detection import FeatureSqueezing, FeatureSqueezingDetector, XEnsemble, XEnsembleDetector
from .distillation import AID
from .smoothing import BetaSmoothing

__all__ = [
    "AID",
    "Aggregate",
    "AggregatedInterpreter",
    "BetaSmoothing",
    "Defense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "XEnsemble",
    "XEnsembleDetector",
]
