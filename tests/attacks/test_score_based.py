"""Attacks that only ask: what they find, what they ask for it, and that they look inside nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain.attacks import (
    ADV2,
    NES,
    PGD,
    SPSA,
    Attack,
    Evolution,
    Noise,
    Square,
    Substitute,
    random_patch_maps,
)
from robustexplain.attacks.explanation.attaxai import _Generation, latin_normal
from robustexplain.attacks.prediction.square import _bump, _Squares
from robustexplain.attacks.threat import L2, Linf
from robustexplain.data import Data, stack, take
from robustexplain.errors import InputError
from robustexplain.interpreters import CAM, LIME, RISE, Captum, Interpreter
from robustexplain.models import Classifier
from robustexplain.random_streams import Streams
from robustexplain.training import Training

Bench = tuple[rx.System, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> Bench:
    """A system, images it gets right, their labels and goal classes."""
    x, y = judged
    right = trained(x).argmax(1) == y
    x, y = x[right], y[right]
    system = rx.System(trained, CAM(trained))
    # An interpreter looks for its layer once.
    system(x[:1])
    return system, x, y, (y + 3) % 10


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the model's forward passes."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


class Sealed(nn.Module):
    """A model without any gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.model(x).numpy().copy())


ASKING: list[Attack] = [
    Square(0.08, 60),
    Square(0.8, 60, norm="l2"),
    NES(0.1, samples=10, max_queries=60),
    SPSA(0.1, samples=9, max_queries=60),
    NES(0.1, samples=10, max_queries=60, joint=True),
    Evolution(0.1, steps=4, population=15),
]


@pytest.mark.parametrize("attack", ASKING, ids=lambda a: f"{type(a).__name__}-{getattr(a, 'norm', '')}")
@pytest.mark.parametrize("targeted", [True, False])
def test_every_input_shown_is_counted_and_the_budget_is_kept(bench: Bench, attack: Attack, targeted: bool) -> None:
    system, x, y, goal = (bench[0], *(t[:10] for t in bench[1:]))
    wanted = goal if targeted and not attack.keeps_prediction else None
    with counted(system.model) as sizes:
        found = attack(system, x, y, wanted)
    # One look at the door, the benign map where maps matter, and the verdict.
    door = 1 + len(x) * (1 + attack.needs_maps)
    assert sum(sizes) == door + int(found.queries.sum())
    assert int(found.queries.max()) <= 60
    if not attack.needs_maps and 0 < int(found.success.sum()) < len(x):
        # Who succeeds leaves, and asks no more.
        assert float(found.queries[found.success].float().mean()) < float(found.queries[~found.success].float().min())


@pytest.mark.parametrize("attack", [a for a in ASKING if not a.needs_maps], ids=lambda a: type(a).__name__)
def test_they_need_no_gradient_of_the_model(bench: Bench, attack: Attack) -> None:
    system, x, y, _ = (bench[0], *(t[:6] for t in bench[1:]))
    sealed = Sealed(system.model).eval()
    blind = rx.System(sealed, RISE(sealed, samples=8))
    open_ = attack(system, x, y)
    assert torch.equal(attack(blind, x, y).x, open_.x)


# --- Square ---


