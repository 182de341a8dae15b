"""Defenses that harden the classifier itself."""

from .adv2_training import ADV2Training
from .adversarial import AdversarialTraining
from .atex import ATEX
from .base import ModelDefense
from .infodrop import InfoDrop
from .revealing import Revealing
from .saliency_guided import AdversarialSaliencyGuided, SaliencyGuided
from .senn import SelfExplaining
from .woods import Woods

__all__ = [
    "ATEX",
    "ADV2Training",
    "AdversarialSaliencyGuided",
    "AdversarialTraining",
    "InfoDrop",
    "ModelDefense",
    "Revealing",
    "SaliencyGuided",
    "SelfExplaining",
    "Woods",
]
