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
from robustexplain.interpreters import CAM, RTS, GradCAM, SmoothGrad
from robustexplain.models import Classifier
from robustexplain.registry import ATTACKS
from robustexplain.transforms import BitDepth
from tests.attacks.test_conformance import EPS, FEW, SMALL, set_where_known
from tests.interpreters.test_conformance import NAMES, masker, plain

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
        if hasattr(attack, "eps"):
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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fine_bit_depths_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.linspace(0, 1, 50).to(dtype)[None, None, None]
    assert float((BitDepth(16)(x) - x).abs().max()) <= torch.finfo(dtype).eps


def test_mixed_dtypes_are_refused_in_one_sentence(tiny_model: Classifier, grey: Tensor) -> None:
    model, y = copy.deepcopy(tiny_model), torch.arange(5) % 4
    system = rx.System(model, RTS(model, masker(model, grey)))
    for call in (lambda: system(grey.double()), lambda: rx.attacks.PGD(steps=1)(system, grey.double(), y)):
        with pytest.raises(InputError, match="x is float64, and the weights are: Classifier float32"):
            call()
    model.double()
    with pytest.raises(InputError, match="MaskingModel float32"):
        system(grey.double())


def test_a_float32_norm_in_a_half_body_gets_through_or_is_refused(grey: Tensor) -> None:
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = nn.Sequential(*body).eval().to(torch.bfloat16)
    model[1].float()
    x = grey.to(torch.bfloat16)
    maps = GradCAM(model)(x)
    assert bool(torch.isfinite(maps).all())
    model[1] = nn.GroupNorm(2, 4).eval()
    model[0].half()
    with pytest.raises(InputError, match="x is bfloat16, and the weights are: Sequential bfloat16 and float16"):
        GradCAM(model)(x)


def test_draws_do_not_follow_torchs_default_dtype(tiny_model: Classifier, grey: Tensor) -> None:
    y = tiny_model(grey).argmax(1)
    calls = [
        lambda: SmoothGrad(tiny_model, samples=3)(grey),
        lambda: attacked(attack_of("pgd", random_start=True), tiny_model, grey, y, None),
        lambda: attacked(attack_of("square"), tiny_model, grey, y, (y + 1) % 4),
        lambda: attacked(attack_of("gd-uap"), tiny_model, grey, y, None),
        lambda: attacked(attack_of("noise", kind="gaussian"), tiny_model, grey, y, None),
    ]
    usual = [call() for call in calls]
    torch.set_default_dtype(torch.float64)
    try:
        for call, before in zip(calls, usual, strict=True):
            assert torch.equal(call(), before)
    finally:
        torch.set_default_dtype(torch.float32)
