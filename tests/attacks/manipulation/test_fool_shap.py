"""Chosen backgrounds: Fool SHAP (Laberge et al. 2023) and stealthily biased sampling (Fukuchi et al. 2020)."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import System, attacks, models
from robustexplain.attacks.manipulation import FoolSHAP, StealthilyBiasedSampling, audit_background, audit_outputs
from robustexplain.attacks.manipulation.biased_sampling import partition
from robustexplain.attacks.manipulation.shapley import coalition_table, pair_values
from robustexplain.attacks.manipulation.transport import biased_weights, draw_quota, quota_weights, squared_distances
from robustexplain.data import TensorTable
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import Gradient, SHAPTabular
from robustexplain.interpreters.reference import Reference
from robustexplain.registry import MANIPULATIONS

assert attacks  # the package that registers


class Hiring(nn.Module):
    """Column 0 (the group) counts where column 1 is high; columns 1 and 2 count for everybody."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 1] + x[:, 2] - 2.0 * x[:, 0] * (x[:, 1] > 0)
        return torch.stack([torch.zeros_like(score), score], 1)


def applicants(count: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 2, count)
    rest = rng.normal(size=(count, 3)) + 0.3 * (1 - group[:, None])
    return torch.from_numpy(np.column_stack([group, rest]).astype(np.float32))


@pytest.fixture(scope="module")
def data() -> TensorTable:
    return TensorTable(applicants(600, 0), [0] * 600)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Hiring().eval()


def shap_system(model: nn.Module, background: Tensor) -> System:
    pytest.importorskip("shap")
    return System(model, SHAPTabular(model, Reference(background)))


# Shapley values of pairs


def slow_value(model: nn.Module, x: Tensor, z: Tensor, column: int) -> float:
    """The mean marginal contribution of a column over all orders, one at a time."""

    def asked(members: set[int]) -> float:
        row = torch.stack([x[i] if i in members else z[i] for i in range(len(x))])
        return float(model(row[None]).double().softmax(1)[0, 1])

    found = []
    for order in permutations(range(len(x))):
        before = set(order[: order.index(column)])
        found.append(asked(before | {column}) - asked(before))
    return float(np.mean(found))


def test_values_of_pairs_are_shapleys_over_all_orders(model: nn.Module, data: TensorTable) -> None:
    x, z = data.rows[:2], data.rows[2:5]
    found = pair_values(model, x, z, 0, 1, 8, seed=0)
    wanted = [[slow_value(model, a, b, 0) for b in z] for a in x]
    assert np.allclose(found, wanted, atol=1e-6)
    # Chunks cut nothing.
    assert np.allclose(pair_values(model, x, z, 0, 1, 8, seed=0, chunk=16), wanted, atol=1e-6)


def test_drawn_coalitions_are_right_on_average() -> None:
    net = models.build("mlp", in_features=8, hidden=[16], seed=3)
    rng = torch.Generator().manual_seed(0)
    x, z = torch.randn(3, 8, generator=rng) * 2, torch.randn(4, 8, generator=rng) * 2
    exact = pair_values(net, x, z, 2, 1, 128, seed=0)
    some = np.stack([pair_values(net, x, z, 2, 1, 32, seed=s) for s in range(60)])
    assert np.abs(some.mean(0) - exact).max() < 0.15 * np.abs(exact).max()
    assert not np.allclose(some[0], some[1])


def test_coalitions_are_weighed_as_shapley_weighs_them() -> None:
    taken, weights = coalition_table(4, 1, 8, seed=0)
    by_size = {int(row.sum()): w for row, w in zip(taken, weights, strict=True)}
    assert by_size == pytest.approx({0: 1 / 4, 1: 1 / 12, 2: 1 / 12, 3: 1 / 4})
    assert weights.sum() == pytest.approx(1)
    assert not taken[:, 1].any()
    sizes = coalition_table(14, 0, 2800, seed=0)[0].sum(1)
    assert np.allclose(np.bincount(sizes.numpy(), minlength=14) / len(sizes), 1 / 14, atol=0.005)


