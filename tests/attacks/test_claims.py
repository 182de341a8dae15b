"""The attacks' claims, on a small network trained on digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import (
    ADV2,
    FGSM,
    PGD,
    Attacked,
    Linf,
    Noise,
    Search,
    SignStep,
    Stage,
    random_class_maps,
    random_classes,
    random_patch_maps,
)
from robustexplain.attacks.search.directions import GradientDirection, StepContext
from robustexplain.autograd.rectifiers import Softplus
from robustexplain.data import Data, stack, take
from robustexplain.errors import InputError, NotDifferentiableError, ZeroMapGradientWarning
from robustexplain.interpreters import CAM, Explanation, GradCAM, Gradient, Interpreter
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.objectives import (
    AgreeEncoder,
    EvadeDetector,
    Goal,
    MatchMap,
    Misclassify,
    Observation,
    Ramp,
    needs_of,
)
from robustexplain.random_streams import Streams

EPS = 0.125
HUNDRED = {"eps": EPS, "steps": 100, "step_size": 0.01}


@dataclass
class Bench:
    """System, inputs and goals, and the results that several tests use."""

    model: Classifier
    x: Tensor
    y: Tensor
    goal: Tensor
    pgd: Attacked

    def l1(self, interpreter: Interpreter, attacked: Attacked, reference: Tensor | None = None) -> Tensor:
        """L1 of each sample's map of the goal class to the benign map (or another)."""
        reference = interpreter(self.x) if reference is None else reference
        return L1()(interpreter(attacked.x, self.goal), reference).detach()

    def double(self, rows: int = 12) -> tuple[rx.System, Tensor, Tensor, Tensor]:
        """A float64 system and a few samples, where a sign step does not hang on rounding."""
        model = copy.deepcopy(self.model).double()
        return rx.System(model, CAM(model)), self.x[:rows].double(), self.y[:rows], self.goal[:rows]


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> Bench:
    x, y = judged
    goal = random_classes(x, y, 10)
    return Bench(trained, x, y, goal, PGD(**HUNDRED)(rx.System(trained, CAM(trained)), x, y, goal))


def test_targeted_pgd_always_succeeds(bench: Bench) -> None:
    assert bool(bench.pgd.success.all())


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
def test_adv2_keeps_the_success_of_pgd_and_the_benign_map(bench: Bench, interpreter: type[Interpreter]) -> None:
    system = rx.System(bench.model, interpreter(bench.model))
    found = ADV2(**HUNDRED)(system, bench.x, bench.y, bench.goal)
    assert float(found.success.float().mean()) >= float(bench.pgd.success.float().mean()) - 0.05
    near, far = (float(bench.l1(system.interpreter, a).mean()) for a in (found, bench.pgd))
    assert near < 0.4 * far


def test_adv2_moves_gradient_maps_and_by_softplus_further_than_by_its_smoothed_derivative(bench: Bench) -> None:
    system = rx.System(bench.model, Gradient(bench.model))
    rows = slice(0, 24)
    attack = ADV2(EPS, steps=60, step_size=0.01)
    found, published = (
        form(system, bench.x[rows], bench.y[rows], bench.goal[rows])
        for form in (attack, replace(attack, surrogate="smooth_gradient"))
    )
    assert all(float(a.success.float().mean()) >= 0.95 for a in (found, published))
    benign = system.interpreter(bench.x[rows])
    near, less, far = (
        L1()(system.interpreter(x, bench.goal[rows]), benign).detach()
        for x in (found.x, published.x, bench.pgd.x[rows])
    )
    assert float(less.mean()) < 0.85 * float(far.mean())
    assert float((less < far).float().mean()) >= 0.9
    assert float(near.mean()) < 0.95 * float(less.mean())


