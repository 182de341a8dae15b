"""Black-box searches on rows: the map moves, the answer does not, and no gradient is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ColumnSwitch, RowSearch
from robustexplain.attacks.explanation.row_search import switch
from robustexplain.errors import FieldError, InputError
from robustexplain.interpreters import Gradient, InputXGradient, LIMETabular, Reference
from robustexplain.metrics import Cosine


class Regimes(nn.Module):
    """Column 0 decides while column 2 is below 5, column 1 above; column 3 is one of three categories and idle."""

    def forward(self, x: Tensor) -> Tensor:
        high = torch.sigmoid(8 * (x[:, 2] - 5))
        score = (1 - high) * x[:, 0] + high * x[:, 1]
        return torch.stack([score, -score], 1)


class Even(nn.Module):
    """Two columns count alike, the third ten times as much."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 0] + x[:, 1] + 10 * x[:, 2]
        return torch.stack([score, -score], 1)


def rows(number: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(number, 4, generator=rng) * torch.tensor([2.0, 2.0, 10.0, 1.0]) + torch.tensor([1.0, 1.0, 0.0, 0.0])
    x[:, 3] = torch.randint(3, (number,), generator=rng).float()
    return x


@pytest.fixture
def regimes() -> rx.System:
    model = Regimes().eval()
    return rx.System(model, Gradient(model, of="logit", channels="sum"))


@pytest.fixture
def x() -> Tensor:
    some = rows(12, seed=1)
    some[:, 2] = 2.0
    return some


def attacked(attack: RowSearch | ColumnSwitch, system: rx.System, x: Tensor) -> Tensor:
    y = system.model(x).argmax(1)
    found = attack.fitted(system, rows(60), torch.zeros(60))(system, x, y)
    assert found.success.all()
    return found.x


def test_a_climb_finds_the_other_regime_and_a_walk_mostly_does_not(regimes: rx.System, x: Tensor) -> None:
    far, near = (
        1 - Cosine()(regimes.interpreter(attacked(RowSearch(how, steps=20, step_size=0.3, change=1.0), regimes, x)),  # type: ignore[arg-type]
                     regimes.interpreter(x))
        for how in ("climb", "walk")
    )  # fmt: skip
    assert far.min() > 0.8
    assert near.mean() < far.mean()


def test_answers_change_by_no_more_than_allowed_and_columns_stay_in_range(regimes: rx.System, x: Tensor) -> None:
    found = attacked(RowSearch(steps=20, step_size=0.3, change=0.02), regimes, x)
    apart = (regimes.model(found).softmax(1) - regimes.model(x).softmax(1)).abs().max()
    assert apart <= 0.02
    seen = rows(60)
    assert ((found >= seen.amin(0) - 1e-6) & (found <= seen.amax(0) + 1e-6) | (found == x)).all()
    assert set(found[:, 3].tolist()) <= {0.0, 1.0, 2.0}
    assert not torch.equal(found, x)


def test_a_real_lime_of_a_table_moves(regimes: rx.System, x: Tensor) -> None:
    pytest.importorskip("lime")
    lime = LIMETabular(regimes.model, Reference(rows(60), torch.zeros(60, dtype=torch.int64)), samples=200)
    system = rx.System(regimes.model, lime)
    found = attacked(RowSearch(steps=4, directions=6, step_size=0.5, change=1.0), system, x[:2])
    assert (1 - Cosine()(lime(found), lime(x[:2]))).max() > 0.05


def test_the_columns_that_count_alike_are_switched() -> None:
    model = Even().eval()
    system = rx.System(model, InputXGradient(model, of="logit", channels="sum"))
    data, x = torch.rand(40, 3), torch.rand(6, 3)
    attack = ColumnSwitch().fitted(system, data, torch.zeros(40))
    assert attack.cycle == (0, 1)
    found = attack(system, x, model(x).argmax(1))
    torch.testing.assert_close(found.x, x[:, [1, 0, 2]])
    torch.testing.assert_close(system.interpreter(found.x), system.interpreter(x)[:, [1, 0, 2]])


def test_a_cycle_hands_values_on() -> None:
    assert switch(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (0, 3, 1)).tolist() == [[2.0, 4.0, 3.0, 1.0]]


def test_what_is_missing_is_said(regimes: rx.System, x: Tensor) -> None:
    for attack in (RowSearch(), ColumnSwitch()):
        with pytest.raises(InputError, match="needs the adversary's rows: call fitted"):
            attack(regimes, x, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(FieldError, match="must be at least 2"):
        ColumnSwitch(columns=1)
    with pytest.raises(InputError, match="switches 5 columns, and a row has 4"):
        ColumnSwitch(columns=5).fitted(regimes, x, torch.zeros(12))
