"""Feature squeezing and the attack that knows it: squeezers, detector, objectives and the paper's claims on digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, Adaptation, AdaptiveSqueezing, Attacked, SqueezedBox, random_classes
from robustexplain.data import Data, stack, take
from robustexplain.defenses import AnyOf, FeatureSqueezing, FeatureSqueezingDetector
from robustexplain.errors import FieldError, InputError
from robustexplain.interpreters import CAM
from robustexplain.metrics import L1
from robustexplain.models import Classifier, with_transforms
from robustexplain.objectives import AgreeSqueezed, EvadeDetector, EvadeSqueezing, Goal, MatchProbabilities, Observation
from robustexplain.random_streams import Streams
from robustexplain.system import Detector
from robustexplain.transforms import BitDepth, Median, NonLocalMeans, Squeezing, Transform, transform, transforms

EPS = 0.125


# --- squeezers ---


def photograph(name: str) -> np.ndarray:
    import skimage.data

    image: np.ndarray = getattr(skimage.data, name)()[100:148, 200:248]
    return np.ascontiguousarray(image)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_bit_depth_gives_the_nearest_of_its_levels(bits: int) -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(BitDepth(bits)(x), nearest, rtol=0, atol=1e-12)
    assert torch.equal(BitDepth(8)(torch.arange(256) / 255), torch.arange(256) / 255)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_median_is_scipys(size: int) -> None:
    x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    assert np.array_equal(Median(size)(x).numpy(), expected)


def test_non_local_means_of_grey_images_is_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    image = photograph("camera")
    expected = cv2.fastNlMeansDenoising(image, None, 4, 3, 11).astype(float)
    found = NonLocalMeans(11, 3, 4)(torch.from_numpy(image).double()[None, None] / 255)[0, 0].numpy() * 255
    assert np.abs(found - expected).max() < 1  # OpenCV's result is rounded to whole levels
    assert np.abs(image - expected).mean() > 1, "nothing was filtered: the test shows nothing"
    assert np.abs(NonLocalMeans(11, 3, 6)(torch.from_numpy(image).double()[None, None] / 255)[0, 0].numpy() * 255
                  - expected).max() > 1.5  # fmt: skip


def test_non_local_means_of_colour_images_is_opencvs_in_cielab() -> None:
    cv2 = pytest.importorskip("cv2")
    image = photograph("astronaut")
    bgr = np.ascontiguousarray(image[..., ::-1])
    expected = cv2.fastNlMeansDenoisingColored(bgr, None, 4, 4, 3, 11)[..., ::-1].astype(float)
    x = torch.from_numpy(image).double().permute(2, 0, 1)[None] / 255
    found = NonLocalMeans(11, 3, 4)(x)[0].permute(1, 2, 0).numpy() * 255
    # OpenCV rounds in CIELAB too: one level there is up to four here.
    assert np.abs(found - expected).max() < 6
    assert np.abs(found - expected).mean() < 1.2 < 0.5 * np.abs(image - expected).mean()


def test_non_local_means_is_its_formula_in_a_plain_loop() -> None:
    x = 0.5 + 0.03 * torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    search, patch, strength = 5, 3, 4.0
    grid = x[0, 0].tolist()

    def pixel(i: int, j: int) -> float:
        i, j = abs(i), abs(j)
        return grid[5 - abs(5 - i)][4 - abs(4 - j)]

    expected = []
    for i in range(6):
        for j in range(5):
            total = weights = 0.0
            for a in range(-2, 3):
                for b in range(-2, 3):
                    d = sum(
                        (255 * (pixel(i + u, j + v) - pixel(i + a + u, j + b + v))) ** 2
                        for u in (-1, 0, 1)
                        for v in (-1, 0, 1)
                    )
                    w = math.exp(-d / patch**2 / strength**2)
                    w = w if w > 1e-3 else 0.0
                    total, weights = total + w * pixel(i + a, j + b), weights + w
            expected.append(total / weights)
    found = NonLocalMeans(search, patch, strength)(x).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("squeeze", [Median(2), Median(3), NonLocalMeans(5, 3, 8)], ids=lambda s: s.name)
@pytest.mark.parametrize("channels", [1, 3])
def test_smoothing_squeezers_have_the_gradient_of_finite_differences(squeeze: Transform, channels: int) -> None:
    rng = torch.Generator().manual_seed(3)
    x = 0.5 + 0.05 * torch.rand(1, channels, 6, 6, generator=rng, dtype=torch.float64)
    weights = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weights * squeeze.straight(leaf)).sum(), leaf)
    for place in range(0, x.numel(), 7):
        step = torch.zeros_like(x).flatten().index_fill(0, torch.tensor(place), 1e-7).reshape(x.shape)
        slope = float((weights * (squeeze(x + step) - squeeze(x - step))).sum()) / 2e-7
        assert abs(slope - float(gradient.flatten()[place])) < 1e-4 * max(1, abs(slope))


def test_rounding_has_no_gradient_and_the_identitys_straight_through() -> None:
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(4), requires_grad=True)
    plain, straight = BitDepth(3)(x), BitDepth(3).straight(x)
    torch.testing.assert_close(plain, straight, rtol=0, atol=2e-7)
    assert not torch.autograd.grad(plain.sum(), x)[0].any()
    torch.testing.assert_close(torch.autograd.grad(straight.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("name", ["bit-depth-2", "median-2", "median-3", "nl-means-11-3-4", "nl-means-13-3-2.5"])
def test_a_squeezer_has_a_name_and_keeps_images_apart(name: str) -> None:
    squeeze = transform(name)
    assert transform(squeeze.name).name == squeeze.name == name
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    found = squeeze(x)
    assert found.shape == x.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    for dtype in (torch.float64, torch.bfloat16):
        assert squeeze(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(squeeze(x[1:2]), found[1:2], rtol=0, atol=1e-6)
    flat = torch.full((1, 1, 16, 16), 2 / 3)
    torch.testing.assert_close(squeeze(flat), flat if name != "bit-depth-2" else BitDepth(2)(flat))


def test_names_and_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown transform 'gaussian-3'.*median-SIZE"):
        transform("gaussian-3")
    with pytest.raises(FieldError, match="from 1 to 16, got 0"):
        transform("bit-depth-0")
    with pytest.raises(FieldError, match="must be odd, got 12"):
        transform("nl-means-12-3-4")
    with pytest.raises(FieldError, match="strength must be above 0"):
        transform("nl-means-11-3-0")
    for names in ((), "median-2", ("median-2", "median-2")):
        with pytest.raises(InputError, match="list of different names"):
            transforms(names)
    with pytest.raises(InputError, match="grey or RGB images, got 2 channels"):
        NonLocalMeans()(torch.rand(1, 2, 16, 16))
    with pytest.raises(InputError, match="too small for a search window of 11"):
        NonLocalMeans()(torch.rand(1, 1, 6, 16))
    with pytest.raises(InputError, match="unknown transform"):
        AdaptiveSqueezing(squeezers=("jpeg",))
    with pytest.raises(InputError, match="unknown transform"):
        FeatureSqueezing(("jpeg",))


# --- objectives, against slow float64 loops ---


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the model's forward passes."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


def sight(model: nn.Module) -> tuple[Observation, Goal, dict[str, list[list[float]]]]:
    """A look at random images, and the probabilities on squeezed ones."""
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        p = {n: model(transform(n)(x)).softmax(1).tolist() for n in ("median-3", "bit-depth-1")}
    goal = Goal(x, torch.arange(4), wanted=model(x.flip(0)).softmax(1).detach())
    return Observation(x, logits, system=rx.System(model, CAM(model))), goal, p


@pytest.fixture
def double(tiny_model: Classifier) -> Classifier:
    import copy

    return copy.deepcopy(tiny_model).double()


def test_agreement_is_the_cross_entropy_of_both_predictions(double: Classifier) -> None:
    seen, goal, p = sight(double)
    expected = [
        -sum(sum(a * math.log(b) for a, b in zip(now, p[name][i], strict=True)) for name in p)
        for i, now in enumerate(seen.logits.softmax(1).tolist())
    ]
    found = AgreeSqueezed(transforms(tuple(p))).loss(seen, goal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_hinge_is_zero_below_its_share_of_the_threshold(double: Classifier) -> None:
    seen, goal, p = sight(double)
    l1 = [
        [sum(abs(a - b) for a, b in zip(now, p[n][i], strict=True)) for n in p]
        for i, now in enumerate(seen.logits.softmax(1).tolist())
    ]
    threshold = sorted(v for row in l1 for v in row)[4] + 1e-6
    expected = [sum(w * max(v - 0.75 * threshold, 0) for w, v in zip((2.0, 0.5), row, strict=True)) for row in l1]
    objective = EvadeSqueezing(transforms(tuple(p)), (2.0, 0.5), threshold)
    torch.testing.assert_close(objective.loss(seen, goal), torch.tensor(expected, dtype=torch.float64))
    assert objective.met(seen, goal).tolist() == [max(row) <= threshold for row in l1]
    judged = replace(objective, weights=(0.0, 0.0))
    assert not judged.loss(seen, goal).any()
    assert torch.equal(judged.met(seen, goal), objective.met(seen, goal))


def test_probabilities_are_matched_up_to_a_slack(double: Classifier) -> None:
    seen, goal, _ = sight(double)
    assert goal.wanted is not None
    pairs = zip(seen.logits.softmax(1).tolist(), goal.wanted.tolist(), strict=True)
    l1 = [sum(abs(a - b) for a, b in zip(now, want, strict=True)) for now, want in pairs]
    for slack in (0.0, sum(l1) / 4):
        expected = torch.tensor([max(v - slack, 0) for v in l1], dtype=torch.float64)
        torch.testing.assert_close(MatchProbabilities(slack).loss(seen, goal), expected)
    with pytest.raises(InputError, match="wanted probabilities"):
        MatchProbabilities().loss(seen, replace(goal, wanted=None))


def test_squeezed_inputs_are_looked_at_once_a_look(double: Classifier) -> None:
    seen, goal, _ = sight(double)
    used = (Median(3), BitDepth(1))
    total = AgreeSqueezed(used) + EvadeSqueezing(used, (1.0, 1.0), 0.5)
    with counted(double) as sizes:
        total.loss(seen, goal)
        total.met(seen, goal)
        total.loss(seen.at(0.5), goal)
    assert sizes == [4, 4]
    with pytest.raises(InputError, match="set the observation's system"):
        AgreeSqueezed(used).loss(Observation(seen.x, seen.logits), goal)


# --- the detector ---


@pytest.fixture(scope="module")
def held_out(digits: Data) -> Tensor:
    return stack(digits.test)[0]


def watch(model: Classifier, digits: Data, names: tuple[str, ...]) -> rx.System:
    return FeatureSqueezing(names)(rx.System(model, CAM(model)), take(digits.defense, 300))


def detector_of(system: rx.System) -> FeatureSqueezingDetector:
    assert isinstance(system.detector, FeatureSqueezingDetector)
    return system.detector


def test_the_score_is_the_largest_l1_distance_of_probabilities(double: Classifier) -> None:
    seen, _, p = sight(double)
    detector = FeatureSqueezingDetector(double, transforms(tuple(p)))
    assert isinstance(detector, Squeezing)
    expected = [
        max(sum(abs(a - b) for a, b in zip(now, p[n][i], strict=True)) for n in p)
        for i, now in enumerate(seen.logits.softmax(1).tolist())
    ]
    torch.testing.assert_close(detector.score(seen.x), torch.tensor(expected, dtype=torch.float64))
    leaf = seen.x.clone().requires_grad_()
    soft = detector.soft_score(leaf)
    torch.testing.assert_close(soft.detach(), detector.score(seen.x))
    (gradient,) = torch.autograd.grad(soft.sum(), leaf)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_clean_inputs_raise_the_alarm_at_the_calibrated_rate(
    trained: Classifier, digits: Data, held_out: Tensor
) -> None:
    system = watch(trained, digits, ("bit-depth-1", "median-3"))
    own = stack(take(digits.defense, 300))[0]
    detector = detector_of(system)
    # At most 5% of these, and of these after each harmless change, of which one is the hardest.
    assert 0 < float((detector.score(own) > detector.threshold).float().mean()) < 0.054
    alarm = system(held_out).alarm
    assert alarm is not None
    print(f"false alarms {float(alarm.float().mean()):.3f}")
    assert 0 < float(alarm.float().mean()) < 0.12
    assert detector.soft_threshold == pytest.approx(detector.threshold, abs=1e-5)
    with pytest.raises(InputError, match="dozens of samples"):
        FeatureSqueezing()(system, take(digits.defense, 8))


# --- the attack ---


def test_it_knows_the_squeezers_of_a_detector_that_stands_beside_another(trained: Classifier, digits: Data) -> None:
    alone = watch(trained, digits, ("bit-depth-2", "median-3"))
    both = FeatureSqueezing(("median-2",))(alone, take(digits.defense, 300))
    members = both.detector.at_joint_alarm()  # type: ignore[union-attr]
    known = AdaptiveSqueezing(squeezers=("bit-depth-5",))._squeezers(both)
    assert [[s.name for s in squeezers] for squeezers, _ in known] == [["bit-depth-2", "median-3"], ["median-2"]]
    assert [threshold for _, threshold in known] == [member.threshold for member in members]
    assert known[0][1] != detector_of(alone).threshold


def test_every_detector_of_several_is_evaded(trained: Classifier, digits: Data, quiet: Detector) -> None:
    clean = take(digits.defense, 300)
    both = FeatureSqueezing(("median-2",))(watch(trained, digits, ("bit-depth-2", "median-3")), clean)
    squeezing = both.detector.detectors  # type: ignore[union-attr]
    beside = replace(both, detector=AnyOf((*squeezing, quiet)).calibrated(stack(clean)[0], 0.1))
    for penalty, kinds in (("agree", [0.0, 0.0]), ("hinge", [12.0, 12.0])):
        attack = replace(ROUGH, penalty=penalty, rounding="both")
        terms = [(w, getattr(part, "part", part)) for w, part in attack.plan(beside).aim.terms()]
        hinges = [part for _, part in terms if isinstance(part, EvadeSqueezing)]
        assert [[s.name for s in part.squeezers] for part in hinges] == [["bit-depth-2", "median-3"], ["median-2"]]
        assert [part.weights[0] for part in hinges] == kinds
        assert [w for w, part in terms if isinstance(part, EvadeDetector)] == [attack.evade]
        slack = 0.0 if penalty == "agree" else 0.75 * hinges[0].threshold
        assert [part.slack for _, part in terms if isinstance(part, MatchProbabilities)] == [slack]


def test_a_detector_that_does_not_squeeze_is_evaded_alone(trained: Classifier, quiet: Detector) -> None:
    system = replace(rx.System(trained, CAM(trained)), detector=quiet)
    attack = replace(ROUGH, rounding="both").adapted(system)
    terms = [(w, part) for w, part in attack.plan(system).aim.terms() if part.constraint]
    assert [w for w, part in terms if isinstance(part, EvadeDetector)] == [attack.evade]
    assert not any(isinstance(part, EvadeSqueezing) for _, part in terms)
    assert attack.adaptation.startswith("detector in the loss")


def test_the_squeezed_box_holds_squeezed_images_near_the_ball() -> None:
    rng = torch.Generator().manual_seed(7)
    x, anything = torch.rand(2, 3, 1, 8, 8, generator=rng)
    box = SqueezedBox(0.1, 2)
    for variable in (box.start(x), box.start(x, Streams.of(x, 0)), box.project(x, 3 * anything - 1)):
        assert {round(3 * v, 4) for v in variable.flatten().tolist()} <= {0, 1, 2, 3}
        # Half a level beyond the ball at most: that is what rounding may add.
        assert float((variable - x).abs().max()) <= 0.1 + 1 / 6 + 1e-6
    assert torch.equal(box.start(x), BitDepth(2)(x))
    assert torch.equal(replace(box, eps=0.0).project(x, anything), BitDepth(2)(x))
    far = box.project(x, torch.ones_like(x))
    torch.testing.assert_close(far, BitDepth(2)((x + 0.1).clamp(0, 1)))


@dataclass
class Bench:
    """A watched system, ADV2 that knows nothing of the detector, and how to measure."""

    system: rx.System
    x: Tensor
    y: Tensor
    goal: Tensor
    basic: Attacked

    def alarms(self, attacked: Attacked) -> float:
        detector = detector_of(self.system)
        return float((detector.score(attacked.x) > detector.threshold).float().mean())

    def score(self, attacked: Attacked) -> float:
        return float(detector_of(self.system).score(attacked.x).mean())

    def l1(self, attacked: Attacked) -> float:
        interpreter = self.system.interpreter
        with torch.no_grad():
            return float(L1()(interpreter(attacked.x, self.goal), interpreter(self.x)).mean())


SHORT = {"eps": EPS, "steps": 40, "step_size": 0.015}
ROUGH = AdaptiveSqueezing(**SHORT, squeezed_steps=10)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def blind(trained: Classifier, judged: tuple[Tensor, Tensor]) -> Bench:
    x, y = judged[0][:20], judged[1][:20]
    system, goal = rx.System(trained, CAM(trained)), random_classes(x, y, 10)
    return Bench(system, x, y, goal, ADV2(**SHORT)(system, x, y, goal))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def smoothed(blind: Bench, trained: Classifier, digits: Data) -> Bench:
    return replace(blind, system=watch(trained, digits, ("median-3",)))


@pytest.fixture(scope="module")
def rounded(blind: Bench, trained: Classifier, digits: Data) -> Bench:
    # One bit hardly changes digits: at the usual false alarms hardly any attack would be seen.
    defense = FeatureSqueezing(("bit-depth-1",), false_alarms=0.4)
    return replace(blind, system=defense(blind.system, take(digits.defense, 300)))


@pytest.mark.parametrize("penalty", ["agree", "hinge"])
def test_looking_through_a_median_evades_it_and_keeps_the_map(penalty: Any, smoothed: Bench) -> None:
    found = replace(ROUGH, penalty=penalty)(smoothed.system, smoothed.x, smoothed.y, smoothed.goal)
    before, after = smoothed.alarms(smoothed.basic), smoothed.alarms(found)
    print(f"detected {before:.2f} -> {after:.2f}, L1 {smoothed.l1(smoothed.basic):.3f} -> {smoothed.l1(found):.3f}")
    assert before > 0.6, "the detector sees nothing: the test shows nothing"
    assert after <= before / 3
    assert float(found.success.float().mean()) >= 0.9
    assert smoothed.l1(found) < smoothed.l1(smoothed.basic) + 0.05


@pytest.mark.parametrize(
    ("rounding", "penalty"), [("two-stage", "agree"), ("straight", "hinge"), ("both", "agree"), ("both", "hinge")]
)
def test_bit_depth_is_evaded_through_both_ways(rounding: Any, penalty: Any, rounded: Bench) -> None:
    attack = replace(ROUGH, rounding=rounding, penalty=penalty)
    found = attack(rounded.system, rounded.x, rounded.y, rounded.goal)
    before, after = rounded.alarms(rounded.basic), rounded.alarms(found)
    print(
        f"score {rounded.score(rounded.basic):.2f} -> {rounded.score(found):.2f}, detected {before:.2f} -> {after:.2f}"
    )
    assert before > 0.3, "the detector sees nothing: the test shows nothing"
    assert float(found.success.float().mean()) >= 0.9
    assert after < before if rounding == "two-stage" else after <= before / 3


def test_plain_adv2_adapted_to_the_detector_lowers_its_score_too(smoothed: Bench) -> None:
    adapted = ADV2(**SHORT).adapted(smoothed.system)  # type: ignore[arg-type]
    rows = slice(0, 8)
    found = adapted(smoothed.system, smoothed.x[rows], smoothed.y[rows], smoothed.goal[rows])
    assert smoothed.score(found) < float(detector_of(smoothed.system).score(smoothed.basic.x[rows]).mean()) - 0.2


def test_without_a_goal_class_the_one_that_the_squeezed_image_gets_is_adopted(rounded: Bench) -> None:
    x, y = rounded.x[:8], rounded.y[:8]
    found = replace(ROUGH, penalty="hinge")(rounded.system, x, y)
    assert float(found.success.float().mean()) >= 0.85
    near, plan = rounded.x[:8].clone(), SqueezedBox(EPS, 1)
    # The search for x_+ in a plain loop: the best iterate of sign ascent in whole levels.
    now = plan.start(x)
    best = torch.full((8,), math.inf)
    for step in range(11):
        leaf = now.clone().requires_grad_()
        logits = rounded.system.model(leaf)
        loss = logits.log_softmax(1).gather(1, y[:, None])[:, 0] - 100 * (logits.argmax(1) != y)
        better = loss < best
        near[better], best[better] = now[better], loss.detach()[better]
        if step < 10:
            now = plan.project(x, now - torch.autograd.grad(loss.sum(), leaf)[0].sign())
    with torch.no_grad():
        p = rounded.system.model(near).softmax(1)
        adopted = p.scatter(1, y[:, None], -1.0).argmax(1)
        assert torch.equal(rounded.system.model(found.x).argmax(1)[found.success], adopted[found.success])
    fooled = p.argmax(1) != y
    print(f"x_+ misclassified: {int(fooled.sum())} of 8")


def test_the_detectors_squeezers_count_and_not_the_fields(smoothed: Bench) -> None:
    x, y, goal = smoothed.x[:4], smoothed.y[:4], smoothed.goal[:4]
    short = replace(ROUGH, steps=6, squeezed_steps=2)
    given = replace(short, squeezers=("median-3",), threshold=detector_of(smoothed.system).threshold)
    knowing, blind = short(smoothed.system, x, y, goal), given(smoothed.system.without_detector(), x, y, goal)
    assert torch.equal(knowing.x, blind.x)
    assert not torch.equal(knowing.x, short(smoothed.system.without_detector(), x, y, goal).x)


def test_every_input_that_is_shown_is_counted(blind: Bench) -> None:
    x, y, goal = blind.x[:4], blind.y[:4], blind.goal[:4]
    for restarts in (1, 2):
        attack = replace(ROUGH, steps=8, squeezed_steps=3, restarts=restarts, squeezers=("bit-depth-1", "median-3"))
        with counted(blind.system.model) as sizes:
            found = attack(blind.system, x, y, goal)
        # The door looks once at one image and once at all, the verdict once at all: no part of the search.
        assert sum(sizes) - 1 - 2 * 4 == int(found.queries.sum())


@pytest.mark.parametrize("penalty", ["agree", "hinge"])
def test_squeezing_by_jpeg_is_evaded_in_two_stage_attacks_too(penalty: Any, blind: Bench) -> None:
    attack = replace(ROUGH, rounding="two-stage", squeezers=("jpeg-50", "bit-depth-1"), penalty=penalty)
    terms = [part for _, part in attack.plan(blind.system).aim.terms()]
    (evading,) = (part for part in terms if isinstance(part, EvadeSqueezing))
    agreeing = [part.squeezers for part in terms if isinstance(part, AgreeSqueezed)]
    assert evading.weights == ((0.0, 0.0) if penalty == "agree" else (attack.evade, 0.0))
    assert [[s.name for s in squeezers] for squeezers in agreeing] == ([["jpeg-50"]] if penalty == "agree" else [])


def test_it_goes_straight_through_rounding_in_front_of_the_model(
    trained: Classifier, judged: tuple[Tensor, Tensor], digits: Data
) -> None:
    front = watch(with_transforms(trained, ["bit-depth-4"]), digits, ("median-3",))
    x, y = judged[0][:6], judged[1][:6]
    attack = replace(ROUGH, steps=8).adapted(front)
    assert attack.adapt == Adaptation(straight=True), "the detector is evaded by the penalties"
    plain = replace(ROUGH, steps=8)
    assert torch.equal(plain(front, x, y).x, x)
    assert not torch.equal(attack(front, x, y).x, x)
    with pytest.raises(FieldError, match=r"adapt\.evade must be 0.*got 1"):
        replace(attack, adapt=Adaptation(evade=1.0))


def test_squeezed_inputs_are_counted_for_each_draw(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    model = with_transforms(trained, ["resize-pad-2"])
    moving = rx.System(model, CAM(model))
    attack = replace(ROUGH, steps=4, squeezers=("median-3",), warm_start=0.5, adapt=Adaptation(draws=3))
    found = attack(moving, judged[0][:2], judged[1][:2])
    # Two warm steps of three draws; two more and two looks at the real system, each with its squeezed input.
    assert found.queries.tolist() == [2 * 3 + 2 * (2 * 3 + 2)] * 2
