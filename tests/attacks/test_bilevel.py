"""ADV2 against MASK: Algorithm 1 of Zhang et al. 2020 against plain loops, and what it claims."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import defenses
from robustexplain.attacks import (
    ADV2,
    PGD,
    Adaptation,
    Bilevel,
    BilevelSearch,
    Linf,
    Search,
    SearchResult,
    SignStep,
    Stage,
    random_classes,
    random_patch_maps,
)
from robustexplain.attacks.search import bilevel as under_test
from robustexplain.attacks.search.best import BestIterates, SearchRecord
from robustexplain.attacks.search.directions import BetaSchedule
from robustexplain.autograd.rectifiers import SmoothGradient, Softplus
from robustexplain.errors import FieldError, InputError
from robustexplain.interpreters import CAM, Gradient, Mask, MaskState
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.objectives import Goal, MatchMap, Misclassify
from robustexplain.random_streams import Streams

EPS = 0.125
CLASSES = torch.tensor([0, 3, 1])
SHORT = ADV2(0.1, 8, 0.03, mask=Bilevel(1, 2, reset=3, bisections=4))


@pytest.fixture
def smooth(smooth_net: nn.Module) -> nn.Module:
    """A network without kinks, in float64, with logits that differ."""
    net = copy.deepcopy(smooth_net).double()
    with torch.no_grad():
        net[-1].weight.mul_(10)
    return net


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return 0.1 + 0.8 * grey[:3].double()


def mask_of(model: nn.Module, **settings: Any) -> Mask:
    return Mask(model, **{"steps": 12, "l1": 0.01, "tv": 0.1, "lr": 0.02, "tolerance": 0.0, **settings})


def state(x: Tensor) -> MaskState:
    rng = torch.Generator().manual_seed(2)
    m, first, second = torch.rand(3, len(x), 8, 8, generator=rng, dtype=x.dtype)
    return MaskState(0.2 + 0.6 * m, 0.05 * (first - 0.5), 0.01 * second + 1e-3, 30)


def search(settings: Bilevel, steps: int = 3, eps: float = EPS, confidence: float = 0.0) -> BilevelSearch:
    warm = Stage(Misclassify(), 0, SignStep(0.01))
    return BilevelSearch(Linf(eps), warm, Misclassify(confidence), MatchMap("none"), steps, settings)


def run_of(plan: BilevelSearch, mask: Mask, x: Tensor, goal: Goal) -> under_test._Run:
    system = rx.System(mask.model, mask)
    return under_test._Run(plan, system, mask, goal, Streams.of(x, 0), x, BestIterates.none(x), SearchRecord.none(x))


def aims(x: Tensor, goal_map: Tensor | None = None) -> Goal:
    wanted = torch.rand(len(x), 8, 8, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    return Goal(x, (CLASSES + 1) % 4, CLASSES, wanted if goal_map is None else goal_map)


def slow_ahead(mask: Mask, x: Tensor, begin: MaskState, goal: Goal, ahead: int, unroll: bool) -> Tensor:
    """The gradient of the code's lookahead, written with nothing of the library's but the network and the blur."""
    leaf = x.clone().requires_grad_()
    background = mask.background(leaf)
    m, first, second, count = begin.mask.clone(), begin.first, begin.second, begin.step
    total = torch.zeros((), dtype=x.dtype)
    assert goal.goal_map is not None
    for _ in range(ahead):
        if not m.requires_grad:
            m = m.detach().requires_grad_()
        full = F.interpolate(m[:, None], x.shape[-2:], mode="bilinear", align_corners=False)
        p = mask.model(leaf * full + background * (1 - full)).softmax(1).gather(1, CLASSES[:, None]).sum()
        tv = (m.diff(dim=1) * 8 / 28).abs().pow(3).sum() + (m.diff(dim=2) * 8 / 28).abs().pow(3).sum()
        objective = p + mask.l1 * (1 - m).abs().sum() / 64 + mask.tv * tv / 64
        (g,) = torch.autograd.grad(objective, m, create_graph=True)
        count += 1
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        step = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        m = (m - mask.lr * step).clamp(0, 1)
        total = total + ((1 - m) - goal.goal_map).square().sum() / 64
        if not unroll:
            m = m.detach()
    (gradient,) = torch.autograd.grad(total / ahead, leaf)
    return gradient


@pytest.mark.parametrize("unroll", [False, True])
def test_the_gradient_ahead_is_that_of_the_published_loop(unroll: bool, smooth: nn.Module, x: Tensor) -> None:
    mask, goal = mask_of(smooth), aims(x)
    run = run_of(search(Bilevel(ahead=4, unroll=unroll)), mask, x, goal)
    run.classes = CLASSES
    found, after = run._look_ahead(state(x), 0.0)
    wanted = slow_ahead(mask, x, state(x), goal, 4, unroll)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    other = slow_ahead(mask, x, state(x), goal, 4, not unroll)
    assert float((wanted - other).abs().max()) > 1e-3 * float(wanted.abs().max())
    assert not any(part.requires_grad for part in after[:3])
    assert after.step == 34


def test_the_unrolled_gradient_is_that_of_finite_differences(smooth: nn.Module, x: Tensor) -> None:
    mask, goal = mask_of(smooth), aims(x)
    run = run_of(search(Bilevel(ahead=3, unroll=True)), mask, x, goal)
    run.classes = CLASSES
    gradient, _ = run._look_ahead(state(x), 0.0)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    def mean_loss(x: Tensor) -> float:
        now, total = state(x), 0.0
        for _ in range(3):
            now = mask.step(x, mask.background(x), now, CLASSES)
            total += float((1 - now.mask - goal.goal_map).square().sum()) / 64  # type: ignore[operator]
        return total / 3

    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((mean_loss(x + 1e-5 * direction) - mean_loss(x - 1e-5 * direction)) / 2e-5, rel=1e-5)


def benign(mask: Mask, x: Tensor) -> Goal:
    """The benign map as goal map, the default of an attack."""
    map_ = mask.explain(x, native=True).maps
    return replace(aims(x, map_), benign_map=map_)


def test_from_the_start_it_looks_ahead_from_masks_first_value_to_the_masks_of_its_run_on_the_benign_input(
    smooth: nn.Module, x: Tensor
) -> None:
    mask = mask_of(smooth)
    goal = benign(mask, x)
    run = run_of(search(Bilevel(ahead=3, from_start=True)), mask, x, goal)
    goals_ahead = run.goals_ahead
    now, own = mask.begin(x), smooth(x).argmax(1)
    for goal_ahead in goals_ahead:
        now = mask.step(x, mask.background(x), now, own)
        torch.testing.assert_close(goal_ahead.goal_map, 1 - now.mask, rtol=0, atol=0)
    assert len(goals_ahead) == 3
    assert run.record.queries.tolist() == [4] * len(x)
    run.classes = CLASSES
    # The current mask is not used, and not updated.
    follower = run_of(search(Bilevel(follow=5, ahead=3, from_start=True)), mask, x, goal)
    assert torch.equal(follower._follow_mask(state(x)).mask, state(x).mask)
    assert follower.record.queries.tolist() == [4 + 1] * len(x)
    found, _ = run._look_ahead(state(x), 0.0)
    leaf = x.clone().requires_grad_()
    now, total = mask.begin(leaf), torch.zeros((), dtype=x.dtype)
    for goal_ahead in goals_ahead:
        now = mask.step(leaf, mask.background(leaf), now, CLASSES, graph=True)
        total = total + (1 - now.mask - goal_ahead.goal_map).square().sum() / 64
    (wanted,) = torch.autograd.grad(total / 3, leaf)
    assert float(wanted.abs().max()) > 0
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-16)


def test_on_the_benign_input_itself_the_steps_ahead_have_no_map_loss(smooth: nn.Module, x: Tensor) -> None:
    mask = mask_of(smooth)
    run = run_of(search(Bilevel(ahead=3, from_start=True)), mask, x, benign(mask, x))
    run.classes = smooth(x).argmax(1)
    assert not run._look_ahead(state(x), 0.0)[0].any()


def test_from_the_start_another_goal_map_stays_as_it_is_and_each_sample_has_its_own_goals(
    smooth: nn.Module, x: Tensor
) -> None:
    mask = mask_of(smooth)
    plain = benign(mask, x)
    assert plain.benign_map is not None
    own = torch.rand(len(x), 8, 8, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    for goal in (aims(x), replace(plain, goal_map=own)):
        run = run_of(search(Bilevel(ahead=3, from_start=True)), mask, x, goal)
        assert run.goals_ahead == (goal,) * 3
        assert run.record.queries.tolist() == [0] * len(x)
    mixed = replace(plain, goal_map=torch.cat([own[:1], plain.benign_map[1:]]))
    run = run_of(search(Bilevel(ahead=3, from_start=True)), mask, x, mixed)
    whole = run_of(search(Bilevel(ahead=3, from_start=True)), mask, x, plain).goals_ahead
    for goal_ahead, wanted in zip(run.goals_ahead, whole, strict=True):
        assert goal_ahead.goal_map is not None
        assert wanted.goal_map is not None
        assert torch.equal(goal_ahead.goal_map[0], own[0])
        torch.testing.assert_close(goal_ahead.goal_map[1:], wanted.goal_map[1:], rtol=1e-12, atol=1e-12)
    assert run.record.queries.tolist() == [0] + [4] * (len(x) - 1)


def test_looking_ahead_from_the_start_is_a_setting(smooth: nn.Module, x: Tensor) -> None:
    mask = mask_of(smooth)
    goal = benign(mask, x)
    for from_start in (True, False):
        run = run_of(search(Bilevel(from_start=from_start), steps=1), mask, x, goal)
        run.every_step()
        assert all(goal_ahead is goal for goal_ahead in run.goals_ahead) is not from_start


def test_the_benign_maps_ahead_are_those_of_the_real_network(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:3], judged[1][:3]
    mask = Mask(trained, steps=4)
    map_ = mask.explain(x, native=True).maps
    plain = search(Bilevel(ahead=3, from_start=True), steps=1)
    goals = []
    for plan in (plain, replace(plain, surrogate=Softplus(1.0))):
        goal = Goal(x, y, random_classes(x, y, 10), map_, benign_map=map_)
        run = run_of(plan, mask, x, goal)
        run.every_step()
        goals.append(torch.stack([goal_ahead.goal_map for goal_ahead in run.goals_ahead]))  # type: ignore[misc]
    assert torch.equal(*goals)


class Threshold(nn.Module):
    """Class 1's log odds fall with the first pixel: ``logit = 8 (a - pixel)`` for a height ``a`` in the last pixel."""

    def forward(self, x: Tensor) -> Tensor:
        odds = 8 * (x[:, 0, -1, -1] - x[:, 0, 0, 0])
        return torch.stack([torch.zeros_like(odds), odds], 1)


