"""One map of several: by deviation, by rank, with weights, of neighbours; and the published benefit."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain.attacks import ADV2, Dombrowski, random_classes
from robustexplain.autograd.straight_through import straight_through
from robustexplain.data import stack
from robustexplain.defenses import AVA, Aggregate, AggregatedInterpreter
from robustexplain.errors import FieldError, InputError, UnsupportedModelError, ZeroMapGradientWarning
from robustexplain.interpreters import CAM, GradCAM, Gradient, NeighbourMean, Reference
from robustexplain.interpreters.composed.aggregate import ranked
from robustexplain.metrics import L1, AvgSensitivity, Complexity
from robustexplain.models import Classifier

MEMBERS = ("gradient", "guided-backprop", "lrp")


# --- what they compute ---


def test_agg_var_is_the_mean_over_the_deviation(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:3].double(), judged[1][:3]
    model = copy.deepcopy(trained).double()
    members = Gradient(model), CAM(model), GradCAM(model)
    weights = (0.5, 0.2, 0.3)
    found = Aggregate(model, members, "sum", "var", weights, floor=0.25)(x, y).detach().numpy()
    for i in range(3):
        maps = np.stack([m(x, y)[i].detach().abs().numpy() for m in members])
        maps = 32 * 32 * maps / maps.sum((1, 2), keepdims=True)
        mean = np.average(maps, axis=0, weights=weights)
        deviation = np.sqrt(np.average((maps - mean) ** 2, axis=0, weights=weights))
        np.testing.assert_allclose(found[i], mean / (deviation + 0.25 * deviation.mean()), rtol=1e-9)


def test_members_that_agree_make_the_mean(tiny_model: nn.Module, grey: Tensor) -> None:
    same = (GradCAM(tiny_model), GradCAM(tiny_model))
    x = grey.clone().requires_grad_()
    found = Aggregate(tiny_model, same, how="var")(x)
    torch.testing.assert_close(found, Aggregate(tiny_model, same)(x))
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.isfinite(gradient).all()


def test_a_rank_aggregate_is_the_mean_of_ranks(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:3], judged[1][:3]
    members = Gradient(trained), CAM(trained)
    found = Aggregate(trained, members, "absmax", "rank", (0.25, 0.75))(x, y).detach().numpy()
    for i in range(3):
        # Rescaled as the aggregate does: rounding makes some values equal.
        one, other = (rankdata(ops.absmax(m(x, y).detach())[i].numpy()).reshape(32, 32) for m in members)
        np.testing.assert_allclose(found[i], (0.25 * one + 0.75 * other) / 1024, rtol=1e-5)


def test_the_slope_of_a_rank_is_what_a_pixel_passes(grey: Tensor) -> None:
    maps = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (none,) = torch.autograd.grad(ranked(maps).sum(), maps)
    assert not none.any()
    with straight_through():
        found = ranked(maps)
        (slope,) = torch.autograd.grad(found.sum(), maps)
    assert torch.equal(found, ranked(maps))
    # The density of normal values, from 1600 of them.
    density = torch.exp(-maps.detach().square() / 2) / np.sqrt(2 * np.pi)
    assert float(ops.correlation(slope.flatten(1), density.flatten(1)).min()) > 0.9
    torch.testing.assert_close(slope.mean(), density.mean(), rtol=0.2, atol=0)
    constant = torch.ones(1, 4, 4, requires_grad=True)
    with straight_through():
        (flat,) = torch.autograd.grad(ranked(constant).sum(), constant)
    assert not flat.any()


def test_an_attack_that_knows_ranks_follows_their_slope(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:4], judged[1][:4]
    system = AggregatedInterpreter(("gradcam", "cam"), how="rank")(rx.System(trained, CAM(trained)))
    assert system.rounds
    assert not AggregatedInterpreter(("gradcam", "cam"))(rx.System(trained, CAM(trained))).rounds
    attack, goal = ADV2(0.125, steps=25, step_size=0.015), random_classes(x, y, 10)
    assert attack.adapted(system).adapt.straight
    with pytest.warns(ZeroMapGradientWarning):
        blind = attack(system, x, y, goal)
    found = attack.adapted(system)(system, x, y, goal)
    assert float(found.success.float().mean()) > 0.8
    with torch.no_grad():
        moved = [float(L1()(system.interpreter(f.x, goal), system.interpreter(x, y)).mean()) for f in (blind, found)]
    print(f"a map of ranks moves by {moved[0]:.3f} under an attack that sees no slope, by {moved[1]:.3f} else")
    assert moved[1] < 0.9 * moved[0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.4, 0.1), "a number for each of the 2 members"),
        ((0.5, 0.4), "shares that add up to 1"),
        ((1.5, -0.5), "shares that add up to 1"),
        ((float("nan"), 1.0), "shares that add up to 1"),
        ("sensitive", "'equal', 'sensitivity', 'complexity' or a number for each member"),
    ],
)
def test_weights_are_shares(trained: Classifier, weights: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        AggregatedInterpreter(("gradient", "cam"), weights=weights)
    if not isinstance(weights, str):
        with pytest.raises(FieldError, match=message):
            Aggregate(trained, (Gradient(trained), CAM(trained)), weights=weights)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(FieldError, match="chosen for a mean only, and how is 'var'"):
        AggregatedInterpreter(how="var", weights="complexity")
    with pytest.raises(FieldError, match=r"least must be at most 0\.5 here, got 0\.6"):
        AggregatedInterpreter(weights="complexity", least=0.6)
    with pytest.raises(FieldError, match="how must be one of 'mean', 'var', 'rank', got 'median'"):
        AggregatedInterpreter(how="median")  # type: ignore[arg-type]


@pytest.mark.parametrize("goal", ["sensitivity", "complexity"])
def test_chosen_weights_lower_what_they_are_chosen_for(trained: Classifier, few: Dataset[Any], goal: Any) -> None:
    system, members = rx.System(trained, Gradient(trained)), ("gradient", "cam", "input-x-gradient")
    few = torch.utils.data.Subset(few, range(12))
    with pytest.raises(InputError, match="needs data"):
        AggregatedInterpreter(members, weights=goal)(system)
    x = stack(few)[0]

    def value(defense: AggregatedInterpreter) -> float:
        made = defense(system, few)
        with torch.no_grad():
            if goal == "complexity":
                return float(Complexity()(made(x).maps).mean())
            return float(AvgSensitivity(samples=4)(made.interpreter, x).mean())

    chosen = AggregatedInterpreter(members, weights=goal, least=0.05)
    weights = chosen(system, few).interpreter.weights  # type: ignore[attr-defined]
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert min(weights) >= 0.05 - 1e-6
    best = value(chosen)
    assert best < 0.98 * value(AggregatedInterpreter(members))
    # No other weights on a coarse grid are better.
    shares = [s for s in itertools.product((0.05, 0.3, 0.65, 0.9), repeat=3) if abs(sum(s) - 1) < 1e-9]
    assert len(shares) > 5
    assert best <= min(value(AggregatedInterpreter(members, weights=s)) for s in shares) * 1.01


# --- neighbours ---


def test_ava_is_the_mean_over_neighbours_by_inverse_distance(
    trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    system = AVA(neighbours=3)(rx.System(trained, GradCAM(trained)), few)
    assert isinstance(system.interpreter, NeighbourMean)
    bank = system.interpreter.bank.x
    assert bank.shape[0] == 40
    target = trained(x).argmax(1)
    found = system(x).maps.detach()
    for i in range(4):
        apart = (bank - x[i]).flatten(1).norm(dim=1)
        near = apart.argsort()[:3]
        maps = GradCAM(trained)(bank[near], target[i].repeat(3)).detach()
        weights = 1 / apart[near]
        expected = (maps * weights[:, None, None]).sum(0) / weights.sum()
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)
    own = system(bank[:2]).maps.detach()
    torch.testing.assert_close(own, GradCAM(trained)(bank[:2]).detach(), rtol=0.02, atol=0.02)


def test_neighbours_of_rows_in_large_units_are_the_nearest_in_any_batch() -> None:
    """The distances of a product form cancel there, and torch takes it from 26 rows on."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    bank = torch.rand(400, 3, generator=rng) * torch.tensor([3000.0, 60.0, 40.0]) + torch.tensor([60000.0, 20.0, 10.0])
    x = bank[:3] + torch.tensor([0.5, 2.0, 1.0])
    found = NeighbourMean(model, Gradient(model), Reference(bank))
    near = found._nearest(x)[0]
    exact = (bank.double() - x[:, None].double()).norm(dim=2).argsort(1)[:, :5]
    assert torch.equal(near, bank[exact])
    assert torch.equal(found._nearest(x.repeat(20, 1))[0][:3], near)


