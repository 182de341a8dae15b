"""Sanity checks of interpreters: does a map depend on the model and on its training, and on nothing else?"""

from ..models.randomise import LayerGroup, randomise, stages
from .checks import Check, Outcome, cascading, independent, measures, other_labels, shifted

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
