"""What all detectors share: calibration, p-values, several on one system, and looking only once."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain import system as systems
from robustexplain.attacks import PGD, MapPGD
from robustexplain.attacks.search.directions import StepContext
from robustexplain.attacks.threat import Linf
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.data import Data, stack, take
from robustexplain.defenses import (
    AnyOf,
    BetaSmoothing,
    Detector,
    DetectorDefense,
    FeatureSqueezing,
    RegionVoting,
    XEnsemble,
)
from robustexplain.defenses.detection import FeatureSqueezingDetector, Forest
from robustexplain.defenses.detection.detector import conformal_p_values, fingerprints
from robustexplain.errors import FewScoresWarning, FieldError, InputError
from robustexplain.interpreters import CAM, GradCAM, Gradient
from robustexplain.interpreters.composed.base import same
from robustexplain.models import Classifier
from robustexplain.objectives import EvadeDetector, EvadeSqueezing, Goal, Observation
from robustexplain.random_streams import Streams
from robustexplain.system import Explained
from robustexplain.training import Session, Training
from robustexplain.transforms import Shift, UniformNoise, default_changes, transforms


@dataclass(frozen=True, eq=False)
class Statistic(Detector):
    """A number of the image: how bright it is, how rough, or how bright its left half is against its right."""

    of: Literal["light", "rough", "left"] = "light"

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``."""
        return self.soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``."""
        if self.of == "rough":
            return 100 * (x[:, :, 1:] - x[:, :, :-1]).square().flatten(1).mean(1)
        half = x.shape[-1] // 2
        left, right = x[..., :half].flatten(1).mean(1), x[..., half:].flatten(1).mean(1)
        return left + right if self.of == "light" else left - right


THREE = (Statistic("light"), Statistic("rough"), Statistic("left"))  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Column(Detector):
    """A number of a row is its score."""

    index: int

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``."""
        return x[:, self.index]

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``."""
        return x[:, self.index]


class Rounding(Statistic):
    """Has no derivative of its own."""

    rounds = True


@dataclass(frozen=True, eq=False)
class Fixed(Detector):
    """Watches one model, and no copy of it: not by the name that a detector's model is followed by."""

    watched: nn.Module

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The one model."""
        return (self.watched,)

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``."""
        return self.soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``."""
        top: Tensor = self.watched(x).amax(1)
        return top


class ShortDefense(DetectorDefense):
    """All that a new detector asks of its author, besides the detector itself."""

    def _fit(self, system: rx.System, x: Tensor, y: Tensor, session: Session) -> Detector:
        return Statistic("light")


@pytest.fixture(scope="module")
def clean(digits: Data) -> Tensor:
    """Digits to calibrate on."""
    return stack(digits.defense)[0]


@pytest.fixture(scope="module")
def fresh(digits: Data) -> Tensor:
    """Digits that nobody saw."""
    return stack(digits.test)[0]


def interval(calibrated_on: int, judged_on: int, false_alarms: float) -> tuple[float, float]:
    """Where the share of alarms lies but once in ten thousand times, the calibration's own luck included."""
    allowed = math.floor(false_alarms * (calibrated_on + 1)) - 1
    counts = betabinom(judged_on, allowed + 1, calibrated_on - allowed)
    return counts.ppf(5e-5) / judged_on, counts.ppf(1 - 5e-5) / judged_on


def rate(detector: Any, x: Tensor) -> float:
    return float((detector.score(x) > detector.threshold).float().mean())


# --- calibration ---


@pytest.mark.parametrize("false_alarms", [0.05, 0.2])
def test_several_detectors_together_ring_as_rarely_as_was_asked(
    clean: Tensor, fresh: Tensor, false_alarms: float
) -> None:
    both = AnyOf(THREE).calibrated(clean, false_alarms)
    low, high = interval(len(clean), len(fresh), false_alarms)
    # Less than one sample a detector is lost to ties: p-values are counts.
    assert both.scores is not None
    rung, allowed = int((both.scores > both.threshold).sum()), math.floor(false_alarms * (len(clean) + 1)) - 1
    assert allowed - len(THREE) < rung <= allowed
    apart = torch.stack([d.score(fresh) > d.calibrated(clean, false_alarms).threshold for d in THREE], 1)
    alone = float(apart.any(1).float().mean())
    print(f"{rate(both, fresh):.3f} in [{low:.3f}, {high:.3f}]; each at its own threshold: {alone:.3f}")
    assert low <= rate(both, fresh) <= high
    assert alone > high, "they are too much alike for this to show anything"
    soft = both.soft_score(fresh) > both.soft_threshold
    assert low <= float(soft.float().mean()) <= high