@pytest.mark.parametrize(("norm", "eps", "name"), [("linf", 0.06, "Linf"), ("l2", 0.8, "L2")])
def test_square_succeeds_as_often_as_torchattacks(bench: Bench, norm: str, eps: float, name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    system, x, y, _ = bench
    with torch.random.fork_rng(devices=[]):
        theirs = torchattacks.Square(system.model, norm=name, eps=eps, n_queries=120)(x, y)
    with torch.no_grad():
        rate = float((system.model(theirs).argmax(1) != y).float().mean())
    # Runs of forty images differ by their draws: the mean of two seeds must come within a few of them.
    mine = [float(Square(eps, 120, norm=norm, seed=k)(system, x, y).success.float().mean()) for k in range(2)]  # type: ignore[arg-type]
    assert rate > 0.05
    assert sum(mine) / 2 == pytest.approx(rate, abs=0.08)


def test_square_beats_noise_at_the_corners_of_the_ball(bench: Bench) -> None:
    system, x, y, goal = bench
    noise = Noise(0.08, "sign")(system, x, y).success.float().mean()
    assert float(Square(0.08, 150)(system, x, y).success.float().mean()) > float(noise) + 0.3
    assert float(Square(0.1, 300)(system, x[:16], y[:16], goal[:16]).success.float().mean()) > 0.4


def test_square_never_ends_with_a_worse_loss_than_its_stripes(bench: Bench) -> None:
    system, x, y, _ = bench
    margins = []
    for queries in (2, 20, 80):
        found = Square(0.05, queries)(system, x, y)
        logits = system.model(found.x).detach()
        other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        margins.append((logits.gather(1, y[:, None])[:, 0] - other).clamp(min=0))
    assert bool((margins[2] <= margins[0] + 1e-5).all())
    assert float(margins[2].mean()) < float(margins[1].mean()) < float(margins[0].mean())


def test_the_first_proposal_is_vertical_stripes_at_the_corners(bench: Bench) -> None:
    _, x, _, _ = bench
    x = x[:4] * 0.5 + 0.25
    first = _Squares(Linf(0.1), 0.8, 9)._first(x, Streams.of(x, 0)) - x
    torch.testing.assert_close(first.abs(), torch.full_like(first, 0.1), rtol=0, atol=1e-6)
    assert bool((first.sign() == first.sign()[:, :, :1]).all())
    assert not torch.equal(first[0], first[1])


def test_a_square_changes_one_square_by_one_sign_a_channel() -> None:
    x = torch.full((30, 3, 12, 12), 0.5, dtype=torch.float64)
    signs = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1)
    best = x + 0.1 * signs.double()
    found = _Squares(Linf(0.1), 0.8, 9)._next(x, best, 3.4, Streams.of(best, 1))
    moved = (found != best).any(1)
    for i in range(30):
        rows, columns = moved[i].any(1).nonzero()[:, 0], moved[i].any(0).nonzero()[:, 0]
        assert int(rows.max() - rows.min()) < 3
        assert int(columns.max() - columns.min()) < 3
        where = found[i][:, moved[i]] - 0.5
        assert bool((where.sign() == where.sign()[:, :1]).all())


def test_squares_shrink_on_the_published_schedule() -> None:
    def published(step: int, budget: int, p: float) -> float:
        place = int(step / budget * 10000)
        for most, share in ((10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128)):
            if place <= most:
                return p / share
        return p / 256 if place <= 8000 else p / 512

    for budget in (10_000, 500):
        plan = _Squares(Linf(0.1), 0.8, budget)
        assert all(plan._share(i) == published(i, budget, 0.8) for i in range(budget))


