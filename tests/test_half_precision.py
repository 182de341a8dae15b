"""Half precision, generated from the registries: every attack stays in its ball to the last representable number, and
every interpreter gives finite maps or refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import Attack
from robustexplain.errors import InputError
from robustexplain.interpreters import CAM
from robustexplain.models import Classifier
from robustexplain.registry import ATTACKS
from tests.attacks.test_conformance import EPS, FEW, SMALL, set_where_known
from tests.interpreters.test_conformance import NAMES, plain

HALVES = [torch.float16, torch.bfloat16]


def attack_of(name: str, **values: Any) -> Attack:
    if name in ("torchattacks", "foolbox", "art"):
        pytest.importorskip(name)
    return set_where_known(ATTACKS.get(name).build(), **{**FEW, **SMALL.get(name, {}), **values})


def attacked(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, goal: Tensor | None) -> Tensor:
    system = rx.System(model, CAM(model))
    if attack.needs_data:
        others = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(11)).to(x.dtype)
        attack = attack.fitted(system, others, torch.arange(8) % 4)
    return attack(system, x, y, None if attack.keeps_prediction else goal).x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [entry.name for entry in ATTACKS])
def test_attacks_stay_in_their_ball_to_the_last_number(
    name: str, dtype: torch.dtype, tiny_model: Classifier, grey: Tensor
) -> None:
    model, x = copy.deepcopy(tiny_model).to(dtype), grey.to(dtype)
    y = model(x).argmax(1)
    norms = ("linf", "l2") if hasattr(ATTACKS.get(name).build(), "norm") else ("linf",)
    for norm in norms:
        attack = attack_of(name, norm=norm)
        moved = attacked(attack, model, x, y, (y + 1) % 4)
        assert moved.dtype == dtype
        assert bool(torch.isfinite(moved).all())
        assert float(moved.min()) >= 0
        assert float(moved.max()) <= 1
        if hasattr(attack, "eps") and name != "adaptive-squeezing":
            change = (moved.double() - x.double()).flatten(1)
            size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
            assert float(size.max()) <= EPS * (1 if norm == "linf" else 1 + 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_interpreters_are_finite_or_refuse(
    name: str, dtype: torch.dtype, tiny_model: Classifier, tiny_vit: nn.Module, grey: Tensor
) -> None:
    attends = "attention" in rx.registry.INTERPRETERS.get(name).needs
    model, x = copy.deepcopy(tiny_vit if attends else tiny_model).to(dtype), grey.to(dtype)
    try:
        maps = plain(name)(model, x)(x)
    except InputError:
        return
    assert maps.dtype == dtype
    assert bool(torch.isfinite(maps).all())
    assert bool(maps.any())
