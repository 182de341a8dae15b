"""Models whose owner may lie: scanners that judge a model, and a repair."""

from .base import ModelScanner, Scan, agreement
from .disagreement import GradientFreeDisagreement, TrustedReference
from .fine_pruning import FinePruning
from .inversion import Inverted, invert
from .judging import p_values
from .triggers import MapTrigger, NeuralCleanse

__all__ = [
    "FinePruning",
    "GradientFreeDisagreement",
    "Inverted",
    "MapTrigger",
    "ModelScanner",
    "NeuralCleanse",
    "Scan",
    "TrustedReference",
    "agreement",
    "invert",
    "p_values",
]
