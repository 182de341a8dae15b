"""Detectors: they score how suspicious an input is, with an alarm threshold at a calibrated false-alarm rate."""

from .any_of import AnyOf
from .base import Detector, DetectorDefense
from .feature_squeezing import FeatureSqueezing, FeatureSqueezingDetector
from .forest import Forest
from .map_network import MapNetwork
from .x_ensemble import XEnsemble, XEnsembleDetector

__all__ = [
    "AnyOf",
    "Detector",
    "DetectorDefense",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "Forest",
    "MapNetwork",
    "XEnsemble",
    "XEnsembleDetector",
]