def test_ava_refuses_what_it_cannot_keep(trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]) -> None:
    plain = rx.System(trained, GradCAM(trained))
    with pytest.raises(InputError, match=r"AVA\.neighbours must be at most images, 4, got 5"):
        AVA(neighbours=5, images=4)
    with pytest.raises(InputError, match=r"AVA\.neighbours is 50, and there are 40 samples"):
        AVA(neighbours=50)(plain, few)
    made = AVA(neighbours=2)(plain, few)
    with pytest.raises(UnsupportedModelError, match="already"):
        AVA()(made, few)
    with pytest.raises(InputError, match=r"the reference holds images \[1, 32, 32\], got \[1, 16, 16\]"):
        made.interpreter(judged[0][:1, :, :16, :16])
    with pytest.raises(InputError, match="the bank holds 2"):
        NeighbourMean(trained, GradCAM(trained), Reference(judged[0][:2]), 3)


# --- what the paper claims ---


@pytest.fixture(scope="module")
def attacked_members(trained: Classifier, judged: tuple[Tensor, Tensor]) -> list[tuple[rx.System, Tensor]]:
    """Each member's system, and Dombrowski's attack on that member alone."""
    x = judged[0][:8]
    found = []
    for name in MEMBERS:
        system = rx.System(trained, rx.interpreters.InterpreterSpec(name).build(trained))
        with torch.no_grad():
            y = system(x).prediction
            goal = ops.unit_sum(system.interpreter(x.roll(1, 0), y.roll(1, 0)))
        attack = Dombrowski(eps=0.1, steps=40, step_size=5e-3, tolerance=1.0)
        found.append((system, attack(system, x, y, goal_map=goal).x))
    return found


