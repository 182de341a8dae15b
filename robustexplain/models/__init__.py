"""Classifiers by name. Each takes images in [0, 1] and folds its normalisation in: ``models.load("small-cnn")``."""

from . import cifar, library, small
from .classifier import Classifier, ModelSpec
from .loading import build, load

__all__ = ["Classifier", "ModelSpec", "build", "cifar", "library", "load", "small"]
