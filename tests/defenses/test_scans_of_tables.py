"""Scanners of tables: whose background is no sample of the data, and whose reasons contradict each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.attacks.manipulation import Bouncer, StealthilyBiasedSampling
from robustexplain.defenses import BackgroundCheck, FocusedSampling, PairsProbe
from robustexplain.defenses.manipulated import agreement
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import Gradient, Reference, RowGenerating, SHAPTabular
from robustexplain.interpreters.tabular.shap import shap_background
from robustexplain.models import FeatureRule

GROUP = 0


def people(number: int, seed: int) -> Tensor:
    """A group, a merit that does not depend on it, and the advantage of the first group."""
    rng = torch.Generator().manual_seed(seed)
    group = (torch.rand(number, 1, generator=rng) < 0.5).float()
    merit, noise = torch.randn(number, 2, generator=rng).split(1, 1)
    return torch.cat([group, merit, group + noise], 1)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    x = people(1000, 1)
    return TensorDataset(x, (x[:, 2] > 0.5).long())


@pytest.fixture(scope="module")
def model() -> FeatureRule:
    """Decides by the advantage."""
    return FeatureRule(3, (2,), (0.5,)).eval()


def against(model: torch.nn.Module, rows: Tensor) -> rx.System:
    return rx.System(model, SHAPTabular(model, Reference(rows)))


def test_a_fair_background_passes_as_often_as_its_level_says(data: TensorDataset, model: FeatureRule) -> None:
    rows = data.tensors[0]
    check = BackgroundCheck(draws=199)
    found = []
    for seed in range(40):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        found.append(check(against(model, rows[order[:100]]), data).figures["p"])
    p = torch.tensor(found)
    # Within five standard deviations of a binomial, and spread over the whole range.
    assert int((p <= 0.1).sum()) <= 13
    assert float(p.mean()) == pytest.approx(0.5, abs=0.23)


@pytest.mark.parametrize("kept", [100, 1000])
def test_a_fair_background_of_other_rows_than_the_auditors_passes_as_often(kept: int, model: FeatureRule) -> None:
    """Both are samples of one population: what the auditor's rows happen to be is not the owner's fault."""
    found = []
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        rows = (torch.rand(1500, 3, generator=rng) < torch.tensor([0.5, 0.004, 0.5])).float()  # one value is rare
        audited = TensorDataset(rows[1000:], torch.zeros(500, dtype=torch.int64))
        found.append(BackgroundCheck(draws=199)(against(model, rows[:kept]), audited).figures["p"])
    p = torch.tensor(found)
    assert int((p <= 0.1).sum()) <= 13


def test_a_biased_background_is_caught_by_what_goes_with_its_decisions(data: TensorDataset, model: FeatureRule) -> None:
    honest = against(model, data.tensors[0][:200])
    attack = StealthilyBiasedSampling(sensitive=GROUP, size=200)
    found = BackgroundCheck()(attack(honest, data), data)
    assert found.figures["p"] <= 0.01
    assert found.figures["column"] == GROUP
    # Tests of the outputs alone see nothing.
    assert min(found.figures["ks"], found.figures["wald"]) > 0.01
    # Nor do means of columns and outputs: each lies within what a fair sample shows.
    rows, sample = data.tensors[0], attack(honest, data).interpreter.background.x  # type: ignore[attr-defined]
    apart = (sample.mean(0) - rows.mean(0)).abs() / (rows.std(0) / 200**0.5)
    assert float(apart.max()) < 3.5


def test_rows_of_one_group_are_fair_only_beside_that_group(data: TensorDataset, model: FeatureRule) -> None:
    rows, labels = data.tensors
    group = rows[:, GROUP] == 1
    system = against(model, rows[group][:100])
    assert BackgroundCheck()(system, data).figures["p"] <= 0.001
    assert BackgroundCheck()(system, TensorDataset(rows[group], labels[group])).figures["p"] > 0.01
    # Beside the other group no row of the background fits: a column in which all rows of the population agree.
    assert BackgroundCheck()(system, TensorDataset(rows[~group], labels[~group])).figures["p"] <= 0.001


def test_maps_of_tables_agree_by_the_order_of_their_columns() -> None:
    maps = torch.tensor([[3.0, -1.0, 0.5], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[-9.0, 2.0, 0.1], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(agreement(maps, other, 7), torch.tensor([1.0, -1.0, 0.0]))


def test_what_is_no_sample_is_not_tested(data: TensorDataset, model: FeatureRule) -> None:
    centroids = rx.System(model, SHAPTabular(model, shap_background(data, "kmeans", 10, 0)))
    with pytest.raises(UnsupportedModelError, match="centroids"):
        BackgroundCheck()(centroids, data)
    with pytest.raises(UnsupportedModelError, match="Gradient keeps no background"):
        BackgroundCheck()(rx.System(model, Gradient(model)), data)
    focused = FocusedSampling(RowGenerating("neighbours", size=20))(against(model, data.tensors[0][:50]), data)
    with pytest.raises(UnsupportedModelError, match="its background is not used"):
        BackgroundCheck()(focused, data)


def test_pairs_convict_the_bouncer_and_no_attribution(data: TensorDataset, model: FeatureRule) -> None:
    honest = against(model, data.tensors[0][:20])
    hides = Bouncer((2,))(replace(honest), data)
    probe = PairsProbe(probe=20)
    found = probe(hides, data)
    assert found.score > 0.05
    assert found.figures["pairs"] == 380
    assert PairsProbe(probe=20, limit=50)(hides, data).figures["pairs"] == 50
    smooth = models.load("linear", in_features=3)
    assert probe(rx.System(smooth, Gradient(smooth)), data).score == 0
