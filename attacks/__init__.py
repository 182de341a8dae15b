"""Attacks: from a system and inputs to adversarial inputs. Each combines threat model, objective and search."""

from . import manipulation
from .adaptive import DRAWS, Adaptation
from .base import Attack, Attacked
from .explanation.attaxai import Evolution
from .explanation.constant_shift import Compensated, ConstantShift, Shift, compensated
from .explanation.dombrowski import Dombrowski
from .explanation.ghorbani import GhorbaniCenter, GhorbaniRandom, GhorbaniRegion, GhorbaniTopK, RandomSign
from .explanation.ghorbani_influence import DropInfluence, GhorbaniInfluence
from .explanation.row_search import ColumnSwitch, RowSearch
from .goals import random_class_maps, random_classes, random_patch_maps
from .joint.adaptive_squeezing import AdaptiveSqueezing, SqueezedBox
from .joint.adv2 import ADV2
from .joint.auto import AUTO_VERSION, Auto
from .joint.flow import ADV2StAdv, Flow, StAdv
from .joint.hiding_patch import HidingPatch, UniversalHidingPatch
from .joint.map_pgd import MapPGD
from .known import Known
from .prediction.adapters import ART, Foolbox, Foreign, Torchattacks
from .prediction.carlini_wagner import CW, Box, TanhBox
from .prediction.deepfool import DeepFool
from .prediction.feature_deletion import FeatureDeletion
from .prediction.gd_uap import GDUAP
from .prediction.gradient import BIM, FGSM, MIFGSM, PGD, Clean, Noise
from .prediction.lbfgs import LBFGS
from .prediction.patch import AdversarialPatch, ImagePatch, Patch
from .prediction.score_based import NES, SPSA
from .prediction.square import Square
from .prediction.substitute import FittedSubstitute, Substitute
from .prediction.uap import UAP, Universal
from .search.bilevel import Bilevel, BilevelSearch
from .search.directions import BetaSchedule, Direction, EstimatedGradient, GradientDirection
from .search.loop import Plan, Search, SearchResult, Stage
from .search.universal import Fitted, UniversalSearch, fit_universal
from .search.updates import Adam, MomentumStep, NormalisedStep, SignStep, Update
from .threat import L2, Linf, Threat

__all__ = [
    "ADV2",
    "ART",
    "AUTO_VERSION",
    "BIM",
    "CW",
    "DRAWS",
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
    "Adaptation",
    "AdaptiveSqueezing",
    "AdversarialPatch",
    "Attack",
    "Attacked",
    "Auto",
    "BetaSchedule",
    "Bilevel",
    "BilevelSearch",
    "Box",
    "Clean",
    "ColumnSwitch",
    "Compensated",
    "ConstantShift",
    "DeepFool",
    "Direction",
    "Dombrowski",
    "DropInfluence",
    "EstimatedGradient",
    "Evolution",
    "FeatureDeletion",
    "Fitted",
    "FittedSubstitute",
    "Flow",
    "Foolbox",
    "Foreign",
    "GhorbaniCenter",
    "GhorbaniInfluence",
    "GhorbaniRandom",
    "GhorbaniRegion",
    "GhorbaniTopK",
    "GradientDirection",
    "HidingPatch",
    "ImagePatch",
    "Known",
    "Linf",
    "MapPGD",
    "MomentumStep",
    "Noise",
    "NormalisedStep",
    "Patch",
    "Plan",
    "RandomSign",
    "RowSearch",
    "Search",
    "SearchResult",
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
    "UniversalSearch",
    "Update",
    "compensated",
    "fit_universal",
    "manipulation",
    "random_class_maps",
    "random_classes",
    "random_patch_maps",
]