def test_a_map_gradient_of_zero_is_reported(bench: Bench) -> None:
    system = rx.System(bench.model, Gradient(bench.model, of="logit"))
    attack = ADV2(EPS, steps=8, step_size=0.01, surrogate="none")
    with pytest.warns(ZeroMapGradientWarning, match="4 of 4 samples"):
        found = attack(system, bench.x[:4], bench.y[:4], bench.goal[:4])
    assert bool(found.zero_direction.all())
    for surrogate in ("auto", "softplus"):
        alive = replace(attack, surrogate=surrogate)(system, bench.x[:4], bench.y[:4], bench.goal[:4])
        assert not bool(alive.zero_direction.any())


@dataclass(frozen=True, eq=False)
class Overflowing(CAM):
    """Divides by zero on its second sample."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = super()._explain(x, target, graph)
        scale = torch.ones(len(x)).index_fill(0, torch.tensor([1]), 0.0)
        return found._replace(maps=found.maps / scale[:, None, None])


def test_a_map_that_is_not_finite_is_an_error_and_no_direction(bench: Bench) -> None:
    system = rx.System(bench.model, Overflowing(bench.model))
    with pytest.raises(InputError, match="gradient of the map is NaN or infinite for sample 1 of 4"):
        ADV2(EPS, steps=4)(system, bench.x[:4], bench.y[:4], bench.goal[:4], torch.rand(4, *bench.x.shape[2:]))


@dataclass(frozen=True, eq=False)
class Detached(CAM):
    """Says that it is differentiable, and is not."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = super()._explain(x, target, graph)
        return found._replace(maps=found.maps.detach())


