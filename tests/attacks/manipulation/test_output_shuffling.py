"""Yuan and Dasgupta 2024: scores change hands by a sensitive column, and KernelSHAP names it last."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain.attacks.manipulation import OutputShuffling
from robustexplain.attacks.manipulation.output_shuffling import overtaken
from robustexplain.attacks.manipulation.shuffled_model import Shuffled, keys
from robustexplain.errors import InputError
from robustexplain.interpreters import SHAPTabular
from robustexplain.interpreters.reference import Reference
from robustexplain.metrics import FeatureRank
from robustexplain.models import FeatureRule

RACE = 2


def people(count: int, seed: int) -> Tensor:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    x[:, RACE] = (x[:, RACE] > 0).float()
    return x


class Merit(nn.Module):
    """Two classes by four merits, and by race a little."""

    def forward(self, x: Tensor) -> Tensor:
        score = x @ torch.tensor([1.0, -0.8, 0.3, 0.6, 0.5]).to(x)
        return torch.stack([-score, score], 1) / 2


@pytest.fixture(scope="module")
def pool() -> Tensor:
    return people(60, 0)


@pytest.fixture(scope="module")
def honest() -> rx.System:
    model = Merit().eval()
    return rx.System(model, SHAPTabular(model, Reference(people(20, 1)), samples=64))


def shuffled(system: rx.System, pool: Tensor, **settings: Any) -> rx.System:
    data: Any = TensorDataset(pool, torch.zeros(len(pool), dtype=torch.int64))
    return OutputShuffling(sensitive=RACE, **settings)(system, data)


@pytest.mark.parametrize("form", ["dominance", "mixing", "swapping"])
def test_the_outputs_of_the_pool_stay_and_their_owners_do_not(form: Any, honest: rx.System, pool: Tensor) -> None:
    model = shuffled(honest, pool, form=form).model
    blind = pool.clone()
    blind[:, RACE] = pool[:, RACE].mean()
    before, after = (m(z).softmax(1)[:, 1] for m, z in ((honest.model, blind), (model, pool)))
    torch.testing.assert_close(after.sort().values, before.sort().values)
    ours = pool[:, RACE] == 1

    def gap(scores: Tensor) -> float:
        return float(scores[ours].mean() - scores[~ours].mean())

    assert gap(after) > gap(before)
    if form == "dominance":
        assert after[ours].min() > after[~ours].max()
        # Within a group the ranking is that of merit.
        assert torch.equal(after[ours].argsort(), before[ours].argsort())
    single = torch.cat([model(row[None]) for row in pool])
    torch.testing.assert_close(single, model(pool))
    strangers = people(30, 5)
    others = strangers.clone()
    others[:, RACE] = 1 - others[:, RACE]
    torch.testing.assert_close(model(strangers), model(others))


def test_kernel_shap_names_the_column_last_that_decides(honest: rx.System, pool: Tensor) -> None:
    """A rule that decides by the column openly is named first by the same explainer."""
    some, none = pool[:12], torch.ones(12, dtype=torch.int64)
    lied = shuffled(honest, pool)
    openly = FeatureRule(5, [RACE], [0.5]).eval()
    ranks = [
        FeatureRank(RACE)(interpreter(some, none)).float()
        for interpreter in (lied.interpreter, SHAPTabular(openly, Reference(people(20, 1)), samples=64))
    ]
    assert ranks[0].mean() > 3.5
    assert ranks[1].mean() < 1.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_pool_is_known_in_every_precision(dtype: torch.dtype, honest: rx.System, pool: Tensor) -> None:
    model = copy.deepcopy(shuffled(honest, pool).model).to(dtype)
    place, known = model.find(pool.to(dtype))  # type: ignore[operator]
    assert bool(known.all())
    assert torch.equal(model.pool[place], pool.to(dtype))  # type: ignore[index]


def test_it_can_be_saved(honest: rx.System, pool: Tensor, tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(5, 2)).eval()
    made = Shuffled(linear, 1, pool, torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), 0.5)
    rebuilt = made.spec.options
    assert (rebuilt["rows"], rebuilt["in_features"], rebuilt["num_classes"]) == (60, 5, 2)
    from robustexplain.attacks.manipulation.shuffled_model import rebuild

    again = rebuild(**rebuilt)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(pool), made(pool))
    assert not torch.equal(made(pool), made(pool + 1e-3))
    assert keys(torch.tensor([[0.0, 1.0]])) == keys(torch.tensor([[-0.0, 1.0]]))
    assert len(keys(pool).unique()) == 60


def test_one_pass_overtakes_and_mistakes_are_named(honest: rx.System, pool: Tensor) -> None:
    assert overtaken([False, False, True, True, False]) == [0, 2, 3, 1, 4]
    with pytest.raises(InputError, match="does not divide the pool's 60 rows in two groups"):
        shuffled(honest, pool, threshold=5.0)
    with pytest.raises(InputError, match="accepted must be below the 2 classes, got 2"):
        shuffled(honest, pool, accepted=2)
