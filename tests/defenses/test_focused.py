"""Focused sampling: what its generators make, whom it sees through, who gets past it, what conditional values cost."""

from __future__ import annotations

import itertools
import math
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
from robustexplain.defenses import KNNCAD, FocusedSampling
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.interpreters import Gradient, LIMETabular, NeighbourRows, Reference, RowGenerating, SHAPTabular
from robustexplain.interpreters.tabular.auto_encoder import groups_of
from robustexplain.interpreters.tabular.shap import shap_background
from robustexplain.models import FeatureRule
from robustexplain.training import Training

SENSITIVE, INNOCENT = 0, 1
BRIEF = Training(epochs=15, batch_size=100, lr=2e-2)


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


def explained(how: str, data: TensorDataset) -> rx.System:
    rows, model = data.tensors[0], FeatureRule(4, (SENSITIVE,), (0.5,)).eval()
    if how == "lime":
        return rx.System(model, LIMETabular(model, Reference(rows), samples=200))
    return rx.System(model, SHAPTabular(model, shap_background(data, "kmeans", 10, 0), of="label"))


def first(system: rx.System, x: Tensor) -> float:
    """Share of rows on which the sensitive column is named first."""
    return float((system(x).maps.abs().argmax(1) == SENSITIVE).float().mean())


@pytest.mark.parametrize(
    ("how", "kind"), [("lime", "mcd-vae"), ("lime", "trees"), ("lime", "neighbours"), ("shap", "neighbours")]
)
def test_the_sensitive_column_comes_back_from_behind_a_scaffold_that_knows_other_rows(
    how: Any, kind: Any, data: TensorDataset, tmp_path: Path
) -> None:
    x = table(8, 3)
    honest = explained(how, data)
    attack = Scaffolding(sensitive=SENSITIVE, innocent=(INNOCENT,), against=how, trees=20, draws=1000, whole=True)
    hidden = attack(honest, data)
    generator = RowGenerating(kind, size=20, training=BRIEF, trees=20)
    focused = FocusedSampling(generator)
    seen = focused(hidden, data)
    assert first(hidden, x) == 0
    assert first(seen, x) >= 0.7
    assert first(replace(seen, model=honest.model, interpreter=replace(seen.interpreter, model=honest.model)), x) == 1
    assert torch.equal(rx.System.load(seen.save(tmp_path))(x[:2]).maps, seen(x[:2]).maps)
    # One row at a time gives the same.
    torch.testing.assert_close(seen(x[1:2]).maps, seen(x[:2]).maps[1:])
    if kind == "trees":
        assert first(focused(replace(attack, focused=generator)(honest, data), data), x) <= 0.3
    if (how, kind) == ("lime", "neighbours"):
        with pytest.raises(InputError, match="no made-up row differs from the real ones"):
            replace(attack, focused=generator)(honest, data)


def categories(number: int, seed: int) -> Tensor:
    """A whole number, a category of three columns, and a measurement that goes with it."""
    rng = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (number,), generator=rng)
    age = torch.randint(18, 80, (number, 1), generator=rng).float()
    size = kind[:, None] * 5.0 + torch.randn(number, 1, generator=rng)
    return torch.cat([age, torch.nn.functional.one_hot(kind, 3).float(), size], 1)


@pytest.mark.parametrize("kind", ["mcd-vae", "trees", "neighbours"])
def test_made_up_rows_are_as_the_columns_are(kind: Any) -> None:
    x = categories(200, 4)
    rows = TensorDataset(x, torch.zeros(200, dtype=torch.int64))
    generator = RowGenerating(kind, size=20, trees=20, leaf=10, training=replace(BRIEF, epochs=40)).fitted(rows, 0)
    made = generator.around(x.double().numpy(), 20, np.random.default_rng(0))
    assert made.shape == (200, 20, 5)
    assert set(np.unique(made[..., 1:4])) == {0.0, 1.0}
    assert (made[..., 1:4].sum(-1) == 1).all()
    assert (made[..., 0] == made[..., 0].round()).all()
    low, high = x.min(0).values.double().numpy(), x.max(0).values.double().numpy()
    assert (made >= low - 1e-6).all()
    assert (made <= high + 1e-6).all()
    assert len(np.unique(made.reshape(-1, 5), axis=0)) > 50
    if kind != "neighbours":
        # Near the given row: in a column of a wide range they follow it.
        assert np.corrcoef(made[..., 4].mean(1), x[:, 4])[0, 1] > 0.3
    again = generator.around(x.double().numpy(), 20, np.random.default_rng(0))
    np.testing.assert_array_equal(made, again)


