"""captum by name: the same numbers as captum's own call, and nothing left behind."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError, InputError, UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import Captum, Segments
from robustexplain.interpreters.captum.bridge import METHODS, REFUSED
from robustexplain.interpreters.captum.guard import pristine
from robustexplain.schema import make, settings_of
from robustexplain.system import System

attr = pytest.importorskip("captum.attr")
LAYER = "net.features.8"

# captum's own, where a test calls it itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_model)


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return grey[:2]


class WithRelu(nn.Module):
    """A net whose rectifier is used as told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.other = nn.ReLU(inplace=how == "in place"), nn.ReLU(inplace=how == "in place")
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z = self.second(torch.relu(z) if self.how == "functional" else self.relu(z))
        z = torch.relu(z) if self.how == "functional" else self.relu(z) if self.how == "reused" else self.other(z)
        logits: Tensor = self.head(z.mean((2, 3)))
        return logits


class Second(nn.Module):
    """Fails on the second image batch that it sees after it was admitted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        self.seen.append(1)
        if len(self.seen) == 4:
            raise ArithmeticError("out of luck")
        return logits


def with_relu(how: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return WithRelu(how).eval()


FEW: dict[str, dict[str, Any]] = {
    "IntegratedGradients": {"n_steps": 5},
    "LayerIntegratedGradients": {"n_steps": 5},
    "LayerConductance": {"n_steps": 5},
    "InternalInfluence": {"n_steps": 5},
    "GradientShap": {"n_samples": 3, "stdevs": 0.1},
    "LayerGradientShap": {"n_samples": 3, "stdevs": 0.1},
    "KernelShap": {"n_samples": 30},
    "Lime": {"n_samples": 30},
    "ShapleyValueSampling": {"n_samples": 3},
    "Occlusion": {"sliding_window_shapes": (1, 4, 4), "strides": (1, 2, 2)},
}
GRID = Segments(number=4)


def bridge(model: nn.Module, method: str, **fields: Any) -> Captum:
    return Captum(model, method, FEW.get(method, {}), segments=GRID, **fields)  # type: ignore[arg-type]


# Values


def test_every_name_is_a_class_of_captum_and_every_other_one_has_a_reason() -> None:
    assert all(hasattr(attr, name) for name in METHODS)
    able = {
        name
        for name, cls in vars(attr).items()
        if isinstance(cls, type)
        and issubclass(cls, attr.Attribution)
        and not name.startswith(("Neuron", "LLM", "Remote"))
    }
    families = ("", "Gradient", "Layer", "Perturbation", "DataLoader")
    abstract = {"LimeBase", *(f"{family}Attribution" for family in families)}
    assert able - abstract <= set(METHODS) | set(REFUSED)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_and_leaves_the_model_alone(method: str, model: nn.Module, x: Tensor) -> None:
    # One pass for each value of the layer: a small image has few.
    x = x[:, :, :8, :8] if method == "LayerFeatureAblation" else x
    modules = [dict(m.__dict__) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    interpreter = bridge(model, method)
    maps = interpreter(x)
    assert maps.shape == x[:, 0].shape
    assert maps.dtype == torch.float32
    assert torch.isfinite(maps).all()
    # captum's Lime fits a lasso, which finds nothing on a net that says so little.
    assert method == "Lime" or (maps.flatten(1).std(1) > 0).all()
    assert [dict(m.__dict__) for m in model.modules()] == modules
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    torch.testing.assert_close(interpreter(x[1:]), maps[1:], rtol=1e-4, atol=1e-4 * float(maps.abs().max()))
    assert torch.equal(interpreter(x), maps)


@pytest.mark.parametrize("method", ["Saliency", "InputXGradient", "IntegratedGradients", "DeepLift", "GuidedBackprop"])
@pytest.mark.parametrize("channels", ["sum", "abs_sum", "max"])
def test_input_methods_give_captums_own_values(method: str, channels: str, model: nn.Module, x: Tensor) -> None:
    target = torch.tensor([2, 0])
    wanted = getattr(attr, method)(copy.deepcopy(model)).attribute(x.clone(), target=target, **FEW.get(method, {}))
    reduce = {"sum": wanted.sum(1), "abs_sum": wanted.abs().sum(1), "max": wanted.abs().amax(1)}[channels]
    found = bridge(model, method, channels=channels)(x, target)
    torch.testing.assert_close(found, reduce.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["LayerGradCam", "LayerGradientXActivation", "LayerIntegratedGradients"])
def test_layer_methods_give_captums_own_values_on_the_layers_grid(method: str, model: nn.Module, x: Tensor) -> None:
    target, twin = torch.tensor([2, 0]), copy.deepcopy(model)
    made = getattr(attr, method)(twin, twin.get_submodule(LAYER))
    wanted = made.attribute(x.clone(), target=target, **FEW.get(method, {})).sum(1)
    found = bridge(model, method, layer=LAYER).explain(x, target, native=True).maps
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_the_default_layer_is_the_last_feature_map(model: nn.Module, x: Tensor) -> None:
    assert torch.equal(bridge(model, "LayerGradCam")(x), bridge(model, "LayerGradCam", layer="net.features.11")(x))


@pytest.mark.parametrize("method", ["FeatureAblation", "IntegratedGradients"])
def test_the_baseline_and_the_segments_reach_captum(method: str, model: nn.Module, x: Tensor) -> None:
    c, options = model(x).argmax(1), FEW.get(method, {})
    patches = GRID(x)[:, None]
    extra = {"feature_mask": patches} if method == "FeatureAblation" else options
    wanted = getattr(attr, method)(copy.deepcopy(model)).attribute(x.clone(), baselines=0.7, target=c, **extra)
    torch.testing.assert_close(bridge(model, method, baseline=0.7)(x), wanted[:, 0].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["DeepLift", "GuidedBackprop", "Saliency"])
def test_captums_warnings_about_its_hooks_are_not_passed_on(method: str, model: nn.Module, x: Tensor) -> None:
    bridge(model, method)(x)


def test_the_seed_decides_what_is_drawn(model: nn.Module, x: Tensor) -> None:
    assert not torch.allclose(bridge(model, "GradientShap")(x), bridge(model, "GradientShap", seed=1)(x))


def test_the_logits_still_lead_to_the_weights(model: nn.Module, x: Tensor) -> None:
    found = bridge(model, "DeepLift").explain(x)
    gradients = torch.autograd.grad(found.logits.sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert not found.maps.requires_grad
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_hooks_and_flags_of_the_user_stay(model: nn.Module, x: Tensor) -> None:
    seen: list[int] = []
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    first.requires_grad_(False)
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    bridge(model, "GuidedBackprop")(x)
    assert first.grad.sum() == first.numel()
    assert not first.requires_grad
    seen.clear()
    model(x)
    assert seen == [1]
    handle.remove()
    assert not model._forward_hooks


# Names and options


def test_an_unknown_method_lists_the_near_ones(model: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="unknown captum method 'IntegratedGradient'; did you mean 'Integrated"):
        Captum(model, "IntegratedGradient")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_would_mislead_are_refused_with_the_reason(method: str, model: nn.Module) -> None:
    with pytest.raises(FieldError, match=f"Captum.method cannot be '{method}': .*{REFUSED[method][:10]}"):
        Captum(model, method)  # type: ignore[arg-type]


def test_unknown_options_list_the_near_ones(model: nn.Module) -> None:
    with pytest.raises(
        UnknownNameError, match=r"option of captum's IntegratedGradients 'nsteps'; did you mean 'n_steps'"
    ):
        Captum(model, options={"nsteps": 3})
    for name in ("baselines", "target", "return_convergence_delta"):
        with pytest.raises(UnknownNameError):
            Captum(model, options={name: 1})


def test_an_option_that_captum_cannot_use_says_so(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"captum's IntegratedGradients failed.*Given simpson"):
        Captum(model, options={"method": "simpson"})(x)


def test_layers(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'net\.feature\.8'; did you mean 'net\.features"):
        Captum(model, "LayerGradCam", layer="net.feature.8")(x)
    with pytest.raises(InputError, match=r"Saliency has no layer, but layer='net\.head'"):
        Captum(model, "Saliency", layer="net.head")(x)
    with pytest.raises(UnsupportedModelError, match=r"LayerGradientXActivation gave \[2, 4\], where a map"):
        Captum(model, "LayerGradientXActivation", layer="net.head")(x)


# Models that captum does not cover


def test_in_place_activations_are_named_as_the_cause(x: Tensor) -> None:
    model = Second(with_relu("in place")).eval()
    with pytest.raises(UnsupportedModelError, match=r"work in place \(inner\.relu, inner\.other, 2 in all\)"):
        Captum(model, "DeepLift")(x)


@pytest.mark.parametrize("method", ["DeepLift", "GuidedBackprop", "IntegratedGradients"])
def test_in_place_activations_that_captum_stands_change_nothing(method: str, x: Tensor) -> None:
    found, wanted = (bridge(with_relu(how), method, baseline=0.0)(x) for how in ("in place", "modules"))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", ["reused", "functional"])
def test_deeplift_that_does_not_add_up_is_refused(how: str, x: Tensor) -> None:
    model = with_relu(how)
    with torch.no_grad():
        model.first.bias.fill_(-0.3)  # type: ignore[operator, union-attr]
    with pytest.raises(UnsupportedModelError, match=r"more than once \(relu, 1 in all\)|does not cover.*add up to"):
        Captum(model, "DeepLift", baseline=1.0)(x)


def test_deeplift_that_adds_up_is_accepted(x: Tensor) -> None:
    assert Captum(with_relu("modules"), "DeepLift", baseline=1.0)(x).abs().sum() > 0


@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "GuidedGradCam"])
def test_overridden_gradients_need_relu_modules(method: str, x: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="of the 2 rectifiers that WithRelu calls, 0 are such"):
        Captum(with_relu("functional"), method)(x)  # type: ignore[arg-type]
    assert Captum(with_relu("modules"), method)(x).abs().sum() > 0  # type: ignore[arg-type]


def test_hooks_are_gone_when_the_model_fails_under_captum(x: Tensor) -> None:
    model = Second(with_relu("modules")).eval()
    with pytest.raises(UnsupportedModelError, match="captum's DeepLift failed on this Second: out of luck"):
        Captum(model, "DeepLift")(x)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(m, kind) for m in model.modules() for kind in hooks)
    assert not any(hasattr(m, "input") or hasattr(m, "is_target_layer") for m in model.modules())


def test_whatever_is_done_to_a_model_in_a_pristine_block_is_undone_after_an_exception(model: nn.Module) -> None:
    module, weight = model.get_submodule(LAYER), next(model.parameters())
    before, pointer = weight.detach().clone(), weight.data_ptr()
    handle = model.register_forward_hook(lambda *_: None)

    def vandalise() -> None:
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
        module.rule = "epsilon"  # type: ignore[assignment]
        module.relu = nn.ReLU()
        handle.remove()
        weight.data = weight.data * 2
        weight.grad = torch.ones_like(weight)
        weight.requires_grad_(False)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), pristine(model):
        vandalise()
    assert not module._forward_hooks
    assert not module._backward_hooks
    assert not hasattr(module, "rule")
    assert not hasattr(module, "relu")
    assert len(model._forward_hooks) == 1
    assert torch.equal(weight, before)
    assert (weight.data_ptr(), weight.grad, weight.requires_grad) == (pointer, None, True)


# Recipes and storage


def test_recipes_write_options_as_a_mapping(model: nn.Module, x: Tensor) -> None:
    entry = {"method": "Occlusion", "options": {"sliding_window_shapes": [1, 4, 4], "strides": [1, 2, 2]}}
    made = Captum(model, **settings_of(Captum, entry, "interpreters[0]"))
    assert torch.equal(made(x), bridge(model, "Occlusion")(x))
    with pytest.raises(InputError, match=r"interpreters\[0\]\.method: input should be 'Deconvolution'"):
        settings_of(Captum, {"method": "os.system"}, "interpreters[0]")
    with pytest.raises(InputError, match=r"interpreters\[0\]\.options"):
        settings_of(Captum, {"options": {"n_steps": {"a": 1}}}, "interpreters[0]")
    assert make(Segments, {"number": 3}, "x") == Segments(number=3)


@pytest.mark.parametrize("method", ["IntegratedGradients", "Occlusion", "LayerGradCam"])
def test_a_saved_one_says_the_same_when_loaded(method: str, tiny_model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    system = System(tiny_model, bridge(tiny_model, method, baseline=0.3, channels="abs_sum"))
    loaded = System.load(system.save(tmp_path))
    assert loaded.interpreter.options == system.interpreter.options  # type: ignore[attr-defined]
    assert torch.equal(loaded.interpreter(x), system.interpreter(x))
