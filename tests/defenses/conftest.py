"""Cheap settings of the registered defenses, and systems to defend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.utils.data import Dataset

from robustexplain.attacks import ADV2, PGD, MapPGD
from robustexplain.data import Data, take
from robustexplain.defenses import (
    AID,
    ATEX,
    AVA,
    CURE,
    MLLOO,
    TRADES,
    ADV2Training,
    AdversarialSaliencyGuided,
    AdversarialTraining,
    AttributeSteered,
    AttributionRegularisers,
    CertifiedInterpreter,
    ConsistentAID,
    Defense,
    DefensiveDistillation,
    EnsembleAdversarialTraining,
    FeatureDenoising,
    FeatureSqueezing,
    FinePruning,
    ForgeryTraining,
    GradientAlignment,
    GuidedDenoiser,
    ImageAlignment,
    InfoDrop,
    InputGradientPenalty,
    InterpretabilityTraining,
    InterpreterDisagreement,
    KernelSmoothing,
    MagNet,
    MagNetReformer,
    MapConsistency,
    MeTFADefense,
    OutOfDistribution,
    RandomResizing,
    RankThickness,
    RegionMargin,
    RegionVoting,
    Replaced,
    Retrained,
    Revealing,
    RobustAttribution,
    SafetyNet,
    SaliencyCNN,
    SaliencyGuided,
    SelfExplaining,
    SHAPSignatures,
    SmoothCurvature,
    SmoothSurface,
    SparsifiedSmoothGrad,
    TangentSpace,
    UniformGradient,
    Woods,
    XEnsemble,
)
from robustexplain.defenses.models.inner_attacks import Divergence
from robustexplain.interpreters import RTS, MaskObjective, RTSTraining, train_rts
from robustexplain.models import Classifier
from robustexplain.registry import Entry
from robustexplain.training import Training

EPS = 0.125
# On so little training the masks stay all ones, unless their size weighs more.
SMALL = MaskObjective(average=10.0)
INNER = ADV2(EPS, steps=8, step_size=0.03, warm_start=0.5)
BRIEF = Training(epochs=1, batch_size=20, lr=1e-3)
WITHIN = PGD(EPS, 2, 0.05, random_start=True)
SEEN = PGD(EPS, 4, 0.05)
CHEAP: dict[str, Defense] = {
    "aga": GradientAlignment(training=BRIEF),
    "art": ImageAlignment(training=BRIEF, attack=WITHIN),
    "input-gradient-penalty": InputGradientPenalty(training=BRIEF),
    "r2et": RankThickness(training=BRIEF),
    "rar": RobustAttribution(training=BRIEF, attack=WITHIN, points=3, inner_points=2),
    "smooth-curvature": SmoothCurvature(training=BRIEF),
    "ssr": SmoothSurface(training=BRIEF, classes=3),
    "ava": AVA(neighbours=3, images=20),
    "kernel-smoothing": KernelSmoothing(samples=4),
    "uniform-gradient": UniformGradient(samples=4),
    "replaced": Replaced({"name": "relex", "samples": 2, "steps": 3}),  # type: ignore[arg-type]
    "tangent-space": TangentSpace(neighbours=4, images=20),
    "aid": AID(attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20)),
    "certified": CertifiedInterpreter(samples=12, choose=2, tau=0.6, alpha=0.5, grid=4),
    "aid-consistent": ConsistentAID(attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20)),
    "attribute-steered": AttributeSteered(),
    "magnet": MagNet((10.0,), training=Training(epochs=2, batch_size=20, lr=1e-2)),
    "out-of-distribution": OutOfDistribution("knn", 4),
    "region-voting-margin": RegionMargin(votes=6, step=0.05),
    "safetynet": SafetyNet(SEEN),
    "shap-signatures": SHAPSignatures(SEEN, 8, Training(epochs=2, batch_size=20)),
    "cure": CURE(BRIEF),
    "distillation": DefensiveDistillation(training=BRIEF),
    "ensemble-at": EnsembleAdversarialTraining(("small-cnn",), BRIEF, training=BRIEF),
    "feature-denoising": FeatureDenoising(attack=PGD(EPS, 2, 0.05), training=BRIEF),
    "fine-pruning": FinePruning(training=BRIEF),
    "feature-squeezing": FeatureSqueezing(("median-2", "bit-depth-3")),
    "forgery-detector": ForgeryTraining(
        attack=MapPGD(EPS, steps=4), rounds=1, training=Training(epochs=1, batch_size=20)
    ),
    "hgd": GuidedDenoiser(PGD(EPS, 2, 0.05), 4, 2, BRIEF),
    "magnet-reformer": MagNetReformer(training=BRIEF),
    "random-resizing": RandomResizing(3, 4),
    "region-voting": RegionVoting(12, 0.7),
    "int": InterpretabilityTraining(BRIEF, attack=WITHIN, ramp=(0.0, 0.5)),
    "interpreter-disagreement": InterpreterDisagreement(("gradient", "cam")),
    "map-consistency": MapConsistency(),
    "ml-loo": MLLOO(SEEN, patch=16, training=Training(epochs=2, batch_size=20)),
    "saliency-cnn": SaliencyCNN(attack=SEEN, training=Training(epochs=1, batch_size=20)),
    "metfa": MeTFADefense(samples=6),
    "adv2-at": ADV2Training(
        interpreters=("gradient",), attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20, lr=1e-3)
    ),
    "asgt": AdversarialSaliencyGuided(attack=PGD(EPS, 2, 0.05), training=BRIEF),
    "attribution-regularisers": AttributionRegularisers(attack=WITHIN, points=2, inner_points=1, training=BRIEF),
    "atex": ATEX(samples=2, draws=2, training=BRIEF),
    "infodrop": InfoDrop(training=BRIEF, after=BRIEF),
    "saliency-guided": SaliencyGuided(training=BRIEF),
    "woods": Woods(attack=PGD(1.0, 2, 0.5, norm="l2"), delta=None, training=BRIEF),
    "pgd-at": AdversarialTraining(attack=PGD(EPS, 2, 0.05), training=Training(epochs=1, batch_size=20, lr=1e-3)),
    "sparsified-smoothgrad": SparsifiedSmoothGrad(samples=12, alpha=0.5, grid=4, bound="clopper-pearson"),
    "revealing": Revealing(
        ("gradient",), attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20, lr=1e-3)
    ),
    "senn": SelfExplaining(classes=1, training=Training(epochs=1, batch_size=20, lr=1e-3)),
    "retrained": Retrained(BRIEF),
    "trades": TRADES(attack=Divergence(EPS, 2, 0.05), training=BRIEF),
    "x-ensemble": XEnsemble(attack=PGD(EPS, 4, 0.05), training=Training(epochs=1, batch_size=20), trees=10),
}


@pytest.fixture(scope="session")
def cheap() -> Callable[[Entry], Defense]:
    """A registered defense with few steps, if it needs to be told."""

    def make(entry: Entry) -> Defense:
        defense: Defense = CHEAP.get(entry.name) or entry.build()
        return defense

    return make


@pytest.fixture(scope="session")
def few(digits: Data) -> Dataset[Any]:
    """Forty digits of the defense's own."""
    return take(digits.defense, 40)


@pytest.fixture(scope="session")
def rts(trained: Classifier, digits: Data) -> RTS:
    """An RTS trained on 200 digits for a few seconds."""
    settings = RTSTraining(SMALL, Training(epochs=4, batch_size=10, lr=4e-3), width=8, levels=2)
    return train_rts(trained, take(digits.defense, 200), settings)