@pytest.mark.parametrize(("size", "members", "asked", "most"), [(100, 3, 0.05, 0.055), (400, 4, 0.01, 0.0125)])
def test_the_joint_alarm_is_as_rare_as_was_asked_on_new_inputs(
    size: int, members: int, asked: float, most: float
) -> None:
    both, rng, rates = AnyOf(tuple(map(Column, range(members)))), torch.Generator().manual_seed(0), []
    for _ in range(200):
        made = both.calibrated(torch.rand(size, members, generator=rng), asked, size)
        x = torch.rand(500, members, generator=rng)
        rates.append(rate(made, x))
        by_one = torch.stack([d.score(x) > d.threshold for d in made.at_joint_alarm()], 1).any(1)
        assert torch.equal(by_one, made.score(x) > made.threshold)
    mean = sum(rates) / len(rates)
    print(f"{mean:.4f} of {asked}")
    assert asked / 2 < mean <= most


NOISY = (UniformNoise(eps=0.25), Shift())


@pytest.mark.parametrize("detector", [THREE[1], AnyOf(THREE)])
def test_harmless_changes_ring_as_rarely_as_clean_inputs_where_they_calibrate(
    detector: Any, clean: Tensor, fresh: Tensor
) -> None:
    asked, changed = 0.1, [change(fresh, 1) for change in NOISY]
    before, after = detector.calibrated(clean, asked), detector.calibrated(clean, asked, harmless=NOISY)
    low, high = interval(len(clean), len(fresh), asked)
    rates = [(rate(before, x), rate(after, x)) for x in changed]
    print(f"{rates} in [{low:.3f}, {high:.3f}]")
    assert max(rates)[0] > 2 * high, "it does not ring for harmless changes anyway"
    # On the inputs of the calibration the promise is exact; a clean input may ring more rarely than was asked.
    known = [change(clean) for change in NOISY]
    for x in (clean, *known):
        assert rate(after, x) <= asked + 1e-6
        assert float((after.soft_score(x) > after.soft_threshold).float().mean()) <= asked + 1e-6
    assert max(rate(after, x) for x in (clean, *known)) > asked / 2
    assert rate(after, fresh) <= high
    for x in changed:
        assert rate(after, x) <= high
    assert after.harmless_scores is not None
    assert before.harmless_scores is None
    again = after.calibrated(clean, asked)
    assert (again.threshold, again.harmless_scores) == (before.threshold, None)


def test_p_values_are_those_of_the_kind_of_input_that_is_the_more_suspicious(clean: Tensor, fresh: Tensor) -> None:
    detector = THREE[1].calibrated(clean[:60], 0.1, harmless=NOISY)
    scores = detector.score(fresh[:9])[:, None]
    kinds = [THREE[1].score(x)[:, None] for x in (clean[:60], *(change(clean[:60]) for change in NOISY))]
    expected = torch.stack([conformal_p_values(scores, known)[:, 0] for known in kinds])
    assert torch.equal(detector.p_values(fresh[:9]), expected.amax(0))
    assert len({tuple(row) for row in expected.tolist()}) > 1


def test_a_system_is_recalibrated_on_the_usual_changes_or_those_that_are_named(
    trained: Classifier, clean: Tensor
) -> None:
    system = rx.System(trained, CAM(trained), THREE[1])
    found = {
        name: system.recalibrated(clean, 0.1, harmless=given).detector.threshold  # type: ignore[union-attr]
        for name, given in (("usual", None), ("none", ()), ("noisy", NOISY))
    }
    assert found["none"] <= found["usual"] < found["noisy"]
    usual = default_changes(clean.shape[1:])
    assert found["usual"] == THREE[1].calibrated(clean, 0.1, harmless=usual).threshold
    assert found["none"] == THREE[1].calibrated(clean, 0.1).threshold


def test_too_few_inputs_for_a_joint_alarm_are_warned_about() -> None:
    x = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(FewScoresWarning, match=r"2 detectors at 5.00% false alarms is calibrated on 30 .* takes 40"):
        both = AnyOf((Column(0), Column(1))).calibrated(x, 0.05)
    # It can ring all the same: at a score above all clean ones.
    for new in (torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])):
        assert rate(both, new) == 1
    assert rate(both, x) == 0