def test_shap_values_are_linear_in_the_backgrounds_weights(model: nn.Module, data: TensorTable) -> None:
    x, z = data.rows[:3], data.rows[10:16]
    weights = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.0, 0.2])
    pytest.importorskip("shap")
    shown = SHAPTabular(model, Reference(z, weights=weights), select=None)(x, torch.ones(3, dtype=torch.long))
    pairs = pair_values(model, x, z, 0, 1, 8, seed=0)
    assert np.allclose(shown[:, 0].numpy(), pairs @ weights.double().numpy(), atol=1e-5)


# Weights of the background


def slow_weights(coefficients: np.ndarray, outputs: np.ndarray, price: float) -> float:
    """The optimum of the flow problem, by a general solver."""
    from scipy.optimize import linprog

    n = len(outputs)
    cost = coefficients[:, None] + price * np.abs(outputs[:, None] - outputs[None])
    arriving = np.zeros((n, n * n))
    for target in range(n):
        arriving[target, target::n] = 1
    found = linprog(cost.ravel(), A_eq=arriving, b_eq=np.full(n, 1 / n), method="highs")
    return float(found.fun)


@pytest.mark.parametrize("price", [0.0, 0.1, 0.5, 2.0, 50.0])
def test_weights_are_the_optimum_of_the_flow_problem(price: float) -> None:
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(1)
    values, outputs = rng.normal(size=12), rng.random(12)
    found = biased_weights(values, outputs, price)
    assert found.sum() == pytest.approx(1)
    assert found.min() >= 0
    distance = wasserstein_distance(outputs, outputs, u_weights=found)
    assert values @ found + price * distance == pytest.approx(slow_weights(values, outputs, price), abs=1e-9)


def test_the_price_leads_from_the_least_value_to_the_uniform_distribution() -> None:
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(2)
    values, outputs = rng.normal(size=700), rng.random(700)
    tried = [biased_weights(values, outputs, price) for price in (0.0, 1.0, 10.0, 100.0, 1e9)]
    assert tried[0][values.argmin()] == pytest.approx(1)
    assert np.allclose(tried[-1], 1 / 700)
    sums = [float(values @ p) for p in tried]
    far = [wasserstein_distance(outputs, outputs, u_weights=p) for p in tried]
    assert sums == sorted(sums)
    assert far == sorted(far, reverse=True)


def test_rows_that_are_alike_keep_their_shares() -> None:
    assert biased_weights(np.ones(5), np.full(5, 0.3), 1.0).tolist() == pytest.approx([0.2] * 5)


# The audit


def test_the_audit_calls_honest_samples_fraud_as_rarely_as_its_level_says() -> None:
    rng = np.random.default_rng(0)
    population = rng.random(2000) ** 2
    caught = [
        audit_outputs([(population[rng.integers(2000, size=100)], population)] * 2, 0.2, seed=trial).detected
        for trial in range(150)
    ]
    assert 0.02 < np.mean(caught) < 0.25
    shifted = [
        audit_outputs([(population[population > 0.1][:100], population)], 0.01, seed=s).detected for s in range(5)
    ]
    assert all(shifted)


def test_the_audits_p_values_and_levels_are_the_published_ones() -> None:
    from scipy.stats import norm

    population = np.concatenate([np.zeros(50), np.ones(50)])
    sample = np.concatenate([np.zeros(10), np.ones(26)])
    found = audit_outputs([(sample, population), (population, population)], 0.01)
    # sqrt(36) (26 / 36 - 1 / 2) / (1 / 2)
    assert found.wald == pytest.approx(2 * (1 - norm.cdf(6 * (26 / 36 - 0.5) / 0.5)))
    wald_level = found.wald * 4  # two pairs: level / 4 for each Wald test
    assert audit_outputs([(sample, population), (population, population)], wald_level * 1.001).detected
    quiet = audit_outputs([(sample, population), (population, population)], min(wald_level, found.ks * 8) * 0.999)
    assert not quiet.detected


