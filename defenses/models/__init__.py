"""Defenses that harden the classifier itself."""

from .adversarial import AdversarialTraining
from .base import ModelDefense
from .revealing import Revealing

__all__ = ["AdversarialTraining", "ModelDefense", "Revealing"]
