"""Defenses that harden the classifier itself."""

from .adversarial import AdversarialTraining
from .base import ModelDefense

__all__ = ["AdversarialTraining", "ModelDefense"]
