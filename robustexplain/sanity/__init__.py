"""Sanity checks of interpreters: does a map depend on the model, on what it learned, and only on that?"""

from .checks import Check, Outcome, cascading, independent, measures, other_labels, shifted
from .randomise import Stage, randomise, stages
from .shift import CompensatedConv, compensated

__all__ = [
    "Check",
    "CompensatedConv",
    "Outcome",
    "Stage",
    "cascading",
    "compensated",
    "independent",
    "measures",
    "other_labels",
    "randomise",
    "shifted",
    "stages",
]
