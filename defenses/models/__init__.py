"""Defenses that harden the classifier itself."""

from .adv2_training import ADV2Training
from .adversarial import AdversarialTraining
from .base import ModelDefense
from .revealing import Revealing

__all__ = ["ADV2Training", "AdversarialTraining", "ModelDefense", "Revealing"]
