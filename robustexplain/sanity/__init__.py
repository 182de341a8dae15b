"""Sanity checks of interpreters: does a map depend on the model, on what it learned, and only on that?"""

from .checks import Check, Outcome, cascading, independent, measures, other_labels, shifted
from .randomise import LayerGroup, randomise, stages

__all__ = [
    "Check",
    "LayerGroup",
    "Outcome",
    "cascading",
    "independent",
    "measures",
    "other_labels",
    "randomise",
    "shifted",
    "stages",
]