def test_the_audit_needs_something_to_look_at(model: nn.Module, data: TensorTable) -> None:
    with pytest.raises(InputError, match="at least one sample"):
        audit_outputs([])
    with pytest.raises(InputError, match="neither of them empty"):
        audit_outputs([(np.zeros(0), np.zeros(3))])
    with pytest.raises(InputError, match="keeps no background"):
        audit_background(System(model, Gradient(model)), data.rows)
    same = np.full(20, 0.5)
    assert not audit_outputs([(same, same)]).detected
    assert audit_outputs([(same + 0.1, same)]).detected


# Fool SHAP


@pytest.fixture(scope="module")
def fool() -> FoolSHAP:
    return FoolSHAP(sensitive=0, size=60, candidates=200, trials=20, steps=8, most=5.0)


def test_the_sensitive_column_shrinks_and_the_audit_sees_nothing(
    model: nn.Module, data: TensorTable, fool: FoolSHAP
) -> None:
    x = data.rows
    others = x[x[:, 0] < 0.5]
    honest = shap_system(model, others[:60])
    chosen = fool.choose(honest, data)
    assert chosen.best is not None
    assert chosen.best.amplitude < 0.8 * chosen.honest
    unseen = [tried.amplitude for tried in chosen.tried if tried.detected < 0.1]
    assert chosen.best.amplitude == min(unseen) < max(unseen)
    assert chosen.best.detected < 0.1
    fooled = fool(honest, data)
    assert fooled.model is honest.model
    assert torch.equal(fooled.interpreter.background.x, chosen.background)  # type: ignore[attr-defined]
    assert not audit_background(fooled, others, seed=3).detected
    # What the auditor computes with the real package, on rows that the attack optimised for.
    shown, ones = chosen.foreground[:20], torch.ones(20, dtype=torch.long)
    means = [float(s.interpreter(shown, ones)[:, 0].mean()) for s in (honest, fooled)]
    assert abs(means[1]) < 0.85 * abs(means[0])


def test_the_strongest_manipulation_is_detected_and_none_is_honest(
    model: nn.Module, data: TensorTable, fool: FoolSHAP
) -> None:
    tried = fool.choose(shap_system(model, data.rows[:5]), data).tried
    assert [t.distance_weight for t in tried] == pytest.approx(np.geomspace(0.05, 5.0, 8).tolist())
    assert tried[0].detected >= 0.5
    assert tried[-1].detected <= 0.1
    assert tried[0].amplitude < tried[-1].amplitude


def test_an_audit_that_sees_everything_gets_an_honest_sample(model: nn.Module, data: TensorTable) -> None:
    watched = FoolSHAP(sensitive=0, size=60, candidates=100, trials=5, steps=2, least=0.01, most=0.02, tolerated=0.0)
    chosen = watched.choose(shap_system(model, data.rows[:5]), data)
    assert chosen.best is None
    assert chosen.background.shape == (60, 4)


def test_the_groups_are_the_sides_of_the_threshold(model: nn.Module, data: TensorTable) -> None:
    settings: dict[str, Any] = {"sensitive": 0, "size": 20, "candidates": 40, "trials": 2, "steps": 2}
    system = shap_system(model, data.rows[:5])
    above, below = (FoolSHAP(**settings, explains_above=side).choose(system, data) for side in (True, False))
    assert (above.foreground[:, 0] == 1).all()
    assert (above.background[:, 0] == 0).all()
    assert (below.foreground[:, 0] == 0).all()
    assert (below.background[:, 0] == 1).all()
    again = FoolSHAP(**settings).choose(system, data)
    assert torch.equal(again.background, above.background)
    other = FoolSHAP(**settings, seed=1).choose(system, data)
    assert not torch.equal(other.background, above.background)