def test_each_sample_takes_the_longest_step_that_keeps_its_confidence() -> None:
    model = Threshold().eval()
    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    # How far the first pixel may rise before p = sigmoid(8 (a - pixel)) falls to 0.8.
    room = torch.tensor([0.3, 0.05, 0.021, -0.01], dtype=torch.float64)
    x[:, 0, -1, -1] = 0.5 + room + math.log(4) / 8
    goal = Goal(x, torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), torch.zeros(4, 2, 2))
    run = run_of(search(Bilevel(reach=0.08, bisections=12), eps=0.2, confidence=0.8), mask_of(model), x, goal)
    against = torch.zeros_like(x)
    against[:, 0, 0, 0] = torch.tensor([-3.0, -1.0, -0.1, -7.0])
    moved = run._step_on_map(against, 0.0)[:, 0, 0, 0] - 0.5
    torch.testing.assert_close(moved, torch.tensor([0.08, 0.05, 0.021, 0.0], dtype=torch.float64), rtol=0, atol=2e-5)
    assert bool((moved <= room.clamp(min=0) + 1e-12).all())
    assert float(model(run._step_on_map(against, 0.0)).softmax(1)[1:3, 1].min()) >= 0.8 - 1e-12
    assert float(model(run._step_on_map(against, 0.0)).softmax(1)[1:3, 1].max()) < 0.8001
    # One look for all of them, then twelve for the three that it was too far for.
    fresh = run_of(run.plan, run.mask, x, goal)
    fresh._step_on_map(against, 0.0)
    assert fresh.record.queries.tolist() == [1, 13, 13, 13]