@pytest.mark.parametrize("how", ["mean", "var"])
def test_an_aggregate_moves_less_than_the_member_that_was_attacked(
    how: Any, trained: Classifier, judged: tuple[Tensor, Tensor], attacked_members: list[tuple[rx.System, Tensor]]
) -> None:
    x = judged[0][:8]
    aggregate = AggregatedInterpreter(MEMBERS, how=how)(rx.System(trained, Gradient(trained)))
    moved = []
    for system, forged in attacked_members:
        with torch.no_grad():
            pairs = [(i(x), i(forged)) for i in (system.interpreter, aggregate.interpreter)]
        moved.append([float((ops.unit_sum(a) - ops.unit_sum(b)).square().mean()) for a, b in pairs])
    print(f"{how}: attacked members move by {[m for m, _ in moved]}, the aggregate by {[a for _, a in moved]}")
    assert all(together < alone for alone, together in moved)
    assert np.mean([a for _, a in moved]) < 0.6 * np.mean([m for m, _ in moved])


def test_replacing_keeps_the_weights(trained: Classifier) -> None:
    made = Aggregate(trained, (Gradient(trained), CAM(trained)), how="rank", weights=(0.3, 0.7))
    assert replace(made).weights == made.on_model(trained).weights == (0.3, 0.7)
