"""A map whose own derivative is zero says so, and names the ways out."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

from robustexplain.autograd.rectifiers import SmoothGradient, Softplus, swapped
from robustexplain.errors import ZeroMapGradientWarning
from robustexplain.interpreters import (
    CAM,
    LRP,
    DeepLIFT,
    GradCAM,
    Gradient,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Interpreter,
    Smoothed,
    SmoothGrad,
    map_gradient_share,
)

FLAT = [
    lambda model: Gradient(model, of="logit"),
    lambda model: Gradient(model, of="logit", channels="sum"),
    GuidedBackprop,
    lambda model: SmoothGrad(model, samples=2),
]
LIVELY = [GradCAM, CAM, LRP, DeepLIFT, InputXGradient, lambda model: IntegratedGradients(model, steps=4)]


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_model)


def differentiate(interpreter: Interpreter, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(interpreter(x).square().sum(), x)
    return gradient


@pytest.mark.parametrize("make", FLAT)
def test_a_gradient_map_on_rectifiers_says_that_it_is_flat(make: type, model: nn.Module, grey: Tensor) -> None:
    with pytest.warns(ZeroMapGradientWarning, match=r"exactly zero.*Softplus.*SmoothGradient.*surrogate='softplus'"):
        assert not differentiate(make(model), grey).any()


@pytest.mark.parametrize("smooth", [Softplus(10.0), SmoothGradient()], ids=["softplus", "h(z)"])
@pytest.mark.parametrize("make", FLAT)
def test_under_a_surrogate_it_has_one_and_is_silent(
    make: type, smooth: Softplus, model: nn.Module, grey: Tensor
) -> None:
    with warnings.catch_warnings(), swapped(smooth):
        warnings.simplefilter("error")
        assert differentiate(make(model), grey).any()


@pytest.mark.parametrize("make", LIVELY)
def test_maps_with_a_derivative_are_silent(make: type, model: nn.Module, grey: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert differentiate(make(model), grey).any()


def test_the_pass_that_makes_the_map_and_a_plain_loss_are_not_taken_for_it(model: nn.Module, grey: Tensor) -> None:
    x = grey.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Gradient(model, of="logit").explain(x)
        (found.logits.square().sum() + found.maps.sum()).backward()
        with torch.no_grad():
            Gradient(model, of="logit")(x)
    assert x.grad is not None


def test_the_share_of_the_surrogates_gradient_tells_how_flat_a_map_is(model: nn.Module, grey: Tensor) -> None:
    assert not map_gradient_share(Gradient(model, of="logit"), grey).any()
    limping = map_gradient_share(Gradient(model, of="probability"), grey)
    assert (limping > 0).all()
    assert float(limping.median()) < 0.5
    assert float(map_gradient_share(GradCAM(model), grey).median()) > 0.2
    smooth = map_gradient_share(Smoothed(model, Gradient(model, of="logit"), Softplus(10.0)), grey)
    torch.testing.assert_close(smooth, torch.ones(len(grey)), rtol=1e-4, atol=1e-4)
    assert torch.equal(limping, map_gradient_share(Gradient(model), grey))


def test_on_relu6_smoothing_and_guiding_change_the_map() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("efficientnet_lite0", num_classes=5).eval()
        x = torch.rand(2, 3, 32, 32)
    plain = Gradient(model, of="logit", channels="sum")
    wanted = plain(x)
    for other in (Smoothed(model, plain, Softplus(3.0)), GuidedBackprop(model)):
        assert float((other(x) - wanted).detach().norm() / wanted.detach().norm()) > 0.5
