"""Defenses: from a system to one that is harder to deceive."""

from robustexplain.interpreters import Aggregate

from .base import Defense, TrainedDefense
from .detection import (
    AnyOf,
    Detector,
    DetectorDefense,
    FeatureSqueezing,
    FeatureSqueezingDetector,
    XEnsemble,
    XEnsembleDetector,
)
from .inputs import GuidedDenoiser, InputTransform, MagNetReformer, RandomResizing, RegionVoting
from .interpreters.aggregated import AggregatedInterpreter
from .interpreters.aid import AID, ConsistentAID
from .interpreters.ava import AVA
from .interpreters.beta_smoothing import BetaSmoothing
from .interpreters.certificates import CertifiedInterpreter, MeTFADefense, SparsifiedSmoothGrad
from .interpreters.kernel_smoothing import KernelSmoothing
from .interpreters.replaced import Replaced
from .interpreters.tangent_space import TangentSpace
from .interpreters.uniform_gradient import UniformGradient
from .models import (
    ATEX,
    CURE,
    TRADES,
    ADV2Training,
    AdversarialSaliencyGuided,
    AdversarialTraining,
    AttributionRegularisers,
    DefensiveDistillation,
    EnsembleAdversarialTraining,
    FeatureDenoising,
    FineTuned,
    GradientAlignment,
    ImageAlignment,
    InfoDrop,
    InputGradientPenalty,
    InterpretabilityTraining,
    ModelDefense,
    RankThickness,
    Retrained,
    Revealing,
    RobustAttribution,
    SaliencyGuided,
    SelfExplaining,
    SmoothCurvature,
    SmoothSurface,
    Woods,
)
from .tables import KNNCAD

__all__ = [
    "AID",
    "ATEX",
    "AVA",
    "CURE",
    "KNNCAD",
    "TRADES",
    "ADV2Training",
    "AdversarialSaliencyGuided",
    "AdversarialTraining",
    "Aggregate",
    "AggregatedInterpreter",
    "AnyOf",
    "AttributionRegularisers",
    "BetaSmoothing",
    "CertifiedInterpreter",
    "ConsistentAID",
    "Defense",
    "DefensiveDistillation",
    "Detector",
    "DetectorDefense",
    "EnsembleAdversarialTraining",
    "FeatureDenoising",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "FineTuned",
    "GradientAlignment",
    "GuidedDenoiser",
    "ImageAlignment",
    "InfoDrop",
    "InputGradientPenalty",
    "InputTransform",
    "InterpretabilityTraining",
    "KernelSmoothing",
    "MagNetReformer",
    "MeTFADefense",
    "ModelDefense",
    "RandomResizing",
    "RankThickness",
    "RegionVoting",
    "Replaced",
    "Retrained",
    "Revealing",
    "RobustAttribution",
    "SaliencyGuided",
    "SelfExplaining",
    "SmoothCurvature",
    "SmoothSurface",
    "SparsifiedSmoothGrad",
    "TangentSpace",
    "TrainedDefense",
    "UniformGradient",
    "Woods",
    "XEnsemble",
    "XEnsembleDetector",
]
