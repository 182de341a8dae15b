"""KNN-CAD: its scores, what it keeps from LIME and KernelSHAP, whom it catches and who gets past it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain.attacks.manipulation import Scaffolding
from robustexplain.defenses import KNNCAD
from robustexplain.defenses.tables import query_gap
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import Gradient, LIMETabular, Reference, SHAPTabular
from robustexplain.interpreters.tabular.guard import NeighbourGuard
from robustexplain.interpreters.tabular.shap import shap_background
from robustexplain.models import FeatureRule

SENSITIVE, INNOCENT = 0, 1


def table(number: int, seed: int) -> Tensor:
    """A sensitive and an innocent flag, and two columns that nearly lie on a line, as real tables do."""
    rng = torch.Generator().manual_seed(seed)
    flags = (torch.rand(number, 2, generator=rng) < 0.5).float()
    place = torch.randn(number, 1, generator=rng)
    return torch.cat([flags, place, 3 * place + 0.1 * torch.randn(number, 1, generator=rng)], 1)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    x = table(300, 1)
    return TensorDataset(x, (x[:, SENSITIVE] > 0.5).long())


def explained(model: torch.nn.Module, how: str, data: TensorDataset) -> rx.System:
    rows = data.tensors[0]
    if how == "lime":
        return rx.System(model, LIMETabular(model, Reference(rows), samples=200))
    return rx.System(model, SHAPTabular(model, shap_background(data, "kmeans", 10, 0), of="label"))


def biased() -> FeatureRule:
    return FeatureRule(4, (SENSITIVE,), (0.5,)).eval()


def first(system: rx.System, x: Tensor) -> float:
    """Share of rows on which the sensitive column is named first."""
    return float((system(x).maps.abs().argmax(1) == SENSITIVE).float().mean())


@pytest.mark.parametrize("distance", ["median", "max"])
def test_the_score_is_that_of_the_slow_formula_for_any_number_of_classes(distance: Any) -> None:
    rng = np.random.default_rng(2)
    rows, classes = rng.normal(size=(40, 3)), rng.integers(3, size=40)
    guard = NeighbourGuard(torch.from_numpy(rows), torch.from_numpy(classes), k=9, distance=distance, p=2)
    asked, answers = rng.normal(size=(25, 3)), rng.integers(3, size=25)
    scaled, other = ((part - rows.mean(0)) / rows.std(0) for part in (rows, asked))
    how = np.median if distance == "median" else np.max
    expected = []
    for row, answer in zip(other, answers, strict=True):
        far = np.linalg.norm(scaled - row, axis=1)
        near = np.argsort(far)[:9]
        d = [how(far[near][classes[near] == c]) if (classes[near] == c).any() else np.inf for c in range(3)]
        rest = min(d[c] for c in range(3) if c != answer)
        expected.append(0.0 if np.isinf(d[answer]) else 1 / (1 + d[answer] / rest))
    np.testing.assert_allclose(guard.scores(asked, answers), expected, rtol=1e-9)
    assert {0.0} < set(expected)


def test_a_guard_needs_one_row_more_than_neighbours() -> None:
    rows, classes = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 3)
    guard = NeighbourGuard(rows, classes, k=5)
    assert guard.scores(rows.numpy(), classes.numpy(), itself=False).shape == (6,)
    with pytest.raises(InputError, match="a guard of 6 neighbours needs 7 rows at least, got 6: lower k"):
        NeighbourGuard(rows, classes, k=6)


@pytest.mark.parametrize("how", ["lime", "shap"])
def test_the_sensitive_column_comes_back_from_behind_a_scaffold_that_does_not_know_of_the_guard(
    how: Any, data: TensorDataset, tmp_path: Path
) -> None:
    x = table(10, 3)
    honest = explained(biased(), how, data)
    attack = Scaffolding(sensitive=SENSITIVE, innocent=(INNOCENT,), against=how, trees=30,
                         draws=3000, whole=True)  # fmt: skip
    hidden = attack(honest, data)
    keep = replace(KNNCAD(), k=10)
    shown = [first(s, x) for s in (honest, hidden, keep(hidden, data), keep(honest, data))]
    knows = keep(replace(attack, guard_keep=0.75)(honest, data), data)
    print(f"{how}: honest, hidden, guarded, guarded honest {shown}, adaptive {first(knows, x):.2f}")
    assert shown[0] == shown[3] == 1
    assert shown[1] < 0.5
    assert shown[2] >= shown[1] + 0.4
    caught = [query_gap(s, data, x[:3]) for s in (honest, hidden)]
    print(f"{how}: gap of the honest model {caught[0]:.3f}, of the scaffold {caught[1]:.3f}")
    assert caught[1] > caught[0] + 0.05
    guarded = keep(hidden, data)
    assert torch.equal(rx.System.load(guarded.save(tmp_path))(x[:2]).maps, guarded(x[:2]).maps)
    # One row at a time gives the same.
    torch.testing.assert_close(guarded(x[1:2]).maps, guarded(x[:2]).maps[1:])


def test_a_guard_that_keeps_all_changes_no_map(data: TensorDataset) -> None:
    x = table(3, 5)
    honest = explained(biased(), "shap", data)
    open_to_all = KNNCAD(keep=0.0)(honest, data)
    torch.testing.assert_close(open_to_all(x).maps, honest(x).maps)


def test_what_has_no_made_up_rows_is_refused(data: TensorDataset) -> None:
    model = biased()
    with pytest.raises(UnsupportedModelError, match="Gradient is none of them"):
        KNNCAD()(rx.System(model, Gradient(model)), data)
    once = KNNCAD()(explained(model, "lime", data), data)
    with pytest.raises(UnsupportedModelError, match="has a guard of its rows already"):
        KNNCAD()(once, data)
    assert KNNCAD(k=300).fewest == 301
    with pytest.raises(InputError, match="needs 301 rows"):
        KNNCAD(k=300)(explained(model, "lime", data), data)
    with pytest.raises(InputError, match="about no row but the explained ones"):
        query_gap(rx.System(model, Gradient(model)), data, table(2, 6))
