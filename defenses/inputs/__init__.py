"""Defenses that change the input before the model sees it."""

from .denoiser import GuidedDenoiser
from .magnet import MagNetReformer
from .transforms import InputTransform
from .voting import RandomResizing, RegionVoting

__all__ = ["GuidedDenoiser", "InputTransform", "MagNetReformer", "RandomResizing", "RegionVoting"]
