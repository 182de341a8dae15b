"""Defenses that harden the classifier itself."""

from .adversarial import AdversarialTraining
from .attribution import RobustAttribution
from .base import ModelDefense
from .cure import CURE
from .denoising import FeatureDenoising
from .distillation import DefensiveDistillation
from .ensemble import EnsembleAdversarialTraining
from .fine_tuned import FineTuned
from .gradient_alignment import GradientAlignment
from .image_alignment import ImageAlignment
from .input_gradient_penalty import InputGradientPenalty
from .interpretability import InterpretabilityTraining
from .rank_thickness import RankThickness
from .retrained import Retrained
from .revealing import Revealing
from .smooth_curvature import SmoothCurvature
from .smooth_surface import SmoothSurface
from .trades import TRADES

__all__ = [
    "CURE",
    "TRADES",
    "AdversarialTraining",
    "DefensiveDistillation",
    "EnsembleAdversarialTraining",
    "FeatureDenoising",
    "FineTuned",
    "GradientAlignment",
    "ImageAlignment",
    "InputGradientPenalty",
    "InterpretabilityTraining",
    "ModelDefense",
    "RankThickness",
    "Retrained",
    "Revealing",
    "RobustAttribution",
    "SmoothCurvature",
    "SmoothSurface",
]
