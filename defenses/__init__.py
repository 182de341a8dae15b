"""Defenses: from a system to one that is harder to deceive."""

from robustexplain.interpreters import Aggregate

from .base import Defense, TrainedDefense
from .detection import (
    AnyOf,
    Detector,
    DetectorDefense,
    FeatureSqueezing,
    FeatureSqueezingDetector,
    XEnsemble,
    XEnsembleDetector,
)
from .inputs import InputTransform
from .interpreters.aggregated import AggregatedInterpreter
from .interpreters.aid import AID, ConsistentAID
from .interpreters.beta_smoothing import BetaSmoothing
from .models import AdversarialTraining, ModelDefense, Revealing

__all__ = [
    "AID",
    "AdversarialTraining",
    "Aggregate",
    "AggregatedInterpreter",
    "AnyOf",
    "BetaSmoothing",
    "ConsistentAID",
    "Defense",
    "Detector",
    "DetectorDefense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "InputTransform",
    "ModelDefense",
    "Revealing",
    "TrainedDefense",
    "XEnsemble",
    "XEnsembleDetector",
]
