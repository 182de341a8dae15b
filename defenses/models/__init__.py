"""Defenses that harden the classifier itself."""

from .adv2_training import ADV2Training
from .adversarial import AdversarialTraining
from .atex import ATEX
from .attribution import RobustAttribution
from .attribution_regularisers import AttributionRegularisers
from .base import ModelDefense
from .cure import CURE
from .denoising import FeatureDenoising
from .distillation import DefensiveDistillation
from .ensemble import EnsembleAdversarialTraining
from .fine_tuned import FineTuned
from .gradient_alignment import GradientAlignment
from .image_alignment import ImageAlignment
from .infodrop import InfoDrop
from .input_gradient_penalty import InputGradientPenalty
from .interpretability import InterpretabilityTraining
from .rank_thickness import RankThickness
from .retrained import Retrained
from .revealing import Revealing
from .saliency_guided import AdversarialSaliencyGuided, SaliencyGuided
from .senn import SelfExplaining
from .smooth_curvature import SmoothCurvature
from .smooth_surface import SmoothSurface
from .trades import TRADES
from .woods import Woods

__all__ = [
    "ATEX",
    "CURE",
    "TRADES",
    "ADV2Training",
    "AdversarialSaliencyGuided",
    "AdversarialTraining",
    "AttributionRegularisers",
    "DefensiveDistillation",
    "EnsembleAdversarialTraining",
    "FeatureDenoising",
    "FineTuned",
    "GradientAlignment",
    "ImageAlignment",
    "InfoDrop",
    "InputGradientPenalty",
    "InterpretabilityTraining",
    "ModelDefense",
    "RankThickness",
    "Retrained",
    "Revealing",
    "RobustAttribution",
    "SaliencyGuided",
    "SelfExplaining",
    "SmoothCurvature",
    "SmoothSurface",
    "Woods",
]
