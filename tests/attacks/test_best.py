"""What a search keeps of its looks: the best iterate, losses that are worked out once, and who was surrogate_misled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, Linf, Search, SignStep, Stage
from robustexplain.attacks.search.best import BestIterates
from robustexplain.attacks.search.directions import Direction, GradientDirection
from robustexplain.autograd.rectifiers import Softplus
from robustexplain.interpreters import CAM, Explanation, Gradient
from robustexplain.models import build
from robustexplain.objectives import Goal, KeepPrediction, MatchMap, Misclassify, Objective, Observation
from robustexplain.random_streams import Streams

BATCH = 6


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("small-cnn", num_classes=4, in_channels=3, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_loss_that_is_followed_and_judged_is_worked_out_once_a_step(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, plain = [0], MatchMap.loss

    def counted(self: MatchMap, seen: Observation, goal: Goal) -> Tensor:
        count[0] += 1
        return plain(self, seen, goal)

    monkeypatch.setattr(MatchMap, "loss", counted)
    label = model(x).argmax(1)
    ADV2(steps=5, warm_start=0.0)(rx.System(model, CAM(model)), x, label, (label + 1) % 4)
    assert count[0] == 5 + 1  # each step, and the last look


def test_a_loss_that_is_drawn_is_drawn_at_every_look(x: Tensor) -> None:
    goal = Goal(x, torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH, dtype=torch.int64))
    seen = Observation(x, torch.randn(BATCH, 4), streams=Streams.of(x, 0))
    drawn, plain = 1.0 * Misclassify(smoothing=0.5), 1.0 * Misclassify()
    with torch.no_grad():
        assert not torch.equal(drawn.loss(seen, goal), drawn.loss(seen, goal))
        assert plain.loss(seen, goal) is plain.loss(seen, goal)


def test_a_noted_loss_is_that_of_its_goal(x: Tensor) -> None:
    seen = Observation(x, torch.randn(BATCH, 4))
    goals = [Goal(x, torch.full((BATCH,), label)) for label in (0, 1)]
    objective = 2.0 * Misclassify()
    with torch.no_grad():
        for goal in (*goals, goals[0]):
            assert torch.equal(objective.loss(seen, goal), 2 * Misclassify().loss(Observation(x, seen.logits), goal))


def test_a_loss_noted_without_a_graph_is_worked_out_again_for_one_who_follows_it(model: nn.Module, x: Tensor) -> None:
    leaf, objective = x.clone().requires_grad_(), Misclassify() + 1.0 * Misclassify()
    seen, goal = Observation(leaf, model(leaf)), Goal(x, torch.zeros(BATCH, dtype=torch.int64))
    with torch.no_grad():
        assert not objective.loss(seen, goal).requires_grad
    assert objective.loss(seen, goal).requires_grad


def test_what_is_kept_carries_no_graph(model: nn.Module, x: Tensor) -> None:
    """Else every step's graph would hang on to the one before it, to the end of the search."""
    leaf, objective = x.clone().requires_grad_(), 1.0 * Misclassify()
    seen, goal, best = (
        Observation(leaf, model(leaf)),
        Goal(x, torch.zeros(BATCH, dtype=torch.int64)),
        BestIterates.none(x),
    )
    assert objective.loss(seen, goal).requires_grad
    best.update(slice(None), seen, goal, objective)
    assert not any(kept.requires_grad for kept in (best.x, best.unmet, best.score, best.stalled()))


def test_the_whole_batch_is_judged_as_its_rows_are(x: Tensor) -> None:
    rng = torch.Generator().manual_seed(1)
    goal = Goal(x, torch.zeros(BATCH, dtype=torch.int64))
    whole, rows = BestIterates.none(x), BestIterates.none(x)
    for turn in range(4):
        seen = Observation(torch.rand(x.shape, generator=rng), torch.randn(BATCH, 4, generator=rng))
        met = [
            best.update(where, seen, goal, Misclassify(), always=turn == 3)
            for best, where in ((whole, slice(None)), (rows, torch.arange(BATCH)))
        ]
        assert torch.equal(*met)
    for name in ("x", "unmet", "score", "gained"):
        assert torch.equal(getattr(whole, name), getattr(rows, name))
    assert torch.equal(whole.stalled(), rows.stalled())


def test_a_search_that_returns_its_last_iterate_has_not_stalled_if_it_fell_on_the_way(x: Tensor) -> None:
    goal = Goal(x[:2], torch.zeros(2, dtype=torch.int64))
    best = BestIterates.none(goal.x)
    for lead, last in ((1.0, False), (0.5, False), (2.0, True)):
        logits = torch.tensor([[lead, 0.0], [max(lead, 1.0), 0.0]])
        best.update(slice(None), Observation(goal.x, logits), goal, Misclassify(), always=last)
    assert best.stalled().tolist() == [False, True]