@pytest.mark.parametrize("size", [1, 3, 6, 7, 11])
def test_the_bump_is_two_heaps_of_rectangles(size: int) -> None:
    def heap(height: int, width: int) -> np.ndarray:
        grid = np.zeros((height, width))
        for i in range(height):
            for j in range(width):
                # A pixel lies in every rectangle that reaches as far from the middle as it is.
                start = max(abs(i - height // 2), abs(j - width // 2))
                grid[i, j] = sum(1 / (r + 1) ** 2 for r in range(start, max(height, width) // 2 + 1))
        return grid / max(np.sqrt((grid**2).sum()), 1e-12)

    expected = np.concatenate([heap(size // 2, size), -heap(size - size // 2, size)])
    np.testing.assert_allclose(np.array(_bump(size)), expected / np.sqrt((expected**2).sum()), atol=1e-12)


def test_an_l2_move_keeps_the_norm_and_empties_a_window() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 20, 20, generator=rng, dtype=torch.float64) * 0.4 + 0.3
    plan, streams = _Squares(L2(1.0), 0.8, 9), Streams.of(x, 0)
    best = plan._first(x, streams)
    torch.testing.assert_close((best - x).flatten(1).norm(dim=1), torch.ones(12, dtype=torch.float64))
    delta = plan._moved(best - x, 5, streams)
    same = (delta == best - x).all(1)
    # Two windows of 25 pixels at most, and no mass made: it was moved.
    assert int((~same).sum((1, 2)).max()) <= 50
    assert int((~same).sum((1, 2)).min()) >= 25
    assert float((delta == 0).all(1).sum((1, 2)).float().mean()) > 5
    assert float(delta.flatten(1).norm(dim=1).max()) <= 1 + 1e-9


# --- NES and SPSA ---


@pytest.mark.parametrize("attack", [NES(0.1, samples=20, max_queries=420), SPSA(0.1, samples=20, max_queries=420)])
def test_estimated_gradients_mislead_within_the_budget(bench: Bench, attack: NES | SPSA) -> None:
    system, x, y, _ = bench
    found = attack(system, x, y)
    assert float(found.success.float().mean()) > 0.6
    assert float(Noise(0.1, "sign")(system, x, y).success.float().mean()) < 0.4
    assert int(found.queries.max()) <= 420
    assert float(found.queries[found.success].float().mean()) < 0.7 * 420


def test_more_queries_mislead_more_often(bench: Bench) -> None:
    system, x, y, _ = bench
    few, many = (NES(0.08, samples=10, max_queries=n)(system, x, y).success.float().mean() for n in (45, 360))
    assert float(many) > float(few) + 0.2


@pytest.mark.parametrize("attack", [NES, SPSA])
def test_a_budget_that_pays_for_no_step_is_refused(attack: type[NES] | type[SPSA]) -> None:
    with pytest.raises(InputError, match=r"max_queries must pay for a step of 11 .*got 11"):
        attack(samples=9, max_queries=11)


def blind(model: nn.Module) -> list[Interpreter]:
    return [
        LIME(model, samples=30),
        RISE(model, samples=30),
        Captum(model, "Occlusion", {"sliding_window_shapes": (1, 8, 8), "strides": (1, 8, 8)}),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_joint_attacks_work_on_interpreters_without_a_gradient(bench: Bench, which: int) -> None:
    system, x, y, goal = (bench[0], *(t[:2] for t in bench[1:]))
    hidden = rx.System(system.model, blind(system.model)[which])
    attacks: list[Attack] = [
        NES(samples=4, max_queries=16, joint=True),
        SPSA(samples=4, max_queries=16, joint=True),
        Evolution(steps=2, population=5),
    ]
    moved = []
    for attack in attacks:
        found = attack(hidden, x, y, None if attack.keeps_prediction else goal)
        assert found.queries.tolist() == [found.queries[0]] * 2
        moved.append(not torch.equal(found.x, x))
    assert any(moved)


def test_the_joint_search_keeps_the_map_nearer_than_the_prediction_alone(bench: Bench) -> None:
    system, x, y, goal = (bench[0], *(t[:8] for t in bench[1:]))
    alone = NES(0.12, samples=20, max_queries=631)
    joint = replace(alone, joint=True, weight=20.0)
    assert (alone.needs_maps, joint.needs_maps) == (False, True)
    benign = ops.minmax(system.interpreter(x).detach())
    errors, rates = [], []
    for attack in (PGD(0.12, 40, 0.01), joint):
        found = attack(system, x, y, goal)
        errors.append((ops.minmax(system.interpreter(found.x, goal).detach()) - benign).square().mean((1, 2)))
        rates.append(float(found.success.float().mean()))
    assert rates[1] > 0.4
    assert float(errors[1].mean()) < 0.8 * float(errors[0].mean())


# --- evolution ---


def test_the_latin_hypercube_draws_once_from_every_interval() -> None:
    x = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    members = list(latin_normal(x, 20, Streams.of(x, 0)))
    assert len(members) == 21
    assert not members[0].any()
    share = torch.special.ndtr(torch.stack(members[1:]).flatten(2))
    found = (share * 20).floor().long().sort(0).values
    assert torch.equal(found, torch.arange(20)[:, None, None].expand_as(found))
    assert not torch.equal(members[1][0], members[1][1])


def test_a_generations_gradients_are_those_of_the_published_sums() -> None:
    rng = np.random.default_rng(0)
    sigma, noise, loss = 0.07, rng.normal(size=(9, 12)), rng.normal(size=9) * 40
    noise[0] = 0
    rewards = (-loss - (-loss).mean()) / (-loss).std(ddof=1)
    mean = sum(rewards[k] * (noise[k] * sigma) / sigma for k in range(9)) / 9
    spread = sum(rewards[k] * (((noise[k] * sigma) ** 2 - sigma**2) / sigma**3).mean() for k in range(1, 9)) / 8
    sums = _Generation.none(torch.zeros(1, 1, 3, 4, dtype=torch.float64))
    for k in range(9):
        sums.add(torch.tensor([loss[k]]), torch.tensor(noise[k]).reshape(1, 1, 3, 4))
    found, widen = sums.gradients()
    np.testing.assert_allclose(found.flatten().numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(float(widen) / sigma, spread, rtol=1e-12)


def test_evolution_moves_the_map_and_keeps_the_prediction(bench: Bench) -> None:
    system, x, y, _ = (bench[0], *(t[:4] for t in bench[1:]))
    goal = random_patch_maps(x)
    found = Evolution(0.15, steps=30, population=20)(system, x, y, None, goal)
    assert bool(found.success.all())
    assert found.queries.tolist() == [600] * 4
    wanted = ops.unit_sum(goal)
    before, after = (
        (ops.unit_sum(system.interpreter(v).detach()) - wanted).square().mean((1, 2)) for v in (x, found.x)
    )
    assert bool((after < before).all())
    assert float((after / before).mean()) < 0.98


# --- substitute ---


@dataclass
class Trained:
    """A substitute and what it cost."""

    make: Substitute
    attack: Attack
    asked: int


@pytest.fixture(scope="module")
def fitted(bench: Bench, digits: Data) -> Trained:
    make = Substitute(
        craft=PGD(0.15, 20, 0.02),
        rounds=4,
        max_queries=500,
        training=Training(epochs=6, batch_size=32, lr=5e-3),
    )
    x, y = stack(take(digits.defense, 100))
    with counted(bench[0].model) as sizes:
        attack = make.fitted(bench[0], x, y)
    return Trained(make, attack, sum(sizes))


def test_the_substitute_asks_no_more_than_its_budget_and_says_how_often(fitted: Trained) -> None:
    # 100, doubled twice; the third doubling has room for 100.
    assert fitted.asked == fitted.attack.spent == 500  # type: ignore[attr-defined]


def test_what_misleads_the_substitute_misleads_the_system(bench: Bench, fitted: Trained) -> None:
    system, x, y, _ = bench
    found = fitted.attack(system, x, y)
    carried = float(found.success.float().mean())
    assert carried > float(Noise(0.15, "sign")(system, x, y).success.float().mean()) + 0.2
    assert carried <= float(PGD(0.15, 20, 0.02)(system, x, y).success.float().mean())
    assert found.queries.tolist() == [0] * len(x)
    assert float((found.x - x).abs().max()) <= 0.15 + 2**-24


def test_the_substitute_never_sees_a_gradient_of_the_system(bench: Bench, digits: Data) -> None:
    system, x, y, goal = (bench[0], *(t[:4] for t in bench[1:]))
    sealed = Sealed(system.model).eval()
    make = Substitute(rounds=2, training=Training(epochs=1, batch_size=16))
    own = stack(take(digits.defense, 32))
    blind_, open_ = (make.fitted(s, *own) for s in (rx.System(sealed, RISE(sealed, samples=4)), system))
    assert torch.equal(blind_(system, x, y, goal).x, open_(system, x, y, goal).x)


def test_new_images_follow_the_sign_of_the_answers_gradient(bench: Bench) -> None:
    system, x, _, _ = bench
    x, make = x[:3], Substitute(augment_step=0.05, period=2)
    answer = torch.tensor([1, 5, 7])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(system.model(leaf).softmax(1).gather(1, answer[:, None]).sum(), leaf)
    for number, sign in enumerate((1, 1, -1, -1, 1)):
        expected = (x + sign * 0.05 * gradient.sign()).clamp(0, 1)
        found = make._moved(system.model, x, answer, number)
        assert float((found != expected).float().mean()) < 0.01


def test_a_joint_substitute_shows_the_deployed_map(bench: Bench, digits: Data) -> None:
    system, x, y, goal = (bench[0], *(t[:6] for t in bench[1:]))
    make = Substitute(
        joint=ADV2(0.15, 15, 0.02), interpreter="cam", rounds=1, training=Training(epochs=8, batch_size=32, lr=1e-2)
    )
    attack = make.fitted(system, *stack(take(digits.defense, 100)))
    assert (make.needs_maps, attack.needs_maps) == (False, True)
    assert attack(system, x, y, goal).x.shape == x.shape
    with counted(system.model) as sizes:
        attack(system, x, y, goal)
    assert sum(sizes) == 1 + 2 * len(x)


def test_a_substitute_must_be_fitted_on_images_of_the_same_kind(bench: Bench, fitted: Trained) -> None:
    system, x, y, _ = bench
    with pytest.raises(InputError, match=r"fitted\(system, x, y\)"):
        fitted.make(system, x, y)
    double = copy.deepcopy(system.model).double()
    with pytest.raises(InputError, match=r"float32 images on cpu, x has torch\.float64"):
        fitted.attack(rx.System(double, CAM(double)), x.double(), y)
    assert fitted.make.summaries()[2] == "PGD on a substitute"