def test_a_category_is_a_run_of_flags_of_sum_one() -> None:
    rows = categories(50, 5).double().numpy()
    assert groups_of(rows).tolist() == [0, 1, 1, 1, 2]
    flags = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1.0]])
    # The first two are one category; the others are flags of their own.
    assert groups_of(flags).tolist() == [0, 0, 1, 2]


class Curved(torch.nn.Module):
    """Depends on columns 0 and 1 and on their product, and not on column 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of two classes."""
        score = x[:, 0] + 0.5 * x[:, 0] * x[:, 1]
        return torch.stack([torch.zeros_like(score), score], 1)


def test_conditional_values_are_shapleys_of_the_means_over_the_nearest_rows() -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    rows[:, 2] = rows[:, 0] + 0.2 * rows[:, 2]
    model, x = Curved().eval(), rows[:1] + 0.1
    system = SHAPTabular(
        model, Reference(rows), of="logit", select=None, generator=NeighbourRows(Reference(rows), size=6)
    )
    values = system(x, torch.tensor([1]))[0].numpy()
    std = rows.numpy().std(0)

    def worth(known: tuple[int, ...]) -> float:
        far = sum(((rows.numpy()[:, c] - x[0, c].item()) / std[c]) ** 2 for c in known)
        asked = rows[np.argsort(far)[:6]].clone()
        asked[:, list(known)] = x[0, list(known)]
        return float(model(asked)[:, 1].mean())

    nothing = float(model(x)[0, 1]) - values.sum()
    for column in range(3):
        others = [c for c in range(3) if c != column]
        expected = 0.0
        for size in range(3):
            for known in itertools.combinations(others, size):
                weight = math.factorial(size) * math.factorial(2 - size) / math.factorial(3)
                without = worth(known) if known else nothing
                expected += weight * (worth((*known, column)) - without)
        assert values[column] == pytest.approx(expected, abs=1e-6)
    # The price: the third column, which the model never looks at.
    assert abs(values[2]) > 0.1 * np.abs(values).max()
    assert float(replace(system, generator=None)(x, torch.tensor([1]))[0, 2]) == pytest.approx(0, abs=1e-9)


def test_a_guard_stands_before_or_behind_focused_sampling(data: TensorDataset) -> None:
    x, honest = table(2, 7), explained("lime", data)
    guard, focused = KNNCAD(k=10), FocusedSampling(RowGenerating("trees", size=20, trees=10))
    maps = [two(one(honest, data), data)(x).maps for one, two in ((guard, focused), (focused, guard))]
    torch.testing.assert_close(*maps)


def test_what_cannot_be_focused_is_refused(data: TensorDataset) -> None:
    focused = FocusedSampling(RowGenerating("trees", size=20, trees=10))
    model = FeatureRule(4, (SENSITIVE,), (0.5,)).eval()
    with pytest.raises(UnsupportedModelError, match="Gradient is none of them"):
        focused(rx.System(model, Gradient(model)), data)
    with pytest.raises(UnsupportedModelError, match="come from a generator already"):
        focused(focused(explained("lime", data), data), data)
    with pytest.raises(InputError, match="needs 400 rows at least, got 300"):
        FocusedSampling(RowGenerating("neighbours", size=400))(explained("shap", data), data)
    with pytest.raises(InputError, match="rows of 4 columns, and the background has 3"):
        LIMETabular(model, Reference(data.tensors[0][:, :3]), generator=NeighbourRows(Reference(data.tensors[0])))
    with pytest.raises(FieldError, match=r"dropout.*must be below 1"):
        RowGenerating(dropout=1.0)
