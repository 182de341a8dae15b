"""Classifiers by name, normalisation folded in: ``models.load("small-cnn")`` takes images in [0, 1].

``models.load("mlp", in_features=9)`` takes a table's rows in their own units; ``models.Estimator(fitted)`` makes a
classifier of scikit-learn one of ours.
"""

from ..door import admit, answer
from . import cifar, hugging_face, library, rules, senn, small, tables
from .around import innermost
from .classifier import Classifier, ModelSpec
from .denoised import DenoisingBlock, denoised, stage_ends
from .estimator import Estimator
from .loading import build, has_random_weights, load
from .output import BinaryLogit, Output, adapted
from .own import load_own
from .rebuilding import describe, rebuild
from .reformed import AutoEncoder, DenoisingUNet, Reformed, Reformer
from .rules import FeatureRule
from .tables import TableClassifier
from .transformed import Transformed, with_transforms
from .voted import Voted

__all__ = [
    "AutoEncoder",
    "BinaryLogit",
    "Classifier",
    "DenoisingBlock",
    "DenoisingUNet",
    "Estimator",
    "FeatureRule",
    "ModelSpec",
    "Output",
    "Reformed",
    "Reformer",
    "TableClassifier",
    "Transformed",
    "Voted",
    "adapted",
    "admit",
    "answer",
    "build",
    "cifar",
    "denoised",
    "describe",
    "has_random_weights",
    "hugging_face",
    "innermost",
    "library",
    "load",
    "load_own",
    "rebuild",
    "rules",
    "senn",
    "small",
    "stage_ends",
    "tables",
    "with_transforms",
]