def test_a_detector_in_another_place_is_calibrated_there(clean: Tensor, fresh: Tensor) -> None:
    for detector in (Statistic("light").calibrated(clean, 0.1), AnyOf(THREE).calibrated(clean, 0.1)):
        there = 0.6 + 0.4 * clean
        assert rate(detector, 0.6 + 0.4 * fresh) == 1
        again, usual = detector.recalibrated(there, 0.1, harmless=()), detector.recalibrated(there, 0.1)
        low, high = interval(len(clean), len(fresh), 0.1)
        assert low <= rate(again, 0.6 + 0.4 * fresh) <= high
        assert rate(usual, 0.6 + 0.4 * fresh) <= high
        assert type(again) is type(detector)
        with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
            detector.recalibrated(there + 1)


def test_p_values_count_the_clean_scores_that_are_as_high(clean: Tensor, fresh: Tensor) -> None:
    detector = Statistic("rough").calibrated(clean[:50], 0.1)
    known = detector.score(clean[:50]).tolist()
    expected = [(1 + sum(k >= s for k in known)) / 51 for s in detector.score(fresh[:9]).tolist()]
    torch.testing.assert_close(detector.p_values(fresh[:9]), torch.tensor(expected))
    ties = conformal_p_values(torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.0], [1.0], [1.0]]))
    assert ties[:, 0].tolist() == [0.75, 1.0, 0.25]
    with pytest.raises(InputError, match="not calibrated"):
        Statistic("rough").p_values(fresh)
    with pytest.raises(InputError, match="not calibrated"):
        AnyOf(THREE).score(fresh)


def test_scores_that_are_nan_calibrate_nothing(clean: Tensor) -> None:
    broken = clean[:30].clone()
    broken[3] = torch.nan
    for detector in (THREE[0], AnyOf(THREE)):
        with pytest.raises(InputError, match=r"scores of clean inputs are NaN"):
            detector.calibrated(broken, 0.05)


def test_what_a_detector_was_trained_on_does_not_calibrate(clean: Tensor) -> None:
    some = clean[:30]
    trained = replace(THREE[0], trained_on=fingerprints(some[:10]))
    for detector in (trained, AnyOf((trained, THREE[1]))):
        made = detector.calibrated(some, 0.05)
        assert made.scores is not None
        assert len(made.scores) == 20
        with pytest.raises(InputError, match="trained on all 10 inputs"):
            detector.calibrated(some[:10], 0.05)


def test_any_of_any_of_is_one_of_all(clean: Tensor, fresh: Tensor) -> None:
    nested = AnyOf((AnyOf(THREE[:2]).calibrated(clean[:100], 0.3), THREE[2])).calibrated(clean, 0.1)
    flat = AnyOf(THREE).calibrated(clean, 0.1)
    assert nested.detectors == THREE
    assert torch.equal(nested.score(fresh), flat.score(fresh))
    assert nested.threshold == flat.threshold
    names = list(nested.reasons(fresh[:2]))
    assert names[:4] == ["Statistic 1: p-value", "Statistic 1: score", "Statistic 2: p-value", "Statistic 2: score"]
    for wrong in ((), THREE[:1], (THREE[0], object())):
        with pytest.raises(InputError, match=r"two detectors or more|expected a detector"):
            AnyOf(wrong)  # type: ignore[arg-type]


def test_a_detector_rings_the_joint_alarm_above_the_thresholds_it_is_given(clean: Tensor, fresh: Tensor) -> None:
    both = AnyOf(THREE).calibrated(clean, 0.2)
    by_one = torch.stack([d.score(fresh) > d.threshold for d in both.at_joint_alarm()], 1).any(1)
    assert torch.equal(by_one, both.score(fresh) > both.threshold)
    assert 0 < float(by_one.float().mean()) < 1


# --- defenses ---


def test_a_new_detector_is_short(trained: Classifier, few: Dataset[Any]) -> None:
    lines = sum(len(inspect.getsource(cls).splitlines()) for cls in (Statistic, ShortDefense))
    assert lines < 40
    system = ShortDefense()(rx.System(trained, CAM(trained)), few)
    detector = system.detector
    assert isinstance(detector, Statistic)
    assert detector.trained_on is not None
    assert detector.scores is not None
    assert (len(detector.trained_on), len(detector.scores)) == (32, 8)
    with pytest.raises(InputError, match="ShortDefense needs some dozens of samples to calibrate on, got 12"):
        ShortDefense()(system, torch.utils.data.Subset(few, range(12)))
    assert ShortDefense().fewest == 20
    with pytest.raises(FieldError, match=r"ShortDefense\.samples must be at least 20, got 12"):
        ShortDefense(samples=12)


