"""Transforms of images, by name: what stands in front of a model, and what detectors and audits look through."""

from .base import Transform, transform, transforms
from .jpeg import JPEG
from .resize_pad import ResizePad
from .squeezing import BitDepth, Median, NonLocalMeans, Squeezing

__all__ = [
    "JPEG",
    "BitDepth",
    "Median",
    "NonLocalMeans",
    "ResizePad",
    "Squeezing",
    "Transform",
    "transform",
    "transforms",
]
