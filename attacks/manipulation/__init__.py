"""Attacks on systems themselves: on weights, on what stands around a model, on an interpreter's reference samples."""

from .base import ModelAttack

__all__ = ["ModelAttack"]
