"""Attacks: system x inputs -> inputs that deceive. Each is a short choice of threat model, objective and search."""

from . import manipulation
from .adapters import ART, Foolbox, Foreign, Torchattacks
from .base import Attack, Attacked
from .bilevel import Bilevel, BilevelSearch
from .blackbox import NES, SPSA
from .deepfool import DeepFool
from .deletion import FeatureDeletion
from .directions import Backward, Direction, Estimate, Hardening
from .evolution import Evolution
from .explanation import (
    GhorbaniCenter,
    GhorbaniRandom,
    GhorbaniRegion,
    GhorbaniTopK,
    RandomSign,
)
from .gduap import GDUAP
from .goals import random_class_maps, random_classes, random_patch_maps
from .hiding import HidingPatch, UniversalHidingPatch
from .influence import DropInfluence, GhorbaniInfluence
from .joint import ADV2
from .lbfgs import LBFGS
from .minimal import CW, Box, TanhBox
from .patch import AdversarialPatch, ImagePatch, Patch
from .prediction import BIM, FGSM, MIFGSM, PGD, Clean, Noise
from .search import Found, Plan, Search, Stage
from .shared import Fitted, SharedSearch, fit_universal
from .shift import Compensated, ConstantShift, Shift, compensated
from .spatial import ADV2StAdv, Flow, StAdv
from .square import Square
from .squeezing import AdaptiveSqueezing, SqueezedBox
from .substitute import FittedSubstitute, Substitute
from .target_map import Dombrowski
from .threat import L2, Linf, Threat
from .universal import UAP, Universal
from .updates import Adam, MomentumStep, NormalisedStep, SignStep, Update

__all__ = [
    "ADV2",
    "ART",
    "BIM",
    "CW",
    "FGSM",
    "GDUAP",
    "L2",
    "LBFGS",
    "MIFGSM",
    "NES",
    "PGD",
    "SPSA",
    "UAP",
    "ADV2StAdv",
    "Adam",
    "AdaptiveSqueezing",
    "AdversarialPatch",
    "Attack",
    "Attacked",
    "Backward",
    "Bilevel",
    "BilevelSearch",
    "Box",
    "Clean",
    "Compensated",
    "ConstantShift",
    "DeepFool",
    "Direction",
    "Dombrowski",
    "DropInfluence",
    "Estimate",
    "Evolution",
    "FeatureDeletion",
    "Fitted",
    "FittedSubstitute",
    "Flow",
    "Foolbox",
    "Foreign",
    "Found",
    "GhorbaniCenter",
    "GhorbaniInfluence",
    "GhorbaniRandom",
    "GhorbaniRegion",
    "GhorbaniTopK",
    "Hardening",
    "HidingPatch",
    "ImagePatch",
    "Linf",
    "MomentumStep",
    "Noise",
    "NormalisedStep",
    "Patch",
    "Plan",
    "RandomSign",
    "Search",
    "SharedSearch",
    "Shift",
    "SignStep",
    "Square",
    "SqueezedBox",
    "StAdv",
    "Stage",
    "Substitute",
    "TanhBox",
    "Threat",
    "Torchattacks",
    "Universal",
    "UniversalHidingPatch",
    "Update",
    "compensated",
    "fit_universal",
    "manipulation",
    "random_class_maps",
    "random_classes",
    "random_patch_maps",
]