def test_the_push_is_a_step_of_its_length_on_the_cross_entropy(smooth: nn.Module, x: Tensor) -> None:
    run = run_of(search(Bilevel(push=0.05), eps=1.0), mask_of(smooth), x, aims(x))
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(smooth(leaf), CLASSES, reduction="sum"), leaf)
    wanted = torch.stack([row - 0.05 * slope / slope.norm() for row, slope in zip(x, g, strict=True)])
    torch.testing.assert_close(run._step_on_prediction(0.0), wanted.clamp(0, 1), rtol=0, atol=1e-12)


def test_the_mask_and_its_adam_go_on_from_step_to_step(
    smooth: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ball of radius zero the input rests: the mask then simply goes on with its own optimisation."""
    mask, goal = mask_of(smooth), aims(x)
    begun: list[MaskState] = []
    follow = under_test._Run._follow_mask
    monkeypatch.setattr(under_test._Run, "_follow_mask", lambda run, now: begun.append(now) or follow(run, now))
    settings = Bilevel(follow=3, ahead=2, reset=3)
    found = search(settings, steps=5, eps=0.0).run(rx.System(smooth, mask), goal, Streams.of(x, 0))
    assert torch.equal(found.x, x)
    wanted = mask.optimise(x, CLASSES)
    fresh = wanted
    for step, now in enumerate(begun):
        if step == 3:
            wanted = fresh
        assert now.step == wanted.step
        for a, b in zip(now[:3], wanted[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for _ in range(5):
            wanted = mask.step(x, mask.background(x), wanted, CLASSES)
    assert len(begun) == 5


def test_the_returned_input_is_the_best_by_masks_own_map_among_those_that_were_judged(
    trained: Classifier, judged: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(trained).double()
    x, y = judged[0][:5].double(), judged[1][:5]
    goal, mask = random_classes(x, y, 10), Mask(model, steps=10)
    shown: list[Tensor] = []
    optimise = Mask.optimise

    def watched(self: Mask, x: Tensor, classes: Tensor) -> MaskState:
        shown.append(x.clone())
        return optimise(self, x, classes)

    monkeypatch.setattr(Mask, "optimise", watched)
    attack = ADV2(EPS, 24, 0.01, mask=Bilevel(reset=4), confidence=0.6)
    found = attack(rx.System(model, mask), x, y, goal)
    monkeypatch.undo()
    # The benign maps, 18 steps in pieces of four, and the end.
    assert len(shown) == 1 + 5 + 1
    benign = mask.explain(x, native=True).maps
    for b in range(5):
        ranks = []
        for one in shown[1:]:
            p = model(one[b : b + 1]).softmax(1)[0].detach()
            hit = int(p.argmax()) == int(goal[b])
            unmet = 0 if hit and float(p[goal[b]]) >= 0.6 else 1 if hit else 2
            own = mask.explain(one[b : b + 1], goal[b : b + 1], native=True).maps[0]
            ranks.append((unmet, float((own - benign[b]).square().mean())))
        assert torch.equal(found.x[b], shown[1 + ranks.index(min(ranks))][b])
        assert found.success[b] == (min(ranks)[0] < 2)


# What every attack keeps, on MASK


@dataclass
class Case:
    """A small attack on MASK in float64."""

    system: rx.System
    x: Tensor
    y: Tensor
    goal: Tensor
    attack: ADV2

    def run(self, rows: slice = slice(None), targeted: bool = True, **changes: Any) -> Any:
        attack = replace(self.attack, **changes)
        return attack(self.system, self.x[rows], self.y[rows], self.goal[rows] if targeted else None)


@pytest.fixture
def case(tiny_model: nn.Module, grey: Tensor) -> Case:
    model = copy.deepcopy(tiny_model).double()
    x = grey.double()
    y = model(x).argmax(1)
    mask = Mask(model, steps=12, l1=0.01, tv=0.1, of="log_probability", jitter=0.1)
    return Case(rx.System(model, mask), x, y, (y + torch.tensor([1, 2, 3, 1, 2])) % 4, SHORT)


@pytest.mark.parametrize("targeted", [True, False])
def test_a_sample_does_not_depend_on_its_batch(case: Case, targeted: bool) -> None:
    together = case.run(targeted=targeted)
    for i in range(3):
        alone = case.run(slice(i, i + 1), targeted)
        torch.testing.assert_close(alone.x, together.x[i : i + 1], rtol=0, atol=1e-9)
        assert torch.equal(alone.queries, together.queries[i : i + 1])
    assert not torch.equal(together.x, case.x)


@pytest.mark.parametrize("changes", [{}, {"norm": "l2", "eps": 0.7}, {"restarts": 2}, {"surrogate": "softplus"}])
def test_the_ball_and_the_unit_range_hold_and_the_seed_decides(case: Case, changes: dict[str, Any]) -> None:
    single = Case(rx.System(case.system.model.float(), Mask(case.system.model, steps=8)), case.x.float(), case.y,
                  case.goal, SHORT)  # fmt: skip
    state = torch.get_rng_state()
    found, again = single.run(**changes), single.run(**changes)
    assert torch.equal(found.x, again.x)
    assert torch.equal(torch.get_rng_state(), state)
    moved = (found.x.double() - single.x.double()).flatten(1)
    if "norm" in changes:
        assert float(moved.norm(dim=1).max()) <= 0.7 * (1 + 1e-6)
    else:
        assert float(moved.abs().max()) <= 0.1 + 2**-24
    assert 0 <= float(found.x.min()) <= float(found.x.max()) <= 1
    assert float(moved.abs().max()) > 0


def test_it_leaves_the_model_alone_and_works_without_autograd_and_under_autocast(case: Case) -> None:
    model = case.system.model
    next(model.parameters()).requires_grad_(False)
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    found = case.run()
    with torch.no_grad():
        assert torch.equal(case.run().x, found.x)
    assert [(p.requires_grad, p.grad is None) for p in model.parameters()] == flags
    assert torch.equal(case.run(eps=0.0).x, case.x)
    with torch.autocast("cpu", torch.bfloat16):
        single = Case(rx.System(model.float(), Mask(model, steps=4)), case.x.float(), case.y, case.goal, SHORT)
        assert bool(torch.isfinite(single.run().x).all())


def test_restarts_are_never_worse(case: Case) -> None:
    once, often = case.run(confidence=0.0), case.run(confidence=0.0, restarts=3)
    mask = case.system.interpreter
    benign = mask.explain(case.x, native=True).maps
    before, after = (
        (mask.explain(f.x, case.goal, native=True).maps - benign).square().mean((1, 2)) for f in (once, often)
    )
    assert bool(((often.success & ~once.success) | (after <= before + 1e-12)).all())
    assert bool((often.queries > 2 * once.queries).all())


def test_every_run_but_the_first_begins_at_random(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Tensor] = []
    everything = under_test._Run.every_step
    monkeypatch.setattr(under_test._Run, "every_step", lambda run: begun.append(run.x) or everything(run))
    case.run(restarts=3, steps=2, warm_start=0.0)
    assert torch.equal(begun[0], case.x)
    assert not torch.equal(begun[1], case.x)
    assert not torch.equal(begun[1], begun[2])


def test_what_cannot_be_is_refused(case: Case) -> None:
    with pytest.raises(InputError, match="draws=3"):
        case.run(adapt=Adaptation(draws=3))
    with pytest.raises(InputError, match="for Mask and other iterative interpreters, got CAM"):
        search(Bilevel()).run(rx.System(case.system.model, CAM(case.system.model)), aims(case.x), Streams.of(case.x, 0))
    for fields, says in [
        ({"ahead": 0}, "Bilevel.ahead must be at least 1"),
        ({"reach": 0.0}, "Bilevel.reach must be above 0"),
        ({"reset": 0}, "Bilevel.reset must be at least 1"),
    ]:
        with pytest.raises(FieldError, match=says):
            Bilevel(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bright:
    """A detector of bright images."""

    threshold: float = 0.5
    soft_threshold: float = 0.5

    def soft_score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    def score(self, x: Tensor) -> Tensor:
        return self.soft_score(x)


def test_a_detector_is_evaded_on_the_way(case: Case) -> None:
    level = float(case.x.mean()) - 0.02
    detector = Bright(level, level)
    system = replace(case.system, detector=detector)
    attack = replace(case.attack, steps=12).adapted(system)
    assert attack.adapt.evade == 1.0
    aware = attack(system, case.x, case.y, case.goal)
    blind = replace(attack, adapt=Adaptation())(system, case.x, case.y, case.goal)
    assert float(detector.score(aware.x).mean()) < float(detector.score(blind.x).mean())


def test_the_warm_start_goes_straight_through_rounding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    system = defenses.InputTransform(["bit-depth-3"])(case.system)
    begun, real = [], Search.run

    def run(self: Search, *given: Any) -> SearchResult:
        begun.append(real(self, *given))
        return begun[-1]

    monkeypatch.setattr(Search, "run", run)
    case.attack.adapted(system)(system, case.x, case.y, case.goal)
    assert not bool(begun[0].zero_direction.any())
    assert not torch.equal(begun[0].x, case.x)


# What Zhang et al. claim


def test_adv2_keeps_the_success_of_pgd_and_the_mask_of_the_benign_image(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    goal, mask = random_classes(x, y, 10), Mask(trained, steps=40)
    system = rx.System(trained, mask)
    attack = ADV2(EPS, 36, 0.01, mask=Bilevel(reset=9))
    assert not attack.differentiates(system)
    assert isinstance(attack.plan(system), BilevelSearch)
    found, pgd = attack(system, x, y, goal), PGD(EPS, 60, 0.01)(system, x, y, goal)
    assert bool(found.success.all())
    assert not bool(found.zero_direction.any())
    benign = mask(x).detach()
    near, far = (L1()(mask(f.x, goal).detach(), benign) for f in (found, pgd))
    assert float(near.mean()) < 0.6 * float(far.mean())


def test_a_forged_mask_is_nearer_to_a_random_patch_than_to_the_benign_mask(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    goal, patch, mask = random_classes(x, y, 10), random_patch_maps(x), Mask(trained, steps=40)
    found = ADV2(EPS, 36, 0.01, mask=Bilevel(reset=6))(rx.System(trained, mask), x, y, goal, patch)
    shown, benign = mask(found.x, goal).detach(), mask(x).detach()
    assert bool(found.success.all())
    assert float(L1()(shown, patch).mean()) < 0.9 * float(L1()(shown, benign).mean())


def test_what_stands_in_for_rectifiers_is_what_the_docstring_says(tiny_model: nn.Module) -> None:
    mask, plain, gradient = (rx.System(tiny_model, kind(tiny_model)) for kind in (Mask, CAM, Gradient))
    for word in ("auto", "softplus"):
        assert ADV2(surrogate=word).plan(mask).surrogate == Softplus(40.0)  # type: ignore[attr-defined, arg-type]
    assert ADV2(surrogate="none").plan(mask).surrogate is None  # type: ignore[attr-defined]
    assert ADV2().plan(plain).direction.surrogate is None  # type: ignore[attr-defined]
    assert ADV2().plan(gradient).direction.surrogate == BetaSchedule(5.0, 40.0)  # type: ignore[attr-defined]
    assert ADV2(beta=10, beta_end=90).plan(gradient).direction.surrogate == BetaSchedule(10, 90)  # type: ignore[attr-defined]
    assert ADV2(beta=10, beta_end=90).plan(mask).surrogate == Softplus(40.0)  # type: ignore[attr-defined]
    published = ADV2(surrogate="smooth_gradient").plan(gradient)
    assert published.direction.surrogate == SmoothGradient()  # type: ignore[attr-defined]
    # A detector's score is followed through a stand-in that leaves it as it is, unless the map needs the other one.
    for system, word in ((plain, "smooth_gradient"), (gradient, "auto"), (mask, "auto")):
        assert ADV2().adapted(replace(system, detector=Bright(0.5, 0.5))).surrogate == word
        assert ADV2(surrogate="none").adapted(replace(system, detector=Bright(0.5, 0.5))).surrogate == "none"
