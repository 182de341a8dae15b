"""Half precision, generated from the registries: every attack stays in its ball to the last representable number, and
every interpreter gives finite maps or refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import PGD, Attack
from robustexplain.autograd.straight_through import straight_through
from robustexplain.errors import InputError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, SmoothGrad
from robustexplain.metrics import RelativeOutputStability
from robustexplain.models import Classifier
from robustexplain.registry import ATTACKS
from robustexplain.transforms import BitDepth, transform
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


@pytest.mark.parametrize("probability", [0.5, 0.99, 0.9968, 0.99995])
def test_gradients_of_a_probability_are_those_of_float32(probability: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight[0] = torch.linspace(-2, 2, 16)
        model[1].weight[1] = 0
        model[1].bias[0] = torch.logit(torch.tensor(probability)).item()
        model[1].bias[1] = 0
    x = torch.zeros(1, 1, 4, 4)
    wanted = Gradient(model, of="probability")(x)
    found = Gradient(model.half(), of="probability")(x.half())
    torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=2e-7)


def test_gradients_that_float16_cannot_write_keep_their_direction() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight[0] = torch.linspace(-2, 2, 16)
        model[1].weight[1] = 0
        model[1].bias[0], model[1].bias[1] = 30.0, 0.0
    x = torch.zeros(1, 1, 4, 4)
    wanted = Gradient(model, of="probability")(x)
    found = Gradient(model.half(), of="probability")(x.half()).float()
    assert float(found.abs().max()) == pytest.approx(torch.finfo(torch.float16).tiny, rel=0.01)
    assert float(torch.cosine_similarity(found.flatten(1), 1e10 * wanted.flatten(1))) > 0.99


def test_squares_that_float16_cannot_write_are_refused_and_bfloat16_writes_them() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1e-4)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    method = SmoothGrad(model.half(), samples=4, average="square")
    with pytest.raises(
        InputError, match=r"2 of 2 maps of SmoothGrad hold nothing above 1.0e-08, which is 0 in torch.fl"
    ):
        method(x.half())
    maps = SmoothGrad(model.bfloat16(), samples=4, average="square")(x.bfloat16())
    torch.testing.assert_close(maps.float(), torch.full((2, 4, 4), 1e-8), rtol=0.02, atol=0)


class Halves(nn.Module):
    """Two classes, divided by the grey value of the lower half."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(40.0))

    def forward(self, x: Tensor) -> Tensor:
        lead = self.weight * (x[:, :, 8:].mean((1, 2, 3)) - 0.75)
        return torch.stack([lead, -lead], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_that_are_smaller_than_the_rounding_of_bright_pixels_add_up(norm: Any, dtype: torch.dtype) -> None:
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    x[:, :, 8:] += torch.tensor([0.67, 0.66, 0.64, 0.63])[:, None, None, None]
    model = Halves().eval().to(dtype)
    eps, step = (8 / 255, 2.5 * 8 / 255 / 100) if norm == "linf" else (0.5, 0.0125)
    attack = PGD(eps=eps, norm=norm, steps=100, step_size=step)
    half = x.to(dtype)
    made = attack(rx.System(model, Gradient(model)), half, model(half).argmax(1))
    assert made.x.dtype == dtype
    moved = (made.x.double() - half.double())[:, :, 8:]
    assert bool(made.success.all())
    if norm == "linf":
        assert float(moved.abs().amax()) <= eps
        assert float(moved.abs().mean()) > 0.8 * eps
    else:
        assert float(moved.flatten(1).norm(dim=1).amax()) <= eps
        assert float(moved.flatten(1).norm(dim=1).amin()) > 0.7 * eps


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_non_local_means_of_a_flat_image_is_the_image(dtype: torch.dtype, channels: int) -> None:
    x = torch.full((1, channels, 16, 16), 0.3, dtype=dtype)
    found = transform("nl-means-11-3-4")(x)
    assert found.dtype == dtype
    assert float((found.float() - x.float()).abs().amax()) < 2 / 255


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 3e2), (torch.float16, 3e3), (torch.float32, 3e7)])
def test_what_goes_straight_through_has_its_own_value(dtype: torch.dtype, size: float) -> None:
    x = (torch.tensor([1.0, 2.34, -1.7]) * size).to(dtype).requires_grad_()
    with straight_through():
        found = x.sign()
    assert found.tolist() == [1, 1, -1]
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert slope.tolist() == [1, 1, 1]


def test_stability_of_half_maps_has_no_bound(tiny_model: Classifier, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model)
    metric = RelativeOutputStability(samples=2, radius=1e-4)
    usual = metric(CAM(model), grey)
    assert float(usual.max()) > 0
    found = metric(CAM(model.half()), grey.half())
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())


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