def test_fool_shap_refuses_what_it_cannot_do(model: nn.Module, data: TensorTable, fool: FoolSHAP, grey: Tensor) -> None:
    system = shap_system(model, data.rows[:5])
    with pytest.raises(InputError, match="least must not exceed most"):
        FoolSHAP(sensitive=0, least=2.0, most=1.0)
    with pytest.raises(InputError, match="does not divide the rows"):
        FoolSHAP(sensitive=0, threshold=7.0)(system, data)
    with pytest.raises(InputError, match="needs 1000 rows of its group"):
        FoolSHAP(sensitive=0, size=1000)(system, data)
    with pytest.raises(InputError, match="'race' is a name"):
        FoolSHAP(sensitive="race", size=10)(system, data)
    with pytest.raises(UnsupportedModelError, match="Gradient keeps no background"):
        fool(System(model, Gradient(model)), data)
    with pytest.raises(UnsupportedModelError, match="table rows"):
        fool(system, TensorDataset(grey, torch.zeros(len(grey)).long()))  # type: ignore[arg-type]


def test_both_attacks_are_registered_and_say_what_they_want() -> None:
    assert MANIPULATIONS.get("fool-shap").build is FoolSHAP
    assert MANIPULATIONS.get("stealthily-biased-sampling").build is StealthilyBiasedSampling
    assert FoolSHAP(sensitive="race").summaries() == ("background", "race hidden")
    assert FoolSHAP(sensitive="race").hidden == "race"
    assert StealthilyBiasedSampling(sensitive=3).summaries() == ("background", "groups of 3 accepted alike")


# Stealthily biased sampling


def brute_force(rows: np.ndarray, cells: list[int], quota: list[int]) -> float:
    """The least cost over every whole-unit choice of weights: an assignment problem each."""
    from scipy.optimize import linear_sum_assignment

    n, k = len(rows), sum(quota)
    cost = ((rows[:, None] - rows[None]) ** 2).sum(2)
    best = np.inf
    for given in product(range(n + 1), repeat=n):  # units of 1 / (n k); at most n for a row: p <= 1 / k
        if any(sum(u for u, c in zip(given, cells, strict=True) if c == cell) != n * q for cell, q in enumerate(quota)):
            continue
        sources, targets = np.repeat(np.arange(n), given), np.repeat(np.arange(n), k)
        pairs = linear_sum_assignment(cost[np.ix_(sources, targets)])
        best = min(best, cost[np.ix_(sources, targets)][pairs].sum() / (n * k))
    return float(best)


