"""Defenses: system -> system that is harder to deceive."""

from .base import Defense
from .detection import FeatureSqueezing, FeatureSqueezingDetector, XEnsemble, XEnsembleDetector
from .inputs import InputTransform
from .interpreters.aggregated import Aggregate, AggregatedInterpreter
from .interpreters.aid import AID
from .interpreters.beta_smoothing import BetaSmoothing

__all__ = [
    "AID",
    "Aggregate",
    "AggregatedInterpreter",
    "BetaSmoothing",
    "Defense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "InputTransform",
    "XEnsemble",
    "XEnsembleDetector",
]
