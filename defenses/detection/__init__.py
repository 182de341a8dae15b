"""Detectors: they score how suspicious an input is, and raise an alarm at a calibrated false-alarm rate."""

from .x_ensemble import Forest, MapNetwork, XEnsemble, XEnsembleDetector

__all__ = ["Forest", "MapNetwork", "XEnsemble", "XEnsembleDetector"]
