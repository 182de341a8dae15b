"""Detectors: they score how suspicious an input is, and raise an alarm at a calibrated false-alarm rate."""

from .feature_squeezing import FeatureSqueezing, FeatureSqueezingDetector
from .x_ensemble import Forest, MapNetwork, XEnsemble, XEnsembleDetector

__all__ = ["FeatureSqueezing", "FeatureSqueezingDetector", "Forest", "MapNetwork", "XEnsemble", "XEnsembleDetector"]