def transport_cost(rows: np.ndarray, weights: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of weighted rows to the uniform ones, by a general solver."""
    from scipy.optimize import linprog

    n = len(rows)
    leaving, arriving = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    equations, sides = np.vstack([leaving, arriving]), np.concatenate([weights, np.full(n, 1 / n)])
    cost = ((rows[:, None] - rows[None]) ** 2).sum(2).ravel()
    return float(linprog(cost, A_eq=equations, b_eq=sides, method="highs").fun)


@pytest.mark.parametrize("quota", [[1, 1], [2, 0], [1, 2], [2, 1]])
def test_weights_under_a_quota_are_the_best_of_all(quota: list[int]) -> None:
    rows = np.random.default_rng(3).normal(size=(4, 2))
    cells = [0, 0, 1, 1]
    total = sum(quota)
    found = quota_weights(rows, np.array(cells), [q / total for q in quota], 1 / total)
    assert found[:2].sum() == pytest.approx(quota[0] / total)
    assert found.max() <= 1 / total + 1e-9
    assert transport_cost(rows, found) == pytest.approx(brute_force(rows, cells, quota), abs=1e-7)


def test_distances_are_squared_and_euclidean() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3))
    slow = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    assert np.allclose(squared_distances(rows), slow)


def test_a_quota_that_the_data_meets_anyway_leaves_all_weights_alike() -> None:
    rows = np.random.default_rng(4).normal(size=(20, 3))
    cells = np.arange(20) % 4
    assert np.allclose(quota_weights(rows, cells, [0.25] * 4, 1 / 8), 1 / 20)
    with pytest.raises(InputError, match=r"share of 0.7.*have at most 0.5"):
        quota_weights(rows, cells, [0.7, 0.1, 0.1, 0.1], 0.1)


def test_draws_meet_the_quota_hold_no_row_twice_and_follow_the_weights() -> None:
    rng = np.random.default_rng(0)
    cells = np.repeat([0, 1], [6, 4])
    weights = np.array([0.05, 0.1, 0.05, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    counts = np.zeros(10)
    for _ in range(4000):
        rows = draw_quota(weights, cells, [3, 2], rng)
        assert len(set(rows)) == 5
        assert (cells[rows] == 0).sum() == 3
        counts[rows] += 1
    wanted = np.concatenate([3 * weights[:6] / weights[:6].sum(), 2 * weights[6:] / weights[6:].sum()])
    assert np.allclose(counts / 4000, wanted, atol=0.03)


def test_draws_fill_a_quota_that_the_weights_alone_could_not() -> None:
    cells = np.zeros(5, dtype=np.int64)
    rows = draw_quota(np.array([0.9, 0.1, 0, 0, 0]), cells, [4], np.random.default_rng(0))
    assert len(set(rows)) == 4
    assert {0, 1} <= set(rows)
    assert draw_quota(np.full(5, 0.2), cells, [5], np.random.default_rng(0)) == [0, 1, 2, 3, 4]


def test_partitions_are_disjoint_and_keep_the_cells_in_proportion() -> None:
    cells = np.repeat([0, 1, 2], [30, 50, 20])
    parts = partition(cells, 25, np.random.default_rng(0))
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert all(abs(len(part) - 25) <= 1 for part in parts)
    for part in parts:
        assert np.abs(np.bincount(cells[part], minlength=3) - np.array([7.5, 12.5, 5])).max() <= 1


def gap(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        yes = model(x).argmax(1) == 1
    upper = x[:, 0] > 0.5
    return float(yes[~upper].float().mean() - yes[upper].float().mean())


def test_the_sample_looks_fair_and_like_the_data(model: nn.Module, data: TensorTable) -> None:
    from scipy.stats import ks_2samp

    system = shap_system(model, data.rows[:5])
    attack = StealthilyBiasedSampling(sensitive=0, size=80, subset=100)
    chosen = attack.choose(system, data)
    assert gap(model, data.rows) > 0.2
    assert abs(gap(model, chosen.rows)) < 0.03
    assert sum(chosen.quota) == len(chosen.rows) == 80
    assert len(chosen.rows.unique(dim=0)) == 80
    tests = [ks_2samp(chosen.rows[:, c].numpy(), data.rows[:, c].numpy()).pvalue for c in range(4)]
    assert min(tests) > 0.05
    fooled = attack(system, data)
    assert torch.equal(fooled.interpreter.background.x, chosen.rows)  # type: ignore[attr-defined]


def test_the_sample_is_nearer_to_the_data_than_one_that_only_meets_the_quota(model: nn.Module) -> None:
    few = TensorTable(applicants(90, 5), [0] * 90)
    system = shap_system(model, few.rows[:5])
    attack = StealthilyBiasedSampling(sensitive=0, size=20, subset=90)
    chosen = attack.choose(system, few)
    with torch.no_grad():
        cells = (2 * (few.rows[:, 0] > 0.5).long() + model(few.rows).argmax(1)).numpy()
    z = ((few.rows - few.rows.mean(0)) / few.rows.std(0, correction=0)).double().numpy()
    plain = np.array([chosen.quota[c] / (20 * (cells == c).sum()) for c in cells])
    for cell, wanted in enumerate(chosen.quota):
        assert chosen.weights[cells == cell].sum() == pytest.approx(wanted / 20, abs=1e-6)
    assert transport_cost(z, chosen.weights) < 0.9 * transport_cost(z, plain)


def test_the_quota_follows_the_rate_that_is_asked_for_and_the_class_that_is_favourable(
    model: nn.Module, data: TensorTable
) -> None:
    few = TensorTable(data.rows[:180], [0] * 180)
    system = shap_system(model, few.rows[:5])
    attack = StealthilyBiasedSampling(sensitive=0, size=20, subset=60)
    lower = round(20 * float((few.rows[:, 0] < 0.5).double().mean()))
    with torch.no_grad():
        favoured = float((model(few.rows).argmax(1) == 0).double().mean())
    for one, rate in ((replace(attack, rate=0.25), 0.25), (replace(attack, accepted=0), favoured)):
        chosen = one.choose(system, few)
        yes = round(lower * rate), round((20 - lower) * rate)
        assert chosen.quota == (lower - yes[0], yes[0], 20 - lower - yes[1], yes[1])
        with torch.no_grad():
            accepted = model(chosen.rows).argmax(1) == one.accepted
        upper = chosen.rows[:, 0] > 0.5
        assert (int((accepted & ~upper).sum()), int((accepted & upper).sum())) == yes


def test_partitions_and_samples_are_drawn_by_the_seed(model: nn.Module, data: TensorTable) -> None:
    few = TensorTable(data.rows[:80], [0] * 80)
    system = shap_system(model, few.rows[:5])
    for subset, alike in ((80, True), (40, False)):
        attack = StealthilyBiasedSampling(sensitive=0, size=16, subset=subset)
        first, again, other = (replace(attack, seed=seed).choose(system, few) for seed in (0, 0, 1))
        assert torch.equal(first.rows, again.rows)
        assert not torch.equal(first.rows, other.rows)
        # All rows in one subset leave nothing to draw but the sample.
        assert np.allclose(first.weights, other.weights) is alike


def test_fool_shap_explains_the_class_that_is_asked_for(data: TensorTable) -> None:
    net = models.build("mlp", in_features=4, num_classes=3, hidden=[8], seed=2)
    few = TensorTable(data.rows[:120], [0] * 120)
    attack = FoolSHAP(sensitive=0, size=15, candidates=120, trials=2, steps=2, of_class=2)
    chosen = attack.choose(shap_system(net, data.rows[:5]), few)
    others = few.rows[few.rows[:, 0] < 0.5]
    found = [abs(float(pair_values(net, chosen.foreground, others, 0, of, 8, seed=0).mean())) for of in (2, 1)]
    assert chosen.honest == pytest.approx(found[0], rel=1e-6)
    assert chosen.honest != pytest.approx(found[1], rel=1e-2)


def test_biased_sampling_refuses_what_it_cannot_do(model: nn.Module, data: TensorTable) -> None:
    system = shap_system(model, data.rows[:5])
    with pytest.raises(InputError, match="choose a smaller size or another rate"):
        StealthilyBiasedSampling(sensitive=0, size=500, rate=1.0)(system, data)
    with pytest.raises(InputError, match="does not divide the rows"):
        StealthilyBiasedSampling(sensitive=0, threshold=9.0)(system, data)
    with pytest.raises(UnsupportedModelError, match="keeps no background"):
        StealthilyBiasedSampling(sensitive=0)(System(model, Gradient(model)), data)


def test_the_chosen_background_is_stored_with_the_system(tmp_path: Path, data: TensorTable) -> None:
    net = models.build("linear", in_features=4)
    fooled = StealthilyBiasedSampling(sensitive=0, size=20, subset=60, accepted=1, rate=0.5)(
        shap_system(net, data.rows[:5]), TensorTable(data.rows[:120], [0] * 120)
    )
    again = System.load(fooled.save(tmp_path / "fooled"))
    assert torch.equal(again.interpreter.background.x, fooled.interpreter.background.x)  # type: ignore[attr-defined]
    assert torch.equal(again(data.rows[:2]).maps, fooled(data.rows[:2]).maps)
