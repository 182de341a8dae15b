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
from .interpreters.aid import AID
from .interpreters.beta_smoothing import BetaSmoothing
from .interpreters.replaced import Replaced
from .interpreters.tangent_space import TangentSpace
from .models import AdversarialTraining, ModelDefense

__all__ = [
    "AID",
    "AdversarialTraining",
    "Aggregate",
    "AggregatedInterpreter",
    "AnyOf",
    "BetaSmoothing",
    "Defense",
    "Detector",
    "DetectorDefense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "InputTransform",
    "ModelDefense",
    "Replaced",
    "TangentSpace",
    "TrainedDefense",
    "XEnsemble",
    "XEnsembleDetector",
]
