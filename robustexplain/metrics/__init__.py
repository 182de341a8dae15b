"""Metrics: a number per sample."""

from .base import Faithfulness, Localisation, MapMetric, MapScore, Metric, Visibility
from .cell import Cell
from .consistency import Consistency, incoherent_pairs
from .correlation import Kendall, Pearson, Spearman
from .curvature import Curvature
from .detection import auc, detected_at, threshold_at
from .distance import L1, L2, MSE, Cosine, IoU
from .fairness import Unfairness, unfairness
from .faithfulness import AOPC, Deletion, Insertion, LeastRelevantFirst
from .features import FeatureFirst, FeatureRank, FeatureShare
from .fidelity import Infidelity, Sufficiency
from .localisation import LocalisationError, MassInside, PointingGame, regions_from_boxes
from .locality import LENS
from .manipulation import (
    BiTarget,
    Entropy,
    FooledActive,
    FooledCenter,
    FooledLocation,
    FooledTopK,
    Fooling,
    LocationCorrelation,
    SignCorrelation,
    bi_target_correlation,
    fooling_success_rate,
)
from .normalised import NormalisedAOPC
from .place import CenterShift, EarthMover, TopK
from .prediction import accuracy, confidence, hit, joint_success
from .relative_stability import RelativeInputStability, RelativeOutputStability, RelativeRepresentationStability
from .road import ROAD
from .scores import Complexity, Sparseness
from .stability import AvgSensitivity, LocalLipschitz, MaxSensitivity, Stability, stabilities
from .structure import HOG, SSIM
from .visibility import LPIPS, ImageSSIM, Perturbation

JUDGED = tuple(kind for kind in Metric.__subclasses__() if kind.of_cell is not Metric.of_cell)
"""The kinds that a cell of the matrix can measure: the others need regions, or maps of another model."""

__all__ = [
    "AOPC",
    "HOG",
    "JUDGED",
    "L1",
    "L2",
    "LENS",
    "LPIPS",
    "MSE",
    "ROAD",
    "SSIM",
    "AvgSensitivity",
    "BiTarget",
    "Cell",
    "CenterShift",
    "Complexity",
    "Consistency",
    "Cosine",
    "Curvature",
    "Deletion",
    "EarthMover",
    "Entropy",
    "Faithfulness",
    "FeatureFirst",
    "FeatureRank",
    "FeatureShare",
    "FooledActive",
    "FooledCenter",
    "FooledLocation",
    "FooledTopK",
    "Fooling",
    "ImageSSIM",
    "Infidelity",
    "Insertion",
    "IoU",
    "Kendall",
    "LeastRelevantFirst",
    "LocalLipschitz",
    "Localisation",
    "LocalisationError",
    "LocationCorrelation",
    "MapMetric",
    "MapScore",
    "MassInside",
    "MaxSensitivity",
    "Metric",
    "NormalisedAOPC",
    "Pearson",
    "Perturbation",
    "PointingGame",
    "RelativeInputStability",
    "RelativeOutputStability",
    "RelativeRepresentationStability",
    "SignCorrelation",
    "Sparseness",
    "Spearman",
    "Stability",
    "Sufficiency",
    "TopK",
    "Unfairness",
    "Visibility",
    "accuracy",
    "auc",
    "bi_target_correlation",
    "confidence",
    "detected_at",
    "fooling_success_rate",
    "hit",
    "incoherent_pairs",
    "joint_success",
    "regions_from_boxes",
    "stabilities",
    "threshold_at",
    "unfairness",
]