@dataclass
class Watched:
    one: rx.System
    both: rx.System


@pytest.fixture(scope="module")
def watched(trained: Classifier, digits: Data) -> Watched:
    """X-Ensemble, and feature squeezing on top of it."""
    own = XEnsemble(("gradient", "cam"), attack=PGD(0.125, 3, 0.06), training=Training(epochs=1), trees=10)
    data = take(digits.defense, 150)
    one = own(rx.System(trained, CAM(trained)), data)
    return Watched(one, FeatureSqueezing(("median-3", "bit-depth-1"))(one, data))


def test_a_second_detector_keeps_the_first_ones_score(watched: Watched, judged: tuple[Tensor, Tensor]) -> None:
    x, both = judged[0], watched.both.detector
    assert isinstance(both, AnyOf)
    first, second = both.detectors
    assert first is watched.one.detector
    assert both.clean is not None
    # Feature squeezing calibrates on all samples; four fifths of them trained X-Ensemble.
    assert len(both.clean) == 4 * 30  # clean, and after each of the usual changes
    assert len(second.scores) == 150  # type: ignore[attr-defined]
    said = torch.stack([first.score(x), second.score(x)], 1)
    expected = [min((1 + int((both.clean[:, j] >= s[j]).sum())) / 121 for j in range(2)) for s in said]
    torch.testing.assert_close(watched.both(x).score, 1 - torch.tensor(expected))


def test_several_detectors_are_saved_with_their_calibration(
    watched: Watched, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x = judged[0][:8]
    loaded = rx.System.load(watched.both.save(tmp_path))
    assert loaded.defenses == ("x-ensemble", "feature-squeezing")
    assert isinstance(loaded.detector, AnyOf)
    ours, theirs = watched.both(x), loaded(x)
    assert torch.equal(ours.score, theirs.score)  # type: ignore[arg-type]
    assert torch.equal(ours.alarm, theirs.alarm)  # type: ignore[arg-type]
    mine, kept = watched.both.detector, loaded.detector
    assert isinstance(mine, AnyOf)
    assert torch.equal(mine.soft_score(x), kept.soft_score(x))
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(mine.detectors, kept.detectors, strict=True))  # type: ignore[attr-defined]
    assert torch.equal(mine.trained_on, kept.trained_on)  # type: ignore[arg-type]
    assert list(mine.reasons(x)) == [
        "x-ensemble: p-value",
        *(f"x-ensemble: {name}" for name in ("score", "gradient", "cam")),
        "feature-squeezing: p-value",
        *(f"feature-squeezing: {name}" for name in ("median-3", "bit-depth-1")),
    ]


