"""Each detector finds what its paper's attack made, computes what its formula says, and has a direction for evaders."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import iqr
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain.attacks import PGD, Attack, DeepFool, GhorbaniTopK, MapPGD, random_classes
from robustexplain.attacks.adaptive import draws_for
from robustexplain.data import Data, take
from robustexplain.defenses import (
    MLLOO,
    AnyOf,
    AttributeSteered,
    AttributeSteeredDetector,
    Defense,
    DetectorDefense,
    ForgeryTraining,
    InterpreterDisagreement,
    MagNet,
    MagNetDetector,
    MapConsistency,
    MapConsistencyDetector,
    OutOfDistribution,
    RegionMargin,
    RegionMarginDetector,
    SafetyNet,
    SaliencyCNN,
    SHAPSignatures,
    XEnsemble,
    XEnsembleDetector,
)
from robustexplain.defenses.detection import FeatureSqueezingDetector, Forest, MapNetwork
from robustexplain.defenses.detection.directed import directed, plain
from robustexplain.defenses.detection.learned import NamedAttack
from robustexplain.defenses.detection.ml_loo import spreads
from robustexplain.defenses.detection.penultimate import penultimate
from robustexplain.errors import (
    FieldError,
    InputError,
    MissingDataError,
    NotDifferentiableError,
    RunMismatchError,
    ZeroDirectionWarning,
)
from robustexplain.interpreters import CAM, LIME, Gradient, InterpreterSpec, SmoothGrad
from robustexplain.metrics import auc
from robustexplain.models import AutoEncoder, Classifier
from robustexplain.objectives import Goal, Observation
from robustexplain.registry import DEFENSES, INTERPRETERS, Entry
from robustexplain.training import Session, Training
from robustexplain.transforms import Brightness, Compression, Contrast

EPS = 0.125
LONG = PGD(EPS, 10, 0.03)
BRIEF = Training(epochs=6, batch_size=32, lr=5e-3)
DETECTORS = [e for e in DEFENSES if isinstance(e.build, type) and issubclass(e.build, DetectorDefense)]


# --- what the papers claim ---

CASES: dict[str, tuple[Defense, Attack, float]] = {
    "ml-loo": (MLLOO(LONG, patch=8, training=BRIEF), LONG, 0.95),
    "map-consistency": (MapConsistency(), LONG, 0.9),
    "interpreter-disagreement": (InterpreterDisagreement(("gradient", "cam", "lrp")), LONG, 0.8),
    "saliency-cnn": (SaliencyCNN(attack=LONG, training=BRIEF), LONG, 0.95),
    "forgery-detector": (ForgeryTraining(attack=MapPGD(EPS, steps=5), rounds=1, training=BRIEF), LONG, 0.9),
    "magnet": (MagNet((10.0,), training=Training(epochs=20, batch_size=20, lr=2e-2)), LONG, 0.75),
    "safetynet": (SafetyNet(LONG), LONG, 0.95),
    "shap-signatures": (SHAPSignatures(LONG, training=BRIEF), LONG, 0.95),
    "out-of-distribution": (OutOfDistribution(), LONG, 0.95),
    "region-voting-margin": (RegionMargin(votes=20, step=0.05), DeepFool(), 0.85),
}


@pytest.mark.parametrize("name", CASES)
def test_it_finds_what_the_attack_made(
    name: str, trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    defense, attack, least = CASES[name]
    system = rx.System(trained, Gradient(trained))
    watched = defense(system, take(digits.defense, 150))
    x, y = judged
    made = attack(system, x, y, random_classes(x, y, 10))
    with torch.no_grad():
        clean, attacked = watched(x), watched(made.x[made.success])
    assert clean.score is not None
    assert attacked.score is not None
    print(f"{name}: AUC {auc(clean.score, attacked.score):.3f}")
    assert auc(clean.score, attacked.score) >= least
    # 30 inputs calibrate: the rate itself has a standard error of four points, and drifts with their choice.
    assert float(clean.alarm.float().mean()) <= 0.2  # type: ignore[union-attr]


def test_the_attribute_steered_control_finds_nothing_of_a_confident_attack(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    system = rx.System(trained, Gradient(trained))
    watched = AttributeSteered()(system, take(digits.defense, 100))
    x, y = judged
    made = LONG(system, x, y, random_classes(x, y, 10)).x
    assert auc(watched(x).score, watched(made).score) < 0.2  # type: ignore[arg-type]


def test_draws_of_a_score_are_not_averaged_twice(trained: Classifier) -> None:
    system, changes = rx.System(trained, CAM(trained)), (Brightness(),)
    few, many = (RegionMarginDetector(trained, 0.1, votes) for votes in (3, 100))
    consistent = MapConsistencyDetector(CAM(trained), changes, copies=5)
    found = [draws_for(replace(system, detector=d)) for d in (few, many, consistent, AnyOf((few, many)))]
    assert found == [4, 2, 2, 4]


def test_each_round_attacks_the_detector_of_the_one_before(
    trained: Classifier, few: Dataset[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []
    inputs = MapPGD.inputs

    def watch(self: MapPGD, system: rx.System, *args: Any) -> Any:
        seen.append((system.detector is not None, self.adapt.evade))
        return inputs(self, system, *args)

    monkeypatch.setattr(MapPGD, "inputs", watch)
    defense = ForgeryTraining(attack=MapPGD(EPS, steps=2), rounds=2, training=replace(BRIEF, epochs=1))
    detector = defense(rx.System(trained, CAM(trained)), few).detector
    assert seen == [(False, 0.0), (True, 1.0), (True, 1.0)]
    assert all(not p.requires_grad for p in detector.network.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["forgery-detector", "magnet", "ml-loo"])
def test_a_training_that_was_interrupted_is_taken_up_again(
    name: str,
    trained: Classifier,
    few: Dataset[Any],
    judged: tuple[Tensor, Tensor],
    cheap: Callable[[Entry], Defense],
    tmp_path: Path,
) -> None:
    defense, system = cheap(DEFENSES.get(name)), rx.System(trained, CAM(trained))
    whole = defense(system, few, Session(folder=tmp_path))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert len(files) == (1 if name == "ml-loo" else 2)
    max(files).unlink()  # of the last training alone
    resumed = defense(system, few, Session(folder=tmp_path))
    assert torch.equal(whole(judged[0]).score, resumed(judged[0]).score)  # type: ignore[arg-type]
    kept = [p for p, made in files.items() if p.stat().st_mtime_ns == made]
    assert kept == sorted(files)[:-1], "what was trained already was trained again"


class Twin(MapPGD):
    """An attack with the fields of another."""


@pytest.mark.parametrize("other", [{"changes": (Contrast(0.5),)}, {"attack": Twin(EPS, steps=4)}])
def test_a_detector_of_other_parts_with_the_same_fields_is_another_training(
    other: dict[str, Any], trained: Classifier, few: Dataset[Any], tmp_path: Path
) -> None:
    once = Training(epochs=1, batch_size=20)
    defense = ForgeryTraining(attack=MapPGD(EPS, steps=4), rounds=1, training=once, changes=(Brightness(0.5),))
    system, session = rx.System(trained, CAM(trained)), Session(folder=tmp_path)
    defense(system, few, session)
    with pytest.raises(RunMismatchError, match="another training"):
        replace(defense, **other)(system, few, session)


# --- what all of them keep ---


@pytest.mark.parametrize("entry", DETECTORS, ids=lambda e: e.name)
def test_a_score_is_of_its_sample_alone_and_has_a_direction(
    entry: Entry,
    trained: Classifier,
    few: Dataset[Any],
    judged: tuple[Tensor, Tensor],
    cheap: Callable[[Entry], Defense],
) -> None:
    defense = cheap(entry)
    detector: Any = defense(rx.System(trained, Gradient(trained)), few).detector
    x = judged[0][:6]
    together = detector.score(x)
    apart = torch.cat([detector.score(part) for part in x.split(1)])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    soft = detector.soft_score(leaf)
    (gradient,) = torch.autograd.grad(soft.sum(), leaf)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    torch.testing.assert_close(detector.soft_score(x), soft.detach(), rtol=1e-4, atol=1e-5)
    step = (x + 2e-3 * gradient.sign()).clamp(0, 1)
    assert bool((detector.soft_score(step) - detector.soft_score(x)).detach().sum() > 0)
    assert bool(detector.score(step).isfinite().all())


def test_maps_without_a_gradient_are_refused_to_an_attack_that_needs_one(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    detector = MapConsistencyDetector(LIME(trained, samples=4), (Brightness(),), threshold=-1.0)
    system = rx.System(trained, CAM(trained), detector)
    x, y = judged[0][:2], judged[1][:2]
    with pytest.raises(NotDifferentiableError, match=r"maps of LIME, which have no gradient.*spsa.*, cam,"):
        PGD(EPS, 2).adapted(system)(system, x, y)


class Silent(nn.Module):
    """A detector whose soft score does not move."""

    threshold, soft_threshold = -1.0, -1.0

    def score(self, x: Tensor) -> Tensor:
        return self.soft_score(x).detach()

    def soft_score(self, x: Tensor) -> Tensor:
        return (0 * x).flatten(1).sum(1)


def test_an_attack_on_a_score_without_a_direction_says_so(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    system = rx.System(trained, CAM(trained), Silent())
    x, y = judged[0][:2], judged[1][:2]
    with pytest.warns(ZeroDirectionWarning, match="score has no gradient for 2 of 2 samples"):
        PGD(EPS, 2).adapted(system)(system, x, y)


BUILT = [
    e.name
    for e in INTERPRETERS
    if e.name not in ("attention-rollout", "theta")  # of other networks
    and getattr(e.build, "differentiable", False) is True
    and getattr(e.build, "iterative", True) is False
    and "images" in getattr(e.build, "takes", ())
    and InterpreterSpec(e.name).refusal is None
]


@pytest.mark.parametrize("name", BUILT)
def test_x_ensemble_has_a_direction_with_every_kind_of_map(
    name: str, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 1, generator=draws)
    forest = Forest.fit(logits, (logits[:, 0] > 0).long(), 3, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = XEnsembleDetector((InterpreterSpec(name).build(trained),), (MapNetwork(),), forest)
    x = judged[0][:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(detector.soft_score(x).sum(), x)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


# --- what they compute, by other means ---


def test_ml_loo_is_scipys_range_of_differences_with_one_patch_left_out(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, patch = judged[0][:2], 12  # does not divide the side of 32
    found = spreads(trained, ("net.features.2",), x, patch)
    layer = trained.get_submodule("net.features.2")

    @torch.no_grad()
    def units(image: Tensor, target: int | None = None) -> np.ndarray:
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
        logits = trained(image[None])[0]
        handle.remove()
        best = int(logits.argmax()) if target is None else target
        return np.concatenate([kept[0][0].mean((1, 2)), logits, [logits.softmax(0)[best]]])

    for i, image in enumerate(x):
        whole, target, rows = units(image), int(trained(image[None]).argmax()), []
        for top in range(0, 32, patch):
            for left in range(0, 32, patch):
                without = image.clone()
                without[:, top : top + patch, left : left + patch] = 0
                rows.append(whole - units(without, target))
        assert len(rows) == 9
        np.testing.assert_allclose(found[i].detach(), iqr(np.stack(rows), axis=0), rtol=1e-3, atol=1e-5)


def test_map_consistency_is_the_mean_distance_of_shown_maps(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x = judged[0][:3]
    changes = Brightness(0.3), Compression(20)
    interpreter = Gradient(trained)
    found = MapConsistencyDetector(interpreter, changes, 2)
    with torch.no_grad():
        classes, own = trained(x).argmax(1), ops.minmax(interpreter(x))
        copies = [found._copy(change, x, i) for i in range(2) for change in changes]
        apart = [(own - ops.minmax(interpreter(copy, classes))).abs().mean((1, 2)) for copy in copies]
    torch.testing.assert_close(found.score(x), torch.stack(apart).mean(0))
    torch.testing.assert_close(found.score(x, rx.System(trained, interpreter)(x)), found.score(x))
    assert not torch.equal(copies[0], copies[2]), "the second copy is the first again"
    other = found.redrawn(7)
    assert not torch.equal(other.score(x), found.score(x))
    # A change without a derivative passes the copy's own gradient on.
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found._copy(Compression(20), leaf, 0).sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(x))


def test_disagreement_is_standardised_within_the_predicted_class(
    trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    defense = InterpreterDisagreement(("gradient", "cam"), grid=8, samples=40)
    detector: Any = defense(rx.System(trained, Gradient(trained)), few).detector
    x = judged[0][:4]
    with torch.no_grad():
        classes = trained(x).argmax(1)
        maps = [F.avg_pool2d(i(x).abs()[:, None], 4).flatten(1) for i in detector.interpreters]
    one, other = (m / m.sum(1, keepdim=True) for m in maps)
    apart = (one - other).abs().sum(1) / 2
    expected = ((apart - detector.mean[classes, 0]) / detector.std[0]).abs()
    torch.testing.assert_close(detector.score(x), expected)
    assert len(detector.mean[:, 0].unique()) > 3, "the classes have one mean"
    assert list(detector.reasons(x)) == ["score", "gradient and cam"]


def test_scores_that_are_small_numbers_are_evaded_by_a_margin_of_their_size(
    trained: Classifier, judged: tuple[Tensor, Tensor], digits: Data
) -> None:
    defense, _, _ = CASES["magnet"]
    system = defense(rx.System(trained, Gradient(trained)), take(digits.defense, 150))
    assert system.detector is not None
    hinges = [part.part for _, part in system.detector.evasion(1.0).terms()]  # type: ignore[attr-defined]
    assert len(hinges) == 3
    for hinge in hinges:
        assert 0 < hinge.margin < hinge.threshold
        # Not in the loss of an input that is far from ringing.
        calm = Observation(judged[0][:2], torch.zeros(2, 10), score=torch.full((2,), hinge.threshold / 3))
        goal = Goal(judged[0][:2], judged[1][:2])
        assert float(replace(hinge, watch=None).loss(calm, goal).amax()) == 0


@pytest.mark.parametrize("name", [name for name in CASES if name != "map-consistency"])
def test_a_system_in_float64_has_a_detector_as_well(name: str, trained: Classifier, digits: Data) -> None:
    defense, _, _ = CASES[name]
    model = copy.deepcopy(trained).double()
    kind = CAM if name == "forgery-detector" else Gradient
    system = defense(rx.System(model, kind(model)), take(digits.defense, 60))
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    assert system(x).score is not None
    score = system.detector.soft_score(x)  # type: ignore[union-attr]
    (slope,) = torch.autograd.grad(score.sum(), x)
    assert slope.dtype == torch.float64
    assert bool(slope.isfinite().all())


def test_magnets_scores_are_those_of_the_paper(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, autoencoder = judged[0][:3], AutoEncoder(1).eval()
    with torch.no_grad():
        again = autoencoder(x)
        p, q = ((trained(image) / 10).softmax(1).double().numpy() for image in (x, again))
    middle = (p + q) / 2
    expected = ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)) / 2
    divergence = MagNetDetector(trained, autoencoder, "divergence", temperature=10.0)
    np.testing.assert_allclose(divergence.score(x), expected, rtol=1e-4, atol=1e-7)
    seen = rx.System(trained, CAM(trained))(x)
    np.testing.assert_allclose(divergence.score(x, seen), expected, rtol=1e-4, atol=1e-7)
    for power in (1.0, 2.0):
        error = MagNetDetector(trained, autoencoder, p=power).score(x)
        torch.testing.assert_close(error, (x - again).abs().pow(power).mean((1, 2, 3)))
    assert again.shape == x.shape
    assert AutoEncoder(3)(torch.rand(1, 3, 15, 17)).shape == (1, 3, 15, 17)


def test_safetynets_score_is_scikit_learns_and_its_codes_are_counts(
    trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.svm import SVC

    machines: list[Any] = []
    fit = SVC.fit
    monkeypatch.setattr(SVC, "fit", lambda self, *args: machines.append(fit(self, *args)) or machines[-1])
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    detector: Any = SafetyNet(LONG)(rx.System(trained, CAM(trained)), few).detector
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    np.testing.assert_equal(after, before, err_msg="numpy's global random state stays")
    x = judged[0][:8]
    units = penultimate(trained, detector.layer, x)[0].detach()
    codes = np.stack([(units[:, u, None] > detector.edges[u]).sum(1) for u in range(units.shape[1])], 1)
    assert set(np.unique(codes)) == {0, 1, 2, 3}
    expected = machines[0].decision_function(codes.astype(float))
    np.testing.assert_allclose(detector.score(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(detector.soft_score(x), detector.score(x), rtol=1e-4, atol=1e-5)


def test_signatures_add_up_to_the_logits(trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]) -> None:
    detector: Any = SHAPSignatures(LONG, training=BRIEF)(rx.System(trained, CAM(trained)), few).detector
    x = judged[0][:5]
    with torch.no_grad():
        found, logits = detector.signature(x), trained(x)
        background = trained.get_submodule(detector.layer)(detector.mean[None])
    assert found.shape == (5, 10, 64)
    torch.testing.assert_close(found.sum(2), logits - background, rtol=1e-4, atol=1e-4)


def test_the_margin_is_one_less_the_lead_among_points_of_the_cube(
    trained: Classifier, judged: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, drawn = judged[0][:3], []
    detector = RegionMarginDetector(trained, 0.4, 9)
    trained.register_forward_hook(watch := lambda module, args, output: drawn.append((args[0], output.argmax(1))))
    score = detector.score(x)
    monkeypatch.setattr("robustexplain.defenses.detection.region_margin.AT_ONCE", 6)
    assert torch.equal(detector.score(x), score), "the score depends on how many points are looked at at once"
    trained._forward_hooks.clear()
    del watch
    points, votes = (part.unflatten(0, (3, 9)) for part in drawn[0])
    assert float((points - x[:, None]).abs().amax()) <= 0.4 + 1e-6
    assert 0 <= float(points.amin()) <= float(points.amax()) <= 1
    for i in range(3):
        counts = np.sort(np.bincount(votes[i].numpy(), minlength=10))
        assert float(score[i]) == pytest.approx(1 - (counts[-1] - counts[-2]) / 9)
    assert len(score.unique()) > 1
    assert not torch.equal(detector.redrawn(1).soft_score(x), detector.soft_score(x))


def test_steering_weakens_others_and_strengthens_witnesses(trained: Classifier) -> None:
    detector = AttributeSteeredDetector(trained, (), (), alpha=2.0, beta=3.0)
    means, witness = torch.tensor([[1.0, 3.0, 4.0, 1.5]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    # Witnesses 1 and 3: mean 2, deviation 1, least 1; of the others only 4 is above the mean.
    expected = [2.15 - 1, 2.15 - np.exp(-2 / 3), np.exp(-2 / 2), 1.0]
    np.testing.assert_allclose(detector._factors(means, witness)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("by", ["energy", "max-logit", "max-softmax", "mahalanobis", "vim", "knn"])
def test_the_stand_in_of_the_librarys_score_is_the_score(
    by: Any, trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    detector: Any = OutOfDistribution(by, 3)(rx.System(trained, CAM(trained)), few).detector
    x = judged[0]
    torch.testing.assert_close(detector.soft_score(x), detector.score(x), rtol=1e-3, atol=1e-3)
    noise = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    if by in ("mahalanobis", "knn"):
        assert float(detector.score(noise).mean()) > float(detector.score(x).mean())


def test_a_stand_in_for_gradients_keeps_logits_and_nearly_the_maps(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, interpreter = judged[0][:4], Gradient(trained)
    one, other = plain(interpreter, x), directed(interpreter, x)
    torch.testing.assert_close(one.logits, other.logits)
    a, b = one.maps.detach().flatten(), other.maps.detach().flatten()
    assert float(F.cosine_similarity(a, b, 0)) > 0.9
    assert not torch.equal(a, b)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLLOO(GhorbaniTopK()), r"MLLOO\.attack must change the prediction, and GhorbaniTopK keeps it"),
        (lambda: SafetyNet("pgd"), r"SafetyNet\.attack must be an attack, got 'pgd'"),  # type: ignore[arg-type]
        (lambda: XEnsemble(also=(GhorbaniTopK(),)), r"XEnsemble\.also must change the prediction"),
        (lambda: MLLOO(patch=0), r"MLLOO\.patch must be at least 1, or 'auto', got 0"),
        (lambda: InterpreterDisagreement(("cam",)), r"InterpreterDisagreement\.members must be two or more, got 1"),
        (lambda: MagNet((0.0,)), r"MagNet\.temperatures must be above 0, got \(0\.0,\)"),
        (lambda: RegionMargin(step=0.0), r"RegionMargin\.step must be above 0"),
        (lambda: AttributeSteered(0.0), r"AttributeSteered\.share must be above 0"),
        (lambda: OutOfDistribution("odin"), r"OutOfDistribution\.by must be one of 'energy'"),  # type: ignore[arg-type]
        (lambda: ForgeryTraining(rounds=0), r"ForgeryTraining\.rounds"),
        (lambda: XEnsemble(samples=19), r"XEnsemble\.samples must be at least 20, got 19"),
        (lambda: OutOfDistribution("knn", 15, samples=29), r"OutOfDistribution\.samples must be at least 30, got 29"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        make()


def test_a_recipe_names_the_attack_or_is_told_what_is_wrong() -> None:
    assert NamedAttack.from_entry({"name": "pgd", "eps": 0.125}, "a") == PGD(0.125)
    assert NamedAttack.from_entry("deepfool", "a") == DeepFool()
    assert NamedAttack.from_entry(LONG, "a") is LONG
    for entry, message in (
        (3, r"defenses\[0\]\.attack: an attack's name, or a mapping with a name, is needed, got 3"),
        ("pdg", r"defenses\[0\]\.attack\.name: unknown attack 'pdg'; did you mean"),
        ({"name": "pgd", "stepz": 1}, r"defenses\[0\]\.attack\.stepz: unknown key"),
    ):
        with pytest.raises(InputError, match=message):
            NamedAttack.from_entry(entry, "defenses[0].attack")


def test_an_attack_that_deceives_nobody_trains_nothing(trained: Classifier, few: Dataset[Any]) -> None:
    with pytest.raises(InputError, match="changed the prediction of none of 32 inputs"):
        SafetyNet(PGD(0.0, 1))(rx.System(trained, CAM(trained)), few)


def test_a_detector_of_images_refuses_rows(few: Dataset[Any]) -> None:
    rows = torch.utils.data.TensorDataset(torch.rand(40, 6), torch.arange(40) % 2)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    system = rx.System(model, Gradient(model))
    for defense in (MLLOO(LONG), SaliencyCNN(attack=LONG), MagNet(), RegionMargin(), AttributeSteered()):
        assert defense.misfit((6,)) == f"{defense.name} watches images [C, H, W]; a sample has shape [6]"
        assert defense.misfit((1, 8, 8)) is None
        with pytest.raises(InputError, match="watches images"):
            defense(system, rows)  # type: ignore[arg-type]
    # Those that look at maps or late units alone watch rows too.
    for one in (MapConsistency(), InterpreterDisagreement(("gradient", "integrated-gradients")), OutOfDistribution()):
        detector = one(system, rows).detector  # type: ignore[arg-type]
        some = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(detector.score(some)[:1], detector.score(some[:1]))  # type: ignore[union-attr]


def test_a_missing_library_is_named_with_its_extra(
    trained: Classifier, few: Dataset[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    with pytest.raises(MissingDataError, match=r"pytorch-ood's, which is not installed.*robustexplain\[ood\]"):
        OutOfDistribution()(rx.System(trained, CAM(trained)), few)


def test_a_detector_of_maps_that_draw_is_drawn_again_and_one_of_a_model_follows_its_copy(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    forest = Forest.fit(torch.randn(20, 1), torch.arange(20) % 2, 3, 0)
    noisy = XEnsembleDetector((SmoothGrad(trained, samples=2),), (MapNetwork(),), forest)
    assert noisy.random
    assert not XEnsembleDetector((Gradient(trained),), (MapNetwork(),), forest).random
    again, copied = noisy.redrawn(1), copy.deepcopy(trained)
    assert not torch.equal(again.logits(judged[0][:2]), noisy.logits(judged[0][:2]))
    assert noisy.following(trained, copied).models == (copied,)
    squeezing = FeatureSqueezingDetector(trained, ())
    assert squeezing.following(trained, copied).model is copied
    assert squeezing.following(copied, trained) is squeezing
