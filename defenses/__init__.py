"""Defenses: system -> system that is harder to deceive."""

from .aggregation import Aggregate, AggregatedInterpreter
from .base import Defense, TrainedDefense
from .detection import FeatureSqueezing, FeatureSqueezingDetector, XEnsemble, XEnsembleDetector
from .distillation import AID
from .models import AdversarialTraining, ModelDefense
from .smoothing import BetaSmoothing

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
