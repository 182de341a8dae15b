"""What every interpreter must do. A class is tested here by being registered.

A class that takes more than ``(model)`` gets a line in ``MAKE``; one with kinks of its own (a ReLU, a magnitude) gets
a line in ``SMOOTH`` that switches them off for the finite differences.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain import interpreters
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.defenses import Aggregate
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, Interpreter, MaskingModel, Smoothed
from robustexplain.interpreters.base import accepted_kinds
from robustexplain.models import Transformed, Voted
from robustexplain.registry import INTERPRETERS

Make = Callable[[nn.Module, Tensor], Interpreter]


def masker(model: nn.Module, x: Tensor) -> MaskingModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = MaskingModel.around(copy.deepcopy(model), x, width=8)
    with torch.no_grad():
        made.selector.weight.mul_(10)
        made.draw.weight.mul_(5)
    return made.to(x.dtype).eval()


def background(x: Tensor) -> interpreters.Reference:
    return interpreters.Reference(torch.rand(4, *x.shape[1:], generator=torch.Generator().manual_seed(8)))


def projected(base: Interpreter, x: Tensor) -> Interpreter:
    return interpreters.Projected(base.model, base, background(x), neighbours=3)


def of_median(model: nn.Module, make: Callable[[nn.Module], Interpreter]) -> Interpreter:
    """Behind a transform that changes nothing."""
    front = Transformed(model, ["median-1"])
    return interpreters.OfTransformed(front, make(front))


def of_draws(model: nn.Module, make: Callable[[nn.Module], Interpreter]) -> Interpreter:
    """Of two points that are the image itself."""
    voted = Voted(model, "uniform-noise-0", 2)
    return interpreters.OfDraws(voted, make(voted))


MAKE: dict[str, Make] = {
    "integrated-gradients": lambda model, x: interpreters.IntegratedGradients(model, steps=5, batch_size=10),
    "expected-gradients": lambda model, x: interpreters.ExpectedGradients(model, background(x), samples=6),
    # The logit's gradient has no derivative on a network of rectifiers; the probability's has one.
    "smoothgrad": lambda model, x: interpreters.SmoothGrad(model, samples=4, of="probability"),
    "vargrad": lambda model, x: interpreters.VarGrad(model, samples=4, sigma=0.5, of="log_probability"),
    "rts": lambda model, x: RTS(model, masker(model, x)),
    "smoothed": lambda model, x: Smoothed(model, GradCAM(model), Softplus(5.0)),
    "of-transformed": lambda model, x: of_median(model, GradCAM),
    "of-draws": lambda model, x: of_draws(model, GradCAM),
    "projected": lambda model, x: projected(Gradient(model), x),
    "aggregate": lambda model, x: Aggregate(model, (Gradient(model), GradCAM(model))),
    "certified": lambda model, x: interpreters.Certified(
        model, GradCAM(model, relu=False), samples=12, choose=2, tau=0.6, alpha=0.5, grid=4
    ),
    "sparsified": lambda model, x: interpreters.Sparsified(
        model, GradCAM(model, relu=False), samples=12, alpha=0.5, grid=4, bound="clopper-pearson"
    ),
    "metfa": lambda model, x: interpreters.MeTFA(model, GradCAM(model, relu=False), samples=9, noise=0.05),
    "kernel-smoothed": lambda model, x: interpreters.KernelSmoothed(model, GradCAM(model), samples=4),
    "neighbour-mean": lambda model, x: interpreters.NeighbourMean(model, GradCAM(model), background(x), 3),
    "mask": lambda model, x: interpreters.Mask(model, steps=6, l1=0.01, tv=0.1, of="logit"),
    "relex": lambda model, x: interpreters.RelEx(model, samples=3, steps=4, lr=0.02, l1=0.01, batch_size=20),
    "occlusion": lambda model, x: interpreters.Occlusion(model, window=5, stride=3),
    "rise": lambda model, x: interpreters.RISE(model, samples=20, grid=4),
    "lime": lambda model, x: interpreters.LIME(model, samples=30, segments=interpreters.Segments(number=9)),
    "kernel-shap": lambda model, x: interpreters.KernelSHAP(model, 30, interpreters.Segments(number=9)),
    "captum": lambda model, x: interpreters.Captum(model, options={"n_steps": 4}),
}

# Without kinks of the method's own; the network's are smoothed by the tests.
SMOOTH: dict[str, Make] = {
    "smoothgrad": lambda model, x: interpreters.SmoothGrad(model, samples=3, channels="sum"),
    "vargrad": lambda model, x: interpreters.VarGrad(model, samples=3, sigma=1.5, of="log_probability"),
    "gradcam++": lambda model, x: interpreters.GradCAMPlusPlus(model, relu=False),
    "layercam": lambda model, x: interpreters.LayerCAM(model, relu=False),
    "gradient": lambda model, x: Gradient(model, channels="sum"),
    "gradcam": lambda model, x: GradCAM(model, relu=False),
    "guided-gradcam": lambda model, x: interpreters.GuidedGradCAM(model, relu=False),
    "smoothed": lambda model, x: Smoothed(model, Gradient(model, channels="sum"), Softplus(3.0)),
    "of-transformed": lambda model, x: of_median(model, lambda m: Gradient(m, channels="sum")),
    "of-draws": lambda model, x: of_draws(model, lambda m: Gradient(m, channels="sum")),
    "projected": lambda model, x: projected(interpreters.SmoothGrad(model, samples=3, channels="sum"), x),
    "aggregate": lambda model, x: Aggregate(model, (CAM(model), GradCAM(model, relu=False)), rescale="minmax"),
    "kernel-smoothed": lambda model, x: interpreters.KernelSmoothed(model, Gradient(model, channels="sum"), samples=3),
    "neighbour-mean": lambda model, x: interpreters.NeighbourMean(model, GradCAM(model, relu=False), background(x), 3),
}

# Finite differences where a rule has kinks at the zeros of weights: a step short enough to meet none.
STEPS = {"lrp": 1e-7}

# Forward passes of the deployed model for one ``explain``, after the first input.
PASSES = {
    "integrated-gradients": 4,
    "expected-gradients": 2,
    "smoothgrad": 2,
    "vargrad": 2,
    "smoothed": 2,
    "of-draws": 4,
    "aggregate": 2,
    "certified": 2,
    "sparsified": 2,
    "metfa": 2,
    "kernel-smoothed": 2,
    "neighbour-mean": 2,
    "deeplift": 2,
    "mask": 7,
    "relex": 9,
    "occlusion": 2,
    "rise": 2,
    "lime": 2,
    "kernel-shap": 2,
    "captum": 2,
}

# Those of tables have a file of tests of their own.
IMAGES = [entry for entry in INTERPRETERS if "images" in accepted_kinds(entry.build)]
NAMES = [entry.name for entry in IMAGES]
# The derivative of votes is zero; attacks go straight through them (tests/defenses/test_certificates.py).
DIFFERENTIABLE = [
    entry.name
    for entry in IMAGES
    if getattr(entry.build, "differentiable", True) and getattr(entry.build, "rounds", False) is not True
]


def plain(name: str) -> Make:
    cls = INTERPRETERS.get(name).build
    return MAKE.get(name, lambda model, x: cls(model))


def smooth(name: str) -> Make:
    return SMOOTH.get(name, plain(name))


@pytest.fixture
def model(
    request: pytest.FixtureRequest, tiny_model: nn.Module, tiny_vit: nn.Module, tiny_senn: nn.Module
) -> nn.Module:
    """A convolutional network; another one for the interpreters that need it."""
    given = getattr(request.node, "callspec", None)
    name = given and (given.params.get("name") or given.params.get("make"))
    needs = INTERPRETERS.get(name).needs if name in INTERPRETERS else ()
    special = {"attention": tiny_vit, "self-explaining network": tiny_senn}
    return copy.deepcopy(next((special[need] for need in needs if need in special), tiny_model))


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest) -> Make:
    return plain(request.param)


def networks(component: object) -> Iterator[nn.Module]:
    """Every network that an interpreter or its members hold."""
    for field in dataclasses.fields(component):  # type: ignore[arg-type]
        value = getattr(component, field.name)
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, nn.Module):
                yield part
            elif dataclasses.is_dataclass(part):
                yield from networks(part)


def weights(interpreter: Interpreter) -> list[nn.Parameter]:
    return list({id(p): p for net in networks(interpreter) for p in net.parameters()}.values())


def hooks(interpreter: Interpreter) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for net in networks(interpreter) for m in net.modules() for kind in kinds)


def others(x: Tensor, model: nn.Module) -> Tensor:
    """Classes that are not predicted."""
    with torch.no_grad():
        logits = model(x)
    return (logits.argmax(1) + 1) % logits.shape[1]


class Fragile(nn.Module):
    """Fails after the inner network has run, while its hooks are still in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.broken = inner, False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        if self.broken:
            raise RuntimeError("out of luck")
        return logits


