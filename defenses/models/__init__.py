"""Defenses that harden the classifier itself."""

from .adversarial import AdversarialTraining
from .attribution import RobustAttribution
from .base import ModelDefense
from .fine_tuned import FineTuned
from .gradient_alignment import GradientAlignment
from .image_alignment import ImageAlignment
from .input_gradient_penalty import InputGradientPenalty
from .rank_thickness import RankThickness
from .revealing import Revealing
from .smooth_curvature import SmoothCurvature
from .smooth_surface import SmoothSurface

__all__ = [
    "AdversarialTraining",
    "FineTuned",
    "GradientAlignment",
    "ImageAlignment",
    "InputGradientPenalty",
    "ModelDefense",
    "RankThickness",
    "Revealing",
    "RobustAttribution",
    "SmoothCurvature",
    "SmoothSurface",
]