@contextmanager
def passes(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the model's forward passes."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


def count(model: nn.Module, call: Callable[[], object]) -> int:
    with passes(model) as sizes, torch.no_grad():
        call()
    return len(sizes)


def test_a_detector_does_not_explain_again_what_the_system_has_just_explained(
    watched: Watched, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x = judged[0][:4]
    for system in (watched.one, rx.System.load(watched.one.save(tmp_path))):
        model, detector = system.model, system.detector
        assert detector is not None
        system(x, torch.zeros(4).long())  # finds the layers, once
        # The system's map, and the detector's of the other kind; without what was seen, both once more.
        assert count(model, lambda s=system: s(x)) == 2
        assert count(model, lambda d=detector: d.score(x)) == 2
        assert count(model, lambda s=system: s(x, torch.zeros(4).long())) == 3
        with torch.no_grad():
            assert torch.equal(system(x).score, detector.score(x))  # type: ignore[arg-type]
    both = watched.both
    assert both.detector is not None
    # The squeezed images besides, two; the logits of the plain ones are known.
    assert count(both.model, lambda: both(x)) == 4
    with torch.no_grad():
        torch.testing.assert_close(both(x).score, both.detector.score(x))


def test_maps_of_other_settings_or_models_are_not_reused(trained: Classifier, tiny_model: nn.Module) -> None:
    assert same(GradCAM(trained), GradCAM(trained))
    assert not same(GradCAM(trained), GradCAM(trained, relu=False))
    assert not same(Gradient(trained), CAM(trained))
    assert not same(CAM(trained), CAM(tiny_model))
    smooth = [BetaSmoothing(b)(rx.System(trained, CAM(trained))).interpreter for b in (1.0, 1.0, 2.0)]
    assert same(smooth[0], smooth[1])
    assert not same(smooth[0], smooth[2])


# --- evasion ---


def test_several_detectors_are_evaded_one_by_one(watched: Watched, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:6], judged[1][:6]
    both = watched.both.detector
    assert isinstance(both, AnyOf)
    x_ensemble, squeezing = both.at_joint_alarm()
    objective = both.evasion(0.5)
    kinds = [type(getattr(part, "part", part)) for _, part in objective.terms()]
    assert kinds == [EvadeDetector, EvadeSqueezing]
    assert all(part.constraint for _, part in objective.terms())
    goal, seen = Goal(x, y), Observation(x, watched.both.model(x), system=watched.both)
    rings = x_ensemble.score(x) > x_ensemble.threshold
    hinge = (x_ensemble.soft_score(x) - x_ensemble.soft_threshold + 0.1).clamp_min(0)
    hinge = torch.where(rings, hinge.clamp_min(1), hinge)
    squeezers = squeezing.squeezers  # type: ignore[attr-defined]
    apart = EvadeSqueezing(squeezers, (1.0,) * len(squeezers), squeezing.threshold)
    torch.testing.assert_close(objective.loss(seen, goal), 0.5 * hinge + 0.5 * apart.loss(seen, goal))
    quiet = ~rings
    quiet &= squeezing.score(x) <= squeezing.threshold
    assert torch.equal(objective.met(seen, goal), quiet)


@dataclass(frozen=True, eq=False)
class Misleading(Statistic):
    """Its soft score says nothing of its alarm."""

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``."""
        return super().soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``."""
        return super().soft_score(x) - 10


def test_where_the_alarm_rings_the_soft_score_is_pushed_down_however_low_it_is(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:1], judged[1][:1]
    level = float(Statistic("light").score(x)) - 0.02
    detector = Misleading("light", threshold=level, soft_threshold=0.0)  # type: ignore[misc]
    system = rx.System(trained, CAM(trained), detector)
    attack = PGD(0.125, 12, 0.02).adapted(system)
    with torch.no_grad():
        assert bool(detector.score(x).gt(level).all())
        assert bool(detector.soft_score(x).lt(0).all())
        assert not bool((detector.score(attack(system, x, y, (y + 1) % 10).x) > level).any())


def test_a_smoothed_forest_is_its_expectation_under_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, generator=draws)
    forest = Forest.fit(features, (features.sum(1) > 0).long(), 5, 0)
    at = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, -0.3]], requires_grad=True)
    (gradient,) = torch.autograd.grad(forest.smoothed(at * 8).sum(), at)
    assert bool((gradient > 0).all())
    monkeypatch.setattr("robustexplain.defenses.detection.forest.WIDTHS", (0.5,))
    noise = 0.5 * forest._leaves.spread * torch.randn(4_000, 2, generator=draws)
    drawn = torch.stack([forest(row + noise).mean() for row in at.detach()])
    torch.testing.assert_close(forest.smoothed(at.detach()).sigmoid(), drawn, atol=0.03, rtol=0)


