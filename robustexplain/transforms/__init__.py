"""Transforms of images, by name: what stands in front of a model, and what detectors look through; harmless changes."""

from .base import Transform, transform, transforms
from .harmless import HarmlessChange
from .harmless_changes import (
    Brightness,
    ColumnNoise,
    Compression,
    Contrast,
    GaussianNoise,
    Resize,
    Rounding,
    Shift,
    UniformNoise,
    default_changes,
    harmless_for,
    one_of,
)
from .jpeg import JPEG
from .resize_pad import ResizePad
from .smoothing import TotalVariation, Wavelet
from .squeezing import BitDepth, Median, NonLocalMeans, Squeezing
from .uniform import RandomPoint

__all__ = [
    "JPEG",
    "BitDepth",
    "Brightness",
    "ColumnNoise",
    "Compression",
    "Contrast",
    "GaussianNoise",
    "HarmlessChange",
    "Median",
    "NonLocalMeans",
    "RandomPoint",
    "Resize",
    "ResizePad",
    "Rounding",
    "Shift",
    "Squeezing",
    "TotalVariation",
    "Transform",
    "UniformNoise",
    "Wavelet",
    "default_changes",
    "harmless_for",
    "one_of",
    "transform",
    "transforms",
]
