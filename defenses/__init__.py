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
from .interpreters.certificates import CertifiedInterpreter, MeTFADefense, SparsifiedSmoothGrad
from .models import AdversarialTraining, ModelDefense

__all__ = [
    "AID",
    "AdversarialTraining",
    "Aggregate",
    "AggregatedInterpreter",
    "AnyOf",
    "BetaSmoothing",
    "CertifiedInterpreter",
    "Defense",
    "Detector",
    "DetectorDefense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "InputTransform",
    "MeTFADefense",
    "ModelDefense",
    "SparsifiedSmoothGrad",
    "TrainedDefense",
    "XEnsemble",
    "XEnsembleDetector",
]
