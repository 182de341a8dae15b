"""Detectors: they score how suspicious an input is, with an alarm threshold at a calibrated false-alarm rate."""

from .any_of import AnyOf
from .attribute_steered import AttributeSteered, AttributeSteeredDetector
from .base import Detector, DetectorDefense
from .feature_squeezing import FeatureSqueezing, FeatureSqueezingDetector
from .forest import Forest
from .forgery_detector import ForgeryDetector, ForgeryTraining
from .interpreter_disagreement import InterpreterDisagreement, InterpreterDisagreementDetector
from .learned import FeatureNetwork
from .magnet import MagNet, MagNetDetector
from .map_consistency import MapConsistency, MapConsistencyDetector
from .map_network import MapNetwork
from .ml_loo import MLLOO, MLLOODetector
from .out_of_distribution import OutOfDistribution, OutOfDistributionDetector
from .region_margin import RegionMargin, RegionMarginDetector
from .safetynet import SafetyNet, SafetyNetDetector
from .saliency_cnn import SaliencyCNN, SaliencyCNNDetector, SaliencyNetwork
from .shap_signatures import SHAPSignatures, SHAPSignaturesDetector
from .x_ensemble import XEnsemble, XEnsembleDetector

__all__ = [
    "MLLOO",
    "AnyOf",
    "AttributeSteered",
    "AttributeSteeredDetector",
    "Detector",
    "DetectorDefense",
    "FeatureNetwork",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "Forest",
    "ForgeryDetector",
    "ForgeryTraining",
    "InterpreterDisagreement",
    "InterpreterDisagreementDetector",
    "MLLOODetector",
    "MagNet",
    "MagNetDetector",
    "MapConsistency",
    "MapConsistencyDetector",
    "MapNetwork",
    "OutOfDistribution",
    "OutOfDistributionDetector",
    "RegionMargin",
    "RegionMarginDetector",
    "SHAPSignatures",
    "SHAPSignaturesDetector",
    "SafetyNet",
    "SafetyNetDetector",
    "SaliencyCNN",
    "SaliencyCNNDetector",
    "SaliencyNetwork",
    "XEnsemble",
    "XEnsembleDetector",
]