def test_a_sample_that_meets_all_from_the_start_has_not_stalled(x: Tensor) -> None:
    """Nothing is left to want of it, though its loss has no lower end."""
    goal, best = Goal(x[:2], torch.zeros(2, dtype=torch.int64)), BestIterates.none(x[:2])
    for _ in range(2):
        best.update(slice(None), Observation(goal.x, torch.tensor([[0.0, 1.0], [1.0, 0.0]])), goal, Misclassify())
    assert best.stalled().tolist() == [False, True]


def test_a_bound_ball_keeps_its_sides_with_its_images(x: Tensor) -> None:
    far = x + torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    ball, rows = Linf(0.1), torch.tensor([4, 1])
    bound = ball.bind(x, Streams.of(x, 0))
    assert torch.equal(bound.project(x, far), torch.min(torch.max(far, x - 0.1), x + 0.1).clamp(0, 1))
    assert torch.equal(bound.project(x, far), ball.project(x, far))
    assert torch.equal(bound.select(rows).project(x[rows], far[rows]), ball.project(x[rows], far[rows]))
    assert bound == ball


@dataclass(frozen=True, eq=False)
class ZeroMap(CAM):
    """A map that its own rectifier sets to zero; with a softplus it depends on the image."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        return Explanation(self.model(x), (x.mean(1) - 3).relu())


def test_a_surrogate_that_improves_alone_has_misled(model: nn.Module, x: Tensor) -> None:
    goal = Goal(x, torch.zeros(BATCH, dtype=torch.int64), goal_map=torch.full((BATCH, 16, 16), -1.0))
    system = rx.System(model, ZeroMap(model))
    search = Search(
        Linf(0.1), (Stage(MatchMap("none"), 20, SignStep(0.01)),), GradientDirection(Softplus(1.0)), evaluate_every=5
    )
    found = search.run(system, goal, Streams.of(x, 0))
    assert bool(found.stalled.all())
    assert bool(found.surrogate_misled.all())


@dataclass(frozen=True)
class LabelLogProbability(Objective):
    """The label's log-probability, which falls when the constraint is violated."""

    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        return seen.logits.log_softmax(1).gather(1, goal.label[:, None])[:, 0]


def test_an_iterate_that_gives_up_the_label_for_a_lower_loss_is_no_progress(x: Tensor) -> None:
    """Observation on one photograph in four: every step lowered the loss and lost the label, and nothing said so."""
    before = torch.tensor([[2.0, 0.0]] * 4 + [[0.0, 2.0]] * 2)
    goal, best = Goal(x, torch.zeros(BATCH, dtype=torch.int64), benign_logits=before), BestIterates.none(x)
    for logits in (before, before.flip(1)):
        best.update(slice(None), Observation(x, logits), goal, LabelLogProbability() + 0.0 * KeepPrediction())
    # The last two come to be predicted as they should be.
    assert best.stalled().tolist() == [True] * 4 + [False] * 2


@dataclass(frozen=True)
class Root(Objective):
    """The distance's root, negated: NaN at the start."""

    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        gap = (seen.x - goal.x).flatten(1).sum(1)
        return torch.where(gap == 0, torch.nan, -gap)


def test_a_start_without_a_loss_is_worse_than_any_iterate_with_one(x: Tensor) -> None:
    goal, best = Goal(x, torch.zeros(BATCH, dtype=torch.int64)), BestIterates.none(x)
    for moved in (x, x + 0.1, x):
        best.update(slice(None), Observation(moved, torch.zeros(BATCH, 2)), goal, Root())
    assert torch.equal(best.x, x + 0.1)
    assert not bool(best.stalled().any())


class GreyThreshold(nn.Module):
    """Two classes, divided by a grey value."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 10 * (x.mean((1, 2, 3)) - 0.3)
        return torch.stack([lead, -lead], 1)


@pytest.mark.parametrize("direction", [GradientDirection(), GradientDirection(Softplus(10.0))])
def test_only_a_surrogate_can_mislead(x: Tensor, direction: Direction) -> None:
    """The loss that is followed falls at once and the label with it: no progress, and nobody else's fault."""
    model = GreyThreshold()
    logits = model(x)
    goal = Goal(x, logits.argmax(1), benign_logits=logits)
    search = Search(Linf(1.0), (Stage(LabelLogProbability() + 0.0 * KeepPrediction(), 3, SignStep(1.0)),), direction)
    found = search.run(rx.System(model, Gradient(model)), goal, Streams.of(x, 0))
    assert bool(found.stalled.all())
    assert bool(found.surrogate_misled.all()) == (direction != GradientDirection())
    assert bool(found.surrogate_misled.any()) == (direction != GradientDirection())