def test_an_adaptive_attack_evades_several_detectors(watched: Watched, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    attack = PGD(0.125, 15, 0.02)
    found = [a(watched.both, x, y, (y + 1) % 10).x for a in (attack, attack.adapted(watched.both))]
    with torch.no_grad():
        blind, aware = (watched.both(f) for f in found)
    assert blind.alarm is not None
    assert aware.alarm is not None
    print(f"alarms {float(blind.alarm.float().mean()):.2f} -> {float(aware.alarm.float().mean()):.2f}")
    assert float(aware.score.mean()) < float(blind.score.mean())  # type: ignore[union-attr]
    assert int(aware.alarm.sum()) < int(blind.alarm.sum())


# --- random systems ---


def test_detectors_are_drawn_again_with_the_model(watched: Watched, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:4], judged[1][:4]
    model = watched.one.model.with_transforms(["resize-pad-3"])  # type: ignore[operator]
    kept = watched.one.detector.following(watched.one.model, model)  # type: ignore[union-attr]
    squeezing = FeatureSqueezingDetector(model, transforms(("median-3",)))
    for detector in (squeezing, kept, AnyOf((kept, squeezing)).calibrated(x.repeat(8, 1, 1, 1), 0.2)):
        system = rx.System(model, CAM(model), detector)
        other = system.redrawn(5)
        assert not other.stale_detector
        assert other.detector is not None
        assert all(m is other.model for m in systems.watched(other.detector))
        assert not torch.equal(other.detector.soft_score(x), detector.soft_score(x))
        attack = PGD(0.125, 2, 0.06).adapted(system)
        assert attack(system, x, y, (y + 1) % 10).x.shape == x.shape
    # One that cannot follow stays with the deployed model, and the system says so.
    fixed = rx.System(model, CAM(model), Fixed(model)).redrawn(5)
    assert fixed.stale_detector
    assert fixed.detector.watched is model  # type: ignore[union-attr]


def test_several_detectors_are_as_random_as_any_of_them(
    watched: Watched, clean: Tensor, judged: tuple[Tensor, Tensor]
) -> None:
    x, y, model = judged[0][:4], judged[1][:4], watched.one.model
    squeezing = FeatureSqueezingDetector(model, transforms(("median-3", "resize-pad-3")))
    both = AnyOf((THREE[0], squeezing)).calibrated(clean[:40], 0.2)
    assert both.random
    assert not both.rounds
    assert AnyOf((THREE[0], Rounding())).rounds
    system = rx.System(model, CAM(model), both)
    other, goal = system.redrawn(5), Goal(x, y)
    again = other.detector.detectors[1]  # type: ignore[union-attr]
    assert not torch.equal(again.soft_score(x), squeezing.soft_score(x))
    # The adversary's loss, planned for the system, is that of the system drawn again.
    _, on_squeezing = both.evasion(1.0).terms()
    joint = both.at_joint_alarm()[1]
    hinge = (again.soft_score(x) - joint.soft_threshold + 0.1).clamp_min(0)
    hinge = torch.where(again.score(x) > joint.threshold, hinge.clamp_min(1), hinge)
    assert torch.equal(on_squeezing[1].loss(Observation(x, model(x), system=other), goal), hinge)
    adapted = PGD(0.125, 2, 0.06).adapted(system)
    assert adapted.adapt.draws > 1
    context = StepContext(system, Linf(0.1), goal, both.evasion(1.0), Streams.of(x, 0, "test"), 0.0)
    assert context.random


def test_an_alarm_that_is_watched_is_the_deployed_one_under_a_surrogate(
    watched: Watched, judged: tuple[Tensor, Tensor]
) -> None:
    both = watched.both.detector
    assert isinstance(both, AnyOf)
    x_ensemble, _ = both.at_joint_alarm()
    x, y = judged[0][:12], judged[1][:12]
    with swapped(Softplus(1.0)):
        seen = Observation(x, watched.both.model(x), score=x_ensemble.soft_score(x), system=None)
        met = EvadeDetector(x_ensemble.soft_threshold, watch=x_ensemble).met(seen, Goal(x, y))
    assert torch.equal(met, x_ensemble.score(x) <= x_ensemble.threshold)


def test_squeezing_costs_an_attacker_who_knows_it_no_map(trained: Classifier, digits: Data) -> None:
    """Its evasion is a constraint: once the alarm is silent, the map is all that is followed."""
    defense = FeatureSqueezing(("bit-depth-3", "median-2"), samples=100)
    plain = rx.System(trained, CAM(trained))
    system = defense(plain, digits.defense)
    x, y = stack(take(digits.test, 8))
    goal = (trained(x).argmax(1) + 1) % 10

    def distance(of: rx.System) -> Tensor:
        attack = MapPGD(0.06, steps=40).adapted(of)
        made = attack(of, x, y, goal)
        seen = of(made.x)
        assert bool((seen.prediction == goal).all())
        assert seen.alarm is None or not bool(seen.alarm.any())
        return (ops.minmax(seen.maps) - ops.minmax(of(x).maps)).abs().flatten(1).mean(1)

    assert float(distance(system).mean()) < 2 * float(distance(plain).mean()) + 0.01


@pytest.mark.parametrize("defense", [FeatureSqueezing(samples=40), RegionVoting(radius=None, samples=20, draws=3)])
def test_models_of_float64_are_watched(defense: Any, tiny_model: nn.Module) -> None:
    wide = copy.deepcopy(tiny_model).double()
    x = torch.rand(60, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, tiny_model(x).argmax(1))
    system = defense(rx.System(wide, GradCAM(wide)), data)
    assert system(x[:3].double()).prediction.shape == (3,)
