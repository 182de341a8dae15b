"""Attacks: system x inputs -> inputs that deceive. Each is a short choice of threat model, objective and search."""

from .base import Attack, Attacked
from .directions import Backward, Direction, Estimate, Hardening
from .goals import random_class_maps, random_classes, random_patch_maps
from .joint import ADV2
from .prediction import BIM, FGSM, MIFGSM, PGD, Clean, Noise
from .search import Found, Plan, Search, Stage
from .threat import L2, Linf, Threat
from .updates import Adam, MomentumStep, NormalisedStep, SignStep, Update

__all__ = [
    "ADV2",
    "BIM",
    "FGSM",
    "L2",
    "MIFGSM",
    "PGD",
    "Adam",
    "Attack",
    "Attacked",
    "Backward",
    "Clean",
    "Direction",
    "Estimate",
    "Found",
    "Hardening",
    "Linf",
    "MomentumStep",
    "Noise",
    "NormalisedStep",
    "Plan",
    "Search",
    "SignStep",
    "Stage",
    "Threat",
    "Update",
    "random_class_maps",
    "random_classes",
    "random_patch_maps",
]
