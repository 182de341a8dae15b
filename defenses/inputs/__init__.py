"""Defenses that change the input before the model sees it."""

from .transforms import InputTransform

__all__ = ["InputTransform"]