# Shapes, devices, gradients


def test_every_registered_class_is_an_interpreter_and_has_its_tests() -> None:
    assert {"gradient", "cam", "gradcam", "smoothed", "rts", "aggregate"} <= set(NAMES)
    assert all(issubclass(entry.build, Interpreter) for entry in INTERPRETERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_have_the_inputs_size_and_dtype(make: Make, model: nn.Module, grey: Tensor, dtype: torch.dtype) -> None:
    x = grey.to(dtype)[..., :12]
    maps = make(model.to(dtype), x)(x)
    assert maps.shape == (5, 16, 12)
    assert maps.dtype == dtype
    assert torch.isfinite(maps).all()
    assert (maps.flatten(1).std(1) > 0).any()


def test_float32_agrees_with_float64(make: Make, model: nn.Module, grey: Tensor) -> None:
    maps = make(model, grey)(grey).detach()
    double = copy.deepcopy(model).double()
    wanted = make(double, grey.double())(grey.double()).detach()
    torch.testing.assert_close(maps.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_sample_does_not_depend_on_its_batch(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter, x = make(model.double(), grey.double()), grey.double()
    together, target = interpreter(x), others(x, model)
    alone = torch.cat([interpreter(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    aimed = interpreter(x.flip(0), target.flip(0)).flip(0)
    torch.testing.assert_close(aimed, interpreter(x, target), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_maps_are_attached_with_autograd_on(name: str, model: nn.Module, grey: Tensor) -> None:
    x = grey.clone().requires_grad_()
    # A map that is a gradient has none of its own on rectifiers; the surrogates are there for that.
    with swapped(Softplus(5.0)):
        found = plain(name)(model, grey).explain(x)
    for value in (found.logits, found.maps):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_maps_are_detached_with_autograd_off(
    make: Make, model: nn.Module, grey: Tensor, off: Callable[[], torch.no_grad]
) -> None:
    interpreter = make(model, grey)
    attached = interpreter.explain(grey)
    with off():
        found = interpreter.explain(grey.clone(), others(grey, model))
        default = interpreter.explain(grey.clone())
    assert not any(value.requires_grad for value in found if isinstance(value, Tensor))
    torch.testing.assert_close(default.maps, attached.maps.detach())


def test_explain_gives_the_models_own_logits(make: Make, model: nn.Module, grey: Tensor) -> None:
    found = make(model, grey).explain(grey)
    assert torch.equal(found.logits, model(grey))


@pytest.mark.parametrize("name", NAMES)
def test_explain_shares_one_forward_pass(name: str, model: nn.Module, grey: Tensor) -> None:
    interpreter = plain(name)(model, grey)
    interpreter(grey)
    calls: list[int] = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        interpreter.explain(grey)
    assert len(calls) == PASSES.get(name, 1)


def test_native_maps_resize_to_the_full_ones(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    native = interpreter.explain(grey, native=True).maps
    full = torch.nn.functional.interpolate(native[:, None], size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(interpreter(grey), full)


# Derivatives


def central(value: Callable[[float], float], step: float = 1e-5) -> float:
    """Central difference with a Richardson step: an error of ``O(step^4)``."""
    coarse = (value(step) - value(-step)) / (2 * step)
    fine = (value(step / 2) - value(-step / 2)) / step
    return (4 * fine - coarse) / 3


def directions(like: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(6)
    return [torch.randn(v.shape, generator=rng, dtype=v.dtype) for v in like]


@pytest.fixture
def smooth_model(model: nn.Module) -> Iterator[nn.Module]:
    with swapped(Softplus(4.0)):
        yield model.double()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivative_by_the_input_agrees_with_finite_differences(
    name: str, smooth_model: nn.Module, grey: Tensor
) -> None:
    x = (0.1 + 0.8 * grey[:2].double()).requires_grad_()
    target = others(x, smooth_model)
    interpreter = smooth(name)(smooth_model, x)
    maps = interpreter(x, target)
    (weight,) = directions([maps])
    (v,) = directions([x])
    (gradient,) = torch.autograd.grad((maps * weight).sum(), x)
    slope = float((gradient * v).sum())

    def value(t: float) -> float:
        with torch.no_grad():
            return float((interpreter.explain(x + t * v, target).maps * weight).sum())

    assert abs(slope) > 1e-4
    assert slope == pytest.approx(central(value, STEPS.get(name, 1e-4)), rel=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivative_by_the_weights_agrees_with_finite_differences(
    name: str, smooth_model: nn.Module, grey: Tensor
) -> None:
    x = grey[:2].double()
    target = others(x, smooth_model)
    interpreter = smooth(name)(smooth_model, x)
    interpreter(x)  # finds its layers before the weights move
    parameters = weights(interpreter)
    maps = interpreter(x, target)
    (weight,) = directions([maps])
    vs = directions([p.detach() for p in parameters])
    gradients = torch.autograd.grad((maps * weight).sum(), parameters, allow_unused=True)
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, vs, strict=True) if g is not None)
    start = [p.detach().clone() for p in parameters]

    def value(t: float) -> float:
        with torch.no_grad():
            for p, p0, v in zip(parameters, start, vs, strict=True):
                p.copy_(p0 + t * v)
            return float((interpreter.explain(x, target).maps * weight).sum())

    assert abs(slope) > 1e-4
    assert slope == pytest.approx(central(value, STEPS.get(name, 1e-4)), rel=1e-6)


# What is left behind


def test_hooks_are_gone_after_an_explanation(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    interpreter.explain(grey)
    interpreter(grey)
    assert hooks(interpreter) == 0


@pytest.mark.parametrize("first", [True, False], ids=["on the first input", "later"])
def test_nothing_is_left_after_an_exception_in_the_model(
    make: Make, model: nn.Module, grey: Tensor, first: bool
) -> None:
    fragile = Fragile(model).eval()
    interpreter = make(fragile, grey)
    if not first:
        interpreter(grey)
    fragile.broken = True
    with pytest.raises(RuntimeError, match="out of luck"):
        interpreter(grey)
    assert hooks(interpreter) == 0
    assert torch.is_grad_enabled()
    z = torch.linspace(-1, 1, 5)
    assert torch.equal(torch.relu(z), z * (z > 0))


def test_the_model_and_the_input_stay_as_they_were(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    for i, p in enumerate(weights(interpreter)):
        p.requires_grad_(i % 3 != 0)
        p.grad = torch.full_like(p, float(i)) if i % 2 else None
    nets = list(networks(interpreter))

    def state() -> list[object]:
        return [
            (
                id(p),
                p.requires_grad,
                None if p.grad is None else (id(p.grad), float(p.grad.sum())),
                float(p.detach().sum()),
            )
            for p in weights(interpreter)
        ] + [(m.training, m.__dict__.keys()) for net in nets for m in net.modules()]

    x = grey.clone()
    buffers = [b.clone() for net in nets for b in net.buffers()]
    before = state()
    interpreter(x)
    interpreter.explain(x, others(x, model))
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, (b for n in nets for b in n.buffers()), strict=True))
    assert torch.equal(x, grey)
    assert not x.requires_grad
    assert x.grad is None


def test_the_same_input_gives_the_same_bits(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    once, again = interpreter(grey), interpreter(grey)
    assert torch.equal(once, again)


def test_the_global_random_state_is_left_alone(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    interpreter(grey)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


# The class explained


def test_the_default_target_is_the_prediction(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    prediction = model(grey).argmax(1)
    assert torch.equal(interpreter(grey), interpreter(grey, prediction))
    assert torch.equal(interpreter(grey), interpreter(grey, prediction.int()))


def test_the_target_decides_the_map_of_its_own_sample_only(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    target = model(grey).argmax(1)
    target[2] = others(grey, model)[2]
    default, aimed = interpreter(grey), interpreter(grey, target)
    changed = (default - aimed).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, False, interpreter.class_specific, False, False]


# Errors at the door


def test_a_model_in_train_mode_is_refused(make: Make, model: nn.Module, grey: Tensor) -> None:
    interpreter = make(model, grey)
    model.train()
    with pytest.raises(InputError, match=r"train mode.*eval\(\)"):
        interpreter(grey)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x + 0.5, r"\[0, 1\], got values from .* to 1\."),
        (lambda x: x - 0.5, r"\[0, 1\], got values from -0\."),
        (lambda x: x.where(x != x.max(), torch.nan), "NaN"),
        (lambda x: x.where(x != x.max(), torch.inf), "infinity"),
        (lambda x: x[:0], r"empty: shape \[0, 1, 16, 16\]"),
        (lambda x: x[0], r"\[B, C, H, W\], got \[1, 16, 16\]"),
        (lambda x: (x * 255).byte(), "floating point, got torch.uint8"),
        (lambda x: x.numpy(), "torch.Tensor, got ndarray"),
        (lambda x: x.expand(-1, 3, -1, -1), "3 channel"),
    ],
    ids=["above 1", "below 0", "NaN", "infinity", "empty", "one image", "uint8", "numpy", "channels"],
)
def test_a_bad_input_is_refused(
    make: Make, model: nn.Module, grey: Tensor, bad: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(model, grey)(bad(grey))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 4, 0, 0]), "class 4, but the model has classes 0 to 3"),
        (torch.tensor([0, -1, 0, 0, 0]), "class -1"),
        (torch.zeros(4, dtype=torch.int64), r"shape \[5\].*got \[4\]"),
        (torch.zeros(5, 1, dtype=torch.int64), r"shape \[5\].*got \[5, 1\]"),
        (torch.zeros(5), "integer tensor.*float32"),
        (2, "integer tensor.*int"),
        ([0, 1, 2, 3, 0], "integer tensor.*list"),
    ],
    ids=["too large", "negative", "too few", "two-dimensional", "float", "a number", "a list"],
)
def test_a_bad_target_is_refused(make: Make, model: nn.Module, grey: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(model, grey)(grey, target)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_model_is_refused(name: str, model: nn.Module, grey: Tensor) -> None:
    made = plain(name)(model, grey)
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    with pytest.raises(InputError, match=r"torch\.nn\.Module, got function"):
        type(made)(**{**fields, "model": lambda x: x})


def of_logit(interpreter: Interpreter) -> Interpreter:
    """The same about logits, it and its parts."""
    changes: dict[str, Any] = {"of": "logit"} if hasattr(interpreter, "of") else {}
    return dataclasses.replace(interpreter, **changes, **interpreter._change_parts(of_logit))


@pytest.mark.parametrize("name", NAMES)
def test_the_logit_of_a_class_as_a_scalar_is_explained_as_that_class(name: str, model: nn.Module, grey: Tensor) -> None:
    interpreter, x = plain(name)(model, grey), grey[:2]
    if not interpreter.explains_scalars:
        with pytest.raises(UnsupportedModelError, match=r"explains classes.* integrated-gradients"):
            interpreter(x, lambda answer: answer[:, 2])
        return
    found = interpreter.explain(x, lambda answer: answer[:, 2])
    expected = of_logit(interpreter).explain(x, torch.tensor([2, 2]))
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.logits, expected.logits)
