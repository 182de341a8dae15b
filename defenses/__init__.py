"""Defenses: system -> system that is harder to deceive."""

from .base import Defense, TrainedDefense
from .detection import FeatureSqueezing, FeatureSqueezingDetector, XEnsemble, XEnsembleDetector
from .interpreters.aggregated import Aggregate, AggregatedInterpreter
from .interpreters.aid import AID
from .interpreters.beta_smoothing import BetaSmoothing
from .models import AdversarialTraining, ModelDefense

__all__ = [
    "AID",
    "AdversarialTraining",
    "Aggregate",
    "AggregatedInterpreter",
    "BetaSmoothing",
    "Defense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "ModelDefense",
    "TrainedDefense",
    "XEnsemble",
    "XEnsembleDetector",
]
