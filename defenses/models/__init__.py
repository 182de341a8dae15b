"""Defenses that harden the classifier itself."""

from .adversarial import AdversarialTraining
from .base import ModelDefense
from .denoising import FeatureDenoising
from .distillation import DefensiveDistillation
from .ensemble import EnsembleAdversarialTraining
from .retrained import Retrained
from .revealing import Revealing
from .trades import TRADES

__all__ = [
    "TRADES",
    "AdversarialTraining",
    "DefensiveDistillation",
    "EnsembleAdversarialTraining",
    "FeatureDenoising",
    "ModelDefense",
    "Retrained",
    "Revealing",
]
