"""Interpreters: attribution methods that are differentiable in the input and in the model's weights."""

from .activation import CAM, GradCAM
from .base import Explanation, Interpreter
from .gradient import Gradient
from .masking import RTS, MaskingModel, MaskObjective
from .rts_training import RTSTraining, clean_objective, train_rts
from .smoothed import Smoothed

__all__ = [
    "CAM",
    "RTS",
    "Explanation",
    "GradCAM",
    "Gradient",
    "Interpreter",
    "MaskObjective",
    "MaskingModel",
    "RTSTraining",
    "Smoothed",
    "clean_objective",
    "train_rts",
]