@dataclass(frozen=True, eq=False)
class DetachedFeatures(Interpreter):
    """A CAM whose maps hang on the head's weights alone."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        net = self.model.net
        features = net.features((x - self.model.mean) / self.model.std)
        logits = net.head(features.mean((2, 3)))
        weight = net.head.weight[logits.argmax(1)]
        return Explanation(logits, torch.einsum("bk,bkhw->bhw", weight, features.detach()))


@pytest.mark.parametrize("interpreter", [Detached, DetachedFeatures])
def test_detached_maps_are_refused(bench: Bench, interpreter: type[Interpreter]) -> None:
    system = rx.System(bench.model, interpreter(bench.model))
    with pytest.raises(NotDifferentiableError, match="detached"):
        ADV2(EPS, steps=4)(system, bench.x[:2], bench.y[:2], bench.goal[:2])


def test_a_patch_can_be_made_the_map(bench: Bench) -> None:
    system = rx.System(bench.model, CAM(bench.model))
    wanted = random_patch_maps(bench.x)
    found = ADV2(EPS, steps=150, step_size=0.005)(system, bench.x, bench.y, bench.goal, wanted)
    to_goal, to_benign = bench.l1(system.interpreter, found, wanted), bench.l1(system.interpreter, found)
    assert float(found.success.float().mean()) >= 0.95
    assert float(to_goal.mean()) < 0.85 * float(to_benign.mean())
    assert float((to_goal < to_benign).float().mean()) > 0.6
    before = L1()(system.interpreter(bench.x).detach(), wanted)
    assert float(to_goal.mean()) < 0.6 * float(before.mean())


def test_adv2_without_confidence_still_prefers_what_is_misclassified(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    # The first iterate is the benign image, whose map of the goal class is the nearest of all: it must not win.
    wanted = system.interpreter(x, goal).detach()
    attack = ADV2(EPS, steps=12, step_size=0.015, warm_start=0.0, confidence=1.0)
    assert int(attack(system, x, y, goal, wanted).success.sum()) >= 10


def test_patches_are_binary_of_many_sizes_and_places(bench: Bench) -> None:
    maps = random_patch_maps(bench.x)
    assert maps.shape == (40, 32, 32)
    assert set(maps.unique().tolist()) == {0.0, 1.0}
    areas = maps.mean((1, 2))
    assert 0.01 < float(areas.min()) < 0.7 * float(areas.max()) < 0.4
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 40
    assert torch.equal(random_patch_maps(bench.x[3:5]), maps[3:5])
    assert not torch.equal(random_patch_maps(bench.x, seed=1), maps)


def test_random_class_maps_come_from_any_other_class(bench: Bench, digits: Data) -> None:
    pool_x, pool_y = stack(take(digits.defense, 30))
    cam = CAM(bench.model)
    maps = random_class_maps(cam, bench.x, bench.goal, pool_x, pool_y)
    with torch.no_grad():
        pool = cam(pool_x, pool_y)
    chosen = (maps[:, None] - pool[None]).abs().amax((2, 3)).argmin(1)
    torch.testing.assert_close(maps, pool[chosen], rtol=0, atol=1e-4)
    assert not bool((pool_y[chosen] == bench.goal).any())
    assert len(chosen.unique()) > 15
    with pytest.raises(InputError, match="no image of another class"):
        random_class_maps(cam, bench.x[:1], pool_y[:1], pool_x[:1], pool_y[:1])


def test_random_classes_are_never_the_label_and_about_uniform() -> None:
    x = torch.rand(3000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(3000) % 5
    goal = random_classes(x, y, 5)
    counts = torch.zeros(5, 5).index_put((y, goal), torch.ones(3000), accumulate=True)
    assert bool((counts.diagonal() == 0).all())
    # 600 draws among four classes: five standard deviations of a count are 53.
    assert float((counts + 150 * torch.eye(5) - 150).abs().max()) < 53
    assert torch.equal(random_classes(x[7:9], y[7:9], 5), goal[7:9])
    with pytest.raises(InputError, match="two classes"):
        random_classes(x, torch.zeros(3000, dtype=torch.int64), 1)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the model's forward passes."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("targeted", [True, False])
def test_fgsm_is_one_signed_step_of_the_cross_entropy(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench.double()
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(system.model(leaf), goal if targeted else y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    sign = -1 if targeted else 1
    expected = (x + sign * 0.05 * gradient.sign()).clamp(0, 1)
    found = FGSM(0.05)(system, x, y, goal if targeted else None)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "sign", "gaussian"])
def test_noise_of_the_same_norm_does_far_worse(bench: Bench, kind: str) -> None:
    system = rx.System(bench.model, CAM(bench.model))
    right = bench.model(bench.x).argmax(1) == bench.y
    noise = Noise(0.06, kind)(system, bench.x, bench.y).success  # type: ignore[arg-type]
    pgd = PGD(0.06, 20, 0.01)(system, bench.x, bench.y).success
    assert float(noise[right].float().mean()) < 0.3 * float(pgd[right].float().mean())


def losses(system: rx.System, x: Tensor, goal: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(system.model(x), goal, reduction="none")


def test_more_steps_are_never_weaker(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    runs = [PGD(0.05, steps, 0.02)(system, x, y, goal).x for steps in (2, 5, 20)]
    short, middle, long = (losses(system, found, goal) for found in runs)
    assert bool((middle <= short + 1e-9).all())
    assert bool((long <= middle + 1e-9).all())
    assert float(long.mean()) < float(short.mean()) - 0.1


def test_a_larger_radius_is_not_weaker(bench: Bench) -> None:
    system = rx.System(bench.model, CAM(bench.model))
    found = [PGD(eps, 20, eps / 5)(system, bench.x, bench.y, bench.goal) for eps in (0.02, 0.05, 0.125)]
    rates = [float(f.success.float().mean()) for f in found]
    assert rates == sorted(rates)
    assert rates[0] + 0.2 < rates[-1]


def test_restarts_are_never_worse(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    once, often = (PGD(0.04, 5, 0.02, restarts=n)(system, x, y, goal) for n in (1, 4))
    before, after = losses(system, once.x, goal), losses(system, often.x, goal)
    better = (often.success & ~once.success) | (after <= before + 1e-9)
    assert bool(better.all())
    assert bool((after < before - 1e-6).any())


def test_early_stop_succeeds_as_often_and_looks_less(bench: Bench) -> None:
    system, x, y, goal = bench.double(24)
    slow = PGD(0.08, 15, 0.01)
    with counted(system.model) as all_of_them:
        full = slow(system, x, y, goal)
    with counted(system.model) as fewer:
        early = replace(slow, early_stop=True)(system, x, y, goal)
    assert torch.equal(full.success, early.success)
    assert int(full.success.sum()) > 0
    assert sum(fewer) < 0.8 * sum(all_of_them)
    # Each one stopped at its first success: the step before it was none.
    with torch.no_grad():
        moved = (early.x - x).abs().flatten(1).amax(1)
    assert float(moved[early.success].mean()) < float((full.x - x).abs().flatten(1).amax(1)[full.success].mean())


def test_the_best_iterate_is_the_best_of_a_plain_loop(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    eps, size, steps = 0.1, 0.07, 9
    now, seen, hits = x.clone(), [], []
    for step in range(steps + 1):
        leaf = now.clone().requires_grad_()
        logits = system.model(leaf)
        loss = F.cross_entropy(logits, goal, reduction="none")
        seen.append(loss.detach())
        hits.append(logits.argmax(1) == goal)
        if step < steps:
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            now = (now - size * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    loss, hit = torch.stack(seen), torch.stack(hits)
    best = torch.where(hit.any(0), loss.masked_fill(~hit, math.inf).amin(0), loss.amin(0))
    found = PGD(eps, steps, size)(system, x, y, goal)
    torch.testing.assert_close(losses(system, found.x, goal), best, rtol=0, atol=1e-6)
    assert torch.equal(found.success, hit.any(0))
    assert bool((best < loss[-1] - 1e-6).any()), "the last iterate is always the best: the test shows nothing"


def test_stages_go_on_where_the_last_one_stopped(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    part = Stage(Misclassify(), 3, SignStep(0.01))
    whole = replace(part, steps=6)
    streams, aims = Streams.of(x, 0), Goal(x, y, goal)
    twice = Search(Linf(EPS), (part, part)).run(system, aims, streams).x
    once = Search(Linf(EPS), (whole,)).run(system, aims, streams).x
    torch.testing.assert_close(losses(system, twice, goal), losses(system, once, goal), rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Roughness:
    """A detector of rough images: differentiable, and calibrated by hand."""

    threshold: float = 0.5
    soft_threshold: float = 3.0

    def soft_score(self, x: Tensor) -> Tensor:
        return 100 * (x[:, :, 1:, 1:] - x[:, :, :-1, :-1]).square().flatten(1).mean(1)

    def score(self, x: Tensor) -> Tensor:
        return self.soft_score(x)


def test_an_adaptive_attack_lowers_the_detectors_score(bench: Bench) -> None:
    x, y, goal = bench.x[:16], bench.y[:16], bench.goal[:16]
    detector = Roughness(soft_threshold=float(Roughness().soft_score(bench.x).median()))
    system = rx.System(bench.model, CAM(bench.model), detector)
    blind = ADV2(EPS, steps=60, step_size=0.01)
    adaptive = blind.adapted(system)
    assert (adaptive.adapt.evade, adaptive.steps, adaptive.eps) == (1.0, blind.steps, blind.eps)
    assert blind.adapted(system.without_detector()) is blind
    unaware, aware = blind(system, x, y, goal), adaptive(system, x, y, goal)
    assert float(aware.success.float().mean()) >= 0.9
    high, low = (float(detector.soft_score(found.x).mean()) for found in (unaware, aware))
    assert low < high - 0.2
    with pytest.raises(InputError, match="needs a system with a detector"):
        adaptive(system.without_detector(), x, y, goal)


# --- objectives, against slow float64 loops ---


def sight(batch: int = 6, classes: int = 5) -> tuple[Observation, Goal]:
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(batch, classes, generator=rng, dtype=torch.float64)
    maps, wanted = torch.randn(2, batch, 4, 4, generator=rng, dtype=torch.float64)
    label = torch.arange(batch) % classes
    x = torch.rand(batch, 1, 4, 4, generator=rng, dtype=torch.float64)
    seen = Observation(x, logits, maps, logits.flip(0), score=torch.linspace(-1, 1, batch, dtype=torch.float64))
    return seen, Goal(x, label, (label + 2) % classes, wanted)


def slow_log_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [v - math.log(total) for v in row]


def test_label_smoothing_follows_its_formula() -> None:
    seen, goal = sight()
    rho, progress = Ramp(0.4, 0.1), 0.5
    seen = replace(seen, streams=Streams.of(seen.x, 3), progress=progress)
    draws = Streams.of(seen.x, 3).uniform(seen.logits[:, 0]).tolist()
    assert goal.goal_class is not None
    expected = []
    for row, c, u in zip(seen.logits.tolist(), goal.goal_class.tolist(), draws, strict=True):
        wanted = 1 - 0.25 * u
        others = (1 - wanted) / (len(row) - 1)
        log_p = slow_log_softmax(row)
        expected.append(-sum((wanted if k == c else others) * v for k, v in enumerate(log_p)))
    found = Misclassify(smoothing=rho).loss(seen, goal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(found, Misclassify(smoothing=rho).loss(seen, goal)), "each step draws anew"


def test_cross_entropy_goes_towards_the_goal_or_away_from_the_label() -> None:
    seen, goal = sight()
    assert goal.goal_class is not None
    towards, away = [], []
    for row, c, label in zip(seen.logits.tolist(), goal.goal_class.tolist(), goal.label.tolist(), strict=True):
        towards.append(-slow_log_softmax(row)[c])
        away.append(slow_log_softmax(row)[label])
    found = Misclassify().loss(seen, goal)
    torch.testing.assert_close(found, torch.tensor(towards, dtype=torch.float64), rtol=0, atol=1e-12)
    found = Misclassify().loss(seen, replace(goal, goal_class=None))
    torch.testing.assert_close(found, torch.tensor(away, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("targeted", [True, False])
def test_misclassify_is_met_at_its_confidence(targeted: bool) -> None:
    seen, goal = sight()
    goal = replace(goal, goal_class=goal.goal_class if targeted else None)
    kappa = 0.4
    for i, row in enumerate(seen.logits.softmax(1).tolist()):
        label, c = int(goal.label[i]), -1 if goal.goal_class is None else int(goal.goal_class[i])
        top = max(range(len(row)), key=lambda k: row[k])
        wanted = top == c if targeted else top != label
        sure = (row[c] if targeted else 1 - row[label]) >= kappa
        objective = Misclassify(kappa)
        assert bool(objective.met(seen, goal)[i]) == (wanted and sure)
        assert float(objective.unmet(seen, goal)[i]) == (0 if wanted and sure else 1 if wanted else 2)


def test_match_map_is_the_mean_square_of_rescaled_pooled_maps() -> None:
    seen, goal = sight()
    assert seen.maps is not None
    assert goal.goal_map is not None

    def slow(grid: list[list[float]]) -> list[float]:
        cells = [
            sum(grid[2 * i + a][2 * j + b] for a in (0, 1) for b in (0, 1)) / 4 for i in range(2) for j in range(2)
        ]
        return [(v - min(cells)) / (max(cells) - min(cells)) for v in cells]

    expected = [
        sum((a - b) ** 2 for a, b in zip(slow(m), slow(w), strict=True)) / 4
        for m, w in zip(seen.maps.tolist(), goal.goal_map.tolist(), strict=True)
    ]
    found = MatchMap(pool=2).loss(seen, goal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    raw = (seen.maps - goal.goal_map).square().mean((1, 2))
    torch.testing.assert_close(MatchMap("none").loss(seen, goal), raw)


def test_agree_encoder_is_the_encoders_cross_entropy_and_zero_without_one() -> None:
    seen, goal = sight()
    expected = Misclassify().loss(replace(seen, logits=seen.encoder_logits), goal)
    torch.testing.assert_close(AgreeEncoder().loss(seen, goal), expected)
    assert not AgreeEncoder().loss(replace(seen, encoder_logits=None), goal).any()


def test_evade_detector_is_a_hinge_below_the_threshold() -> None:
    seen, goal = sight()
    objective = EvadeDetector(threshold=0.1, margin=0.4)
    expected = torch.tensor([0, 0, 0.1, 0.5, 0.9, 1.3], dtype=torch.float64)
    torch.testing.assert_close(objective.loss(seen, goal), expected)
    assert objective.met(seen, goal).tolist() == [True, True, True, False, False, False]


def test_a_ramp_is_a_straight_line() -> None:
    assert [Ramp(2.0, 6.0)(p) for p in (0.0, 0.25, 1.0)] == [2.0, 3.0, 6.0]


def test_objectives_add_up_with_weights_and_schedules() -> None:
    seen, goal = sight()
    label, match = Misclassify(), MatchMap()
    a, b = label.loss(seen, goal), match.loss(seen, goal)
    total = label + Ramp(10.0, 20.0) * match
    torch.testing.assert_close(total.loss(seen, goal), a + 10 * b)
    torch.testing.assert_close(total.loss(seen.at(0.5), goal), a + 15 * b)
    assert [weight for weight, _ in (label + 2.0 * match + label).terms()] == [1.0, 2.0, 1.0]
    assert needs_of(total) == {"maps"}
    assert needs_of(label) == frozenset()
    # A sum is met where its constraints are; a map that should match has none.
    assert torch.equal(total.met(seen, goal), label.met(seen, goal))
    assert not match.met(seen, goal).any()


def test_a_weight_goes_through_a_sum_to_its_parts() -> None:
    seen, goal = sight()
    seen = seen.at(0.5)
    inner = Misclassify() + Ramp(10.0, 20.0) * MatchMap()
    for weight in (3.0, Ramp(0.0, 6.0)):
        outer = weight * inner  # type: ignore[operator]
        torch.testing.assert_close(outer.loss(seen, goal), 3 * inner.loss(seen, goal))
        assert needs_of(outer) == {"maps"}
        assert [type(part) for _, part in outer.terms()] == [Misclassify, MatchMap]


def test_goals_are_selected_by_index_and_mask() -> None:
    _, goal = sight()
    mask = torch.tensor([True, False, False, True, False, False])
    for rows in (mask, torch.tensor([0, 3])):
        some = goal.select(rows)
        for name in ("x", "label", "goal_class", "goal_map"):
            assert torch.equal(getattr(some, name), getattr(goal, name)[[0, 3]])
    assert Goal(goal.x, goal.label).select(mask).goal_map is None


@dataclass(frozen=True)
class Clamped(Linf):
    """A threat model that clips the inputs that it returns."""

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        return variable.clamp(0, 1)


def test_the_surrogate_replaces_the_model_and_not_the_threat_model(bench: Bench) -> None:
    """A clamp around the image is no rectifier of the network's: smoothed, it would show another image."""
    seen: list[Tensor] = []
    system = rx.System(bench.model, CAM(bench.model))
    goal = Goal(bench.x[:2], bench.y[:2], bench.goal[:2], goal_map=torch.rand(2, 8, 8))
    threat, aim = Clamped(0.1), Misclassify() + MatchMap()
    streams = Streams.of(goal.x, 0)
    problem = StepContext(system, threat, goal, aim, streams, 0.0)
    handle = bench.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    GradientDirection(Softplus(1.0))(problem, goal.x, False)
    handle.remove()
    assert torch.equal(seen[-1], goal.x)
