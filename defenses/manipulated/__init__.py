"""Models whose owner may lie: scanners that judge a model, and a repair."""

from .base import ModelScanner, Scan, agreement
from .disagreement import GradientFreeDisagreement, TrustedReference
from .fine_pruning import FinePruning
from .inversion import Inverted, invert
from .judging import p_values
from .tables import BackgroundCheck, PairsProbe
from .triggers import MapTrigger, NeuralCleanse

__all__ = [
    "BackgroundCheck",
    "FinePruning",
    "GradientFreeDisagreement",
    "Inverted",
    "MapTrigger",
    "ModelScanner",
    "NeuralCleanse",
    "PairsProbe",
    "Scan",
    "TrustedReference",
    "agreement",
    "invert",
    "p_values",
]
