"""Attacks: system x inputs -> inputs that deceive. Each is a short choice of threat model, objective and search."""

from .base import Attack, Attacked
from .goals import random_class_maps, random_classes, random_patch_maps
from .joint import ADV2
from .prediction import FGSM, PGD, Clean, Noise
from .search import NormalisedStep, Search, SignStep, Stage
from .threat import L2, Linf, Threat

__all__ = [
    "ADV2",
    "FGSM",
    "L2",
    "PGD",
    "Attack",
    "Attacked",
    "Clean",
    "Linf",
    "Noise",
    "NormalisedStep",
    "Search",
    "SignStep",
    "Stage",
    "Threat",
    "random_class_maps",
    "random_classes",
    "random_patch_maps",
]
