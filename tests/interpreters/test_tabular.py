"""Interpreters on table rows: the differentiable ones, and the lime and shap packages as auditors run them."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import System, checks, interpreters
from robustexplain.attacks import PGD
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.defenses import Aggregate
from robustexplain.errors import FieldError, InputError, MissingDataError, UnknownNameError, UnsupportedModelError
from robustexplain.features import Feature, index_of, with_indices
from robustexplain.interpreters import (
    LRP,
    DeepLIFT,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Interpreter,
    KernelSmoothed,
    LIMETabular,
    LIMETabularTraining,
    NeighbourMean,
    Reference,
    SHAPTabular,
    SHAPTabularTraining,
    Smoothed,
    SmoothGrad,
    VarGrad,
)
from robustexplain.interpreters.base import accepted_kinds
from robustexplain.random_streams import Streams
from robustexplain.registry import INTERPRETERS

MEAN = (40.0, 3.0, 0.4, 0.0, 100.0)
STD = (12.0, 5.0, 0.5, 1.0, 60.0)
NAMES = ("age", "priors", "race", "unrelated", "stay")


class Standardised(nn.Module):
    """A net of rectifiers behind its own standardisation, as a table's classifier is."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor([MEAN]))
        self.register_buffer("std", torch.tensor([STD]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


class Biased(nn.Module):
    """Says class 1 wherever column 2 is above one half, whatever the other columns are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 2], x[:, 2] - 0.5], 1) * 40


@pytest.fixture
def model() -> Standardised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[4].weight.mul_(4)
    return Standardised(net).eval()


def table(number: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 5, generator=rng) * torch.tensor(STD) + torch.tensor(MEAN)
    x[:, 2] = (torch.rand(number, generator=rng) < 0.4).float()
    return x


@pytest.fixture
def x() -> Tensor:
    return table(6, seed=1)


BACKGROUND = Reference(table(30, seed=2))
FEW = Reference(table(4, seed=4), weights=torch.tensor([1.0, 5.0, 2.0, 2.0]))

Make = Callable[[nn.Module], Interpreter]
MAKE: dict[str, Make] = {
    "integrated-gradients": lambda m: IntegratedGradients(m, steps=5, baseline="mean"),
    "expected-gradients": lambda m: ExpectedGradients(m, FEW, samples=6),
    "smoothgrad": lambda m: SmoothGrad(m, samples=4, of="probability", units="model", channels="sum"),
    "vargrad": lambda m: VarGrad(m, samples=4, sigma=0.5, of="log_probability", units="model"),
    "gradient": lambda m: Gradient(m, channels="sum"),
    "deeplift": lambda m: DeepLIFT(m, MEAN),
    "smoothed": lambda m: Smoothed(m, Gradient(m, channels="sum"), Softplus(3.0)),
    "aggregate": lambda m: Aggregate(m, (InputXGradient(m), DeepLIFT(m))),
    "kernel-smoothed": lambda m: KernelSmoothed(m, InputXGradient(m), 0.2, samples=4, units="model"),
    "neighbour-mean": lambda m: NeighbourMean(m, InputXGradient(m), BACKGROUND, 3),
    "lime-tabular": lambda m: LIMETabular(m, BACKGROUND, samples=150, categorical=(2,)),
    "shap-tabular": lambda m: SHAPTabular(m, FEW, samples=16),
}
IMAGES_ONLY = [e.name for e in INTERPRETERS if accepted_kinds(e.build) == ("images",)]
OTHERS = ("smoothed", "aggregate")
OURS = [
    e.name
    for e in INTERPRETERS
    if "tables" in accepted_kinds(e.build) and (e.train is None or e.name in MAKE) and e.name != "of-transformed"
]
DIFFERENTIABLE = [n for n in OURS if getattr(INTERPRETERS.get(n).build, "differentiable", True)]


def make(name: str, model: nn.Module) -> Interpreter:
    made: Interpreter = MAKE.get(name, INTERPRETERS.get(name).build)(model)
    return made


# What every interpreter of tables must do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OURS)
def test_maps_are_one_number_a_column(name: str, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    found = make(name, model.to(dtype)).explain(x.to(dtype))
    assert found.maps.shape == (6, 5)
    assert found.maps.dtype == dtype
    assert torch.equal(found.logits, model(x.to(dtype)))
    assert torch.isfinite(found.maps).all()
    assert (found.maps.std(1) > 0).any()


@pytest.mark.parametrize("name", OURS)
def test_a_row_does_not_depend_on_its_batch(name: str, model: nn.Module, x: Tensor) -> None:
    interpreter, x = make(name, model.double()), x.double()
    target = (model(x).argmax(1) + 1) % 3
    together = interpreter(x, target)
    alone = torch.cat([interpreter(x[i : i + 1], target[i : i + 1]) for i in (3, 0, 5, 1, 4, 2)])
    torch.testing.assert_close(together[[3, 0, 5, 1, 4, 2]], alone, rtol=1e-9, atol=1e-12)
    assert torch.equal(interpreter(x), interpreter(x, model(x).argmax(1)))


@pytest.mark.parametrize("name", OURS)
def test_the_model_the_row_and_the_random_states_stay_as_they_were(name: str, model: nn.Module, x: Tensor) -> None:
    interpreter, before = make(name, model), x.clone()
    interpreter(x)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    weights = [p.detach().clone() for p in model.parameters()]
    once = interpreter(x)
    assert torch.equal(once, interpreter(x))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert torch.equal(x, before)
    assert not model.training
    for p, q in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())


@pytest.fixture
def smooth_model(model: nn.Module) -> Iterator[nn.Module]:
    with swapped(Softplus(4.0)):
        yield model.double()


def central(value: Callable[[float], float], step: float) -> float:
    coarse = (value(step) - value(-step)) / (2 * step)
    fine = (value(step / 2) - value(-step / 2)) / step
    return (4 * fine - coarse) / 3


def draws(like: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(6)
    return [torch.randn(v.shape, generator=rng, dtype=v.dtype) for v in like]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_maps_agree_with_finite_differences(name: str, smooth_model: nn.Module, x: Tensor) -> None:
    x = x[:3].double().requires_grad_()
    target = torch.tensor([2, 0, 1])
    interpreter = make(name, smooth_model)
    maps = interpreter(x, target)
    parameters = list(smooth_model.parameters())
    (weight,) = draws([maps])
    moves = draws([x.detach(), *(p.detach() for p in parameters)])
    moves[0] = moves[0] * torch.tensor(STD)
    gradients = torch.autograd.grad((maps * weight).sum(), [x, *parameters], allow_unused=True)
    start = [p.detach().clone() for p in parameters]

    def value(t: float, by: slice) -> float:
        with torch.no_grad():
            for i, (p, p0) in enumerate(zip(parameters, start, strict=True)):
                p.copy_(p0 + (t * moves[i + 1] if by.start else 0))
            moved = x.detach() + (0 if by.start else t * moves[0])
            return float((interpreter.explain(moved, target).maps * weight).sum())

    for by in (slice(0, 1), slice(1, None)):
        pairs = zip(gradients[by], moves[by], strict=True)
        slope = sum(float((g * v).sum()) for g, v in pairs if g is not None)
        assert abs(slope) > 1e-6
        assert slope == pytest.approx(central(lambda t, by=by: value(t, by), 1e-5), rel=2e-5)  # type: ignore[misc]


# Held against other sources


def test_gradient_methods_are_captums(model: nn.Module, x: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    target, base = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([MEAN])
    bare = model.net
    z = ((x - torch.tensor([MEAN])) / torch.tensor([STD])).detach()
    saliency = attr.Saliency(model).attribute(x.clone(), target=target, abs=False)
    close = torch.testing.assert_close
    close(Gradient(model, of="logit", channels="sum")(x, target), saliency)
    close(Gradient(model, of="logit")(x, target), saliency.abs())
    close(InputXGradient(model)(x, target), attr.InputXGradient(model).attribute(x.clone(), target=target).detach())
    theirs = attr.IntegratedGradients(model).attribute(x, base, target=target, n_steps=20, method="gausslegendre")
    close(IntegratedGradients(model, 20, baseline="mean")(x, target), theirs.float(), rtol=1e-4, atol=1e-5)
    # captum looks for rectifiers that are modules and takes a net without the arithmetic in front of it.
    guided = attr.GuidedBackprop(copy.deepcopy(bare)).attribute(z.clone(), target=target)
    close(GuidedBackprop(model)(x, target), guided / torch.tensor([STD]))
    lifted = attr.DeepLift(copy.deepcopy(bare)).attribute(z.clone(), torch.zeros_like(z), target=target)
    close(DeepLIFT(model, "mean")(x, target), lifted.detach(), rtol=1e-4, atol=1e-5)


def test_lrp_of_a_table_is_the_epsilon_rule_in_plain_loops(model: nn.Module, x: Tensor) -> None:
    model, x, eps = model.double(), x[:1].double(), 1e-6
    layers = [m for m in model.net if isinstance(m, nn.Linear)]
    a = [((x[0] - torch.tensor(MEAN)) / torch.tensor(STD)).double()]
    for layer in layers:
        a.append((layer(a[-1]).relu() if layer is not layers[-1] else layer(a[-1])).detach())
    relevance = torch.zeros(3, dtype=torch.float64)
    relevance[1] = a[-1][1]
    for layer, low in zip(reversed(layers), reversed(a[:-1]), strict=True):
        below = torch.zeros_like(low)
        for k in range(layer.out_features):
            z = float(layer.weight[k] @ low + layer.bias[k])
            for j in range(layer.in_features):
                below[j] += low[j] * layer.weight[k, j].detach() / (z + (eps if z >= 0 else -eps)) * relevance[k]
        relevance = below
    torch.testing.assert_close(LRP(model)(x, torch.tensor([1]))[0].detach(), relevance)


def gradient_at(model: nn.Module, z: Tensor, c: int) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(model(z[None])[0, c], z)[0]


def test_noise_in_the_models_units_is_noise_behind_the_standardisation(model: nn.Module, x: Tensor) -> None:
    found = SmoothGrad(model, 7, sigma=0.3, units="model", channels="sum", seed=5)
    spread = VarGrad(model, 7, sigma=0.3, units="model", seed=5)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    smooth, varied = found(x, target), spread(x, target)
    noise = found._drawn[next(iter(found._drawn))]
    assert noise.shape == (7, 5)
    for i, c in enumerate(target.tolist()):
        z = (x[i] - torch.tensor(MEAN)) / torch.tensor(STD)
        slopes = torch.stack([gradient_at(model.net, z + 0.3 * e, c) for e in noise]) / torch.tensor(STD)
        torch.testing.assert_close(smooth[i], slopes.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(varied[i], slopes.var(0, correction=0), rtol=1e-3, atol=1e-7)
    plain = SmoothGrad(model, 7, sigma=0.3, channels="sum", seed=5)(x, target)
    by_hand = torch.stack([gradient_at(model, x[2] + 0.3 * e, 2) for e in noise]).mean(0)
    torch.testing.assert_close(plain[2], by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", [0.0, "mean", (30.0, 1.0, 0.0, -1.0, 5.0)])
@pytest.mark.parametrize("cls", [IntegratedGradients, DeepLIFT])
def test_attributions_add_up_to_the_difference_from_the_baseline(
    cls: type[Interpreter], baseline: object, model: nn.Module, x: Tensor
) -> None:
    model, x, target = model.double(), x.double(), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"steps": 500, "batch_size": 4000} if cls is IntegratedGradients else {}
    maps = cls(model, baseline=baseline, **options)(x, target)  # type: ignore[call-arg]
    row = {"mean": MEAN, 0.0: (0.0,) * 5}.get(baseline, baseline)  # type: ignore[call-overload]
    base = model(torch.tensor([row], dtype=torch.float64))
    wanted = (model(x) - base).gather(1, target[:, None])[:, 0]
    # The quadrature of a path with kinks is not exact.
    torch.testing.assert_close(maps.sum(1), wanted, **({"rtol": 1e-2, "atol": 1e-2} if options else {}))


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m, x: IntegratedGradients(m, baseline=(1.0, 2.0))(x), "holds 2 numbers, but x has 5 columns"),
        (lambda m, x: DeepLIFT(FLAT, (1.0,) * 3)(torch.rand(1, 1, 4, 4)), "holds 3 numbers, but x has 1 channels"),
        (lambda m, x: IntegratedGradients(m, baseline=30.0), r"at most 1, got 30\.0; a table's row is given"),
        (lambda m, x: IntegratedGradients(m, baseline=-0.1), "at least 0"),
        (lambda m, x: IntegratedGradients(m, baseline="median"), "'mean' or a number for each column, got 'median'"),
        (lambda m, x: DeepLIFT(m, (1.0, math.nan)), "finite numbers"),
        (lambda m, x: DeepLIFT(m, True), "must be a number"),
        (lambda m, x: IntegratedGradients(m.net, baseline="mean")(x), "does not say by which mean it normalises"),
        (lambda m, x: SmoothGrad(m.net, units="model")(x), "does not say by which std it normalises"),
        (lambda m, x: SmoothGrad(m, units="range"), "must be one of 'input', 'model'"),
        (lambda m, x: LRP(m, first="box")(x), "box rule"),
        (lambda m, x: LRP(m, layer="net.1")(x), r"relevance at layer 'net.1' has shape \[6, 12\]"),
    ],
)
def test_baselines_and_units_that_make_no_sense_are_refused(
    bad: Callable[[nn.Module, Tensor], object], message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(InputError, match=message):
        bad(model, x)


def test_a_baseline_for_each_channel_is_a_colour(tiny_model: nn.Module, grey: Tensor) -> None:
    one = IntegratedGradients(tiny_model, 4, baseline=0.25)(grey)
    assert torch.equal(one, IntegratedGradients(tiny_model, 4, baseline=[0.25])(grey))  # type: ignore[arg-type]
    assert torch.equal(one, IntegratedGradients(tiny_model, 4, baseline=(0.25,))(grey))
    mean = float(tiny_model.mean)  # type: ignore[arg-type]
    wanted = IntegratedGradients(tiny_model, 4, baseline=mean)(grey)
    torch.testing.assert_close(IntegratedGradients(tiny_model, 4, baseline="mean")(grey), wanted)


def test_expected_gradients_count_rows_by_their_weights(model: nn.Module, x: Tensor) -> None:
    images, shares = ExpectedGradients(model, FEW, samples=40).draws()
    assert images.bincount(minlength=4).sub(torch.tensor([4, 20, 8, 8])).abs().max() <= 1
    assert shares.sort().values.mul(40).floor().long().tolist() == list(range(40))
    all_on_one = Reference(FEW.x, weights=torch.tensor([0.0, 0.0, 3.0, 0.0]))
    maps = ExpectedGradients(model.double(), all_on_one, samples=4000, batch_size=4000)(x.double())
    wanted = IntegratedGradients(model, 4000, "midpoint", tuple(FEW.x[2].tolist()), batch_size=4000)(x.double())
    torch.testing.assert_close(maps, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


# What is refused


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_what_looks_at_a_grid_refuses_rows_and_names_what_does_not(name: str, tiny_model: nn.Module, x: Tensor) -> None:
    cls = INTERPRETERS.get(name).build
    made = object.__new__(cls)  # type: ignore[call-overload]
    object.__setattr__(made, "model", tiny_model)
    with pytest.raises(UnsupportedModelError, match=r"grid of pixels.*rows \[B, D\] of shape \[6, 5\].*shap-tabular"):
        made.explain(x)


def test_wrappers_refuse_what_their_parts_refuse(model: nn.Module, x: Tensor) -> None:
    for wrapped in (Smoothed(model, GradCAM(model)), Aggregate(model, (Gradient(model), GradCAM(model)))):
        with pytest.raises(UnsupportedModelError, match="looks at a grid of pixels"):
            wrapped(x)
    assert Smoothed(model, GradCAM(model)).takes == ("images",)


@pytest.mark.parametrize("cls", [LIMETabular, SHAPTabular])
def test_the_packages_refuse_images(cls: type[Interpreter], tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"explains the columns of table rows.*kernel-shap"):
        cls(tiny_model, BACKGROUND)(grey)  # type: ignore[call-arg]


def test_attacks_on_inputs_refuse_rows(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"move pixels in \[0, 1\], and PGD got table rows.*attacks\.manipulation"):
        PGD(steps=1)(System(model, Gradient(model)), x, torch.zeros(6, dtype=torch.int64))


def test_rows_may_have_any_range_and_images_may_not(x: Tensor) -> None:
    checks.inputs(x)
    checks.inputs(torch.rand(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"table rows \[B, D\] or images \[B, C, H, W\], got \[5\]"):
        checks.inputs(x[0])
    with pytest.raises(InputError, match=r"got \[6, 1, 5\]"):
        checks.inputs(x[:, None])
    with pytest.raises(InputError, match=r"\[0, 1\], got values from"):
        checks.inputs(x[:, None, None])
    with pytest.raises(InputError, match="NaN"):
        checks.inputs(x / 0)
    with pytest.raises(InputError, match=r"a thing takes images \[B, C, H, W\].*table rows of shape \[6, 5\]"):
        checks.images(x, "a thing")


# The packages: held against themselves, called directly


def seeds(x: Tensor, seed: int, name: str) -> list[int]:
    return Streams.of(x, seed, name).integers(2**31).tolist()


LIME_SETTINGS: list[dict[str, object]] = [
    {},
    {"sample_around_instance": False, "kernel_width": 2.0},
    {"discretize": True},
    {"categorical": (2,)},
    {"of": "label"},
]


@pytest.mark.parametrize("settings", LIME_SETTINGS, ids=str)
def test_lime_is_the_lime_packages(settings: dict[str, object], model: nn.Module, x: Tensor) -> None:
    lime_tabular = pytest.importorskip("lime.lime_tabular")
    target = torch.tensor([2, 0, 1, 1, 0, 2])
    maps = LIMETabular(model, BACKGROUND, samples=400, seed=9, **settings)(x, target)  # type: ignore[arg-type]

    def proba(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.from_numpy(rows).float()).double()
        said = nn.functional.one_hot(logits.argmax(1), 3).double() if settings.get("of") else logits.softmax(1)
        return said.numpy()

    for row, c, seed, found in zip(x, target.tolist(), seeds(x, 9, "lime-tabular"), maps, strict=True):
        explainer = lime_tabular.LimeTabularExplainer(
            BACKGROUND.x.double().numpy(),
            categorical_features=list(settings.get("categorical", ())),  # type: ignore[call-overload]
            kernel_width=settings.get("kernel_width"),
            discretize_continuous=bool(settings.get("discretize")),
            sample_around_instance=bool(settings.get("sample_around_instance", True)),
            random_state=seed,
        )
        said = explainer.explain_instance(row.double().numpy(), proba, (c,), num_features=5, num_samples=400)
        wanted = torch.tensor([dict(said.local_exp[c])[j] for j in range(5)])
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)


def test_lime_finds_the_slopes_of_a_linear_probability_per_standard_deviation() -> None:
    slopes = torch.tensor([1e-4, -2e-3, 0.0, 5e-3, 1e-5])

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = (0.5 + (x - torch.tensor(MEAN)) @ slopes.to(x)).clamp(1e-6, 1 - 1e-6)
            return torch.stack([1 - p, p], 1).log()

    background = Reference(table(500))
    maps = LIMETabular(Linear().eval(), background, samples=2000)(table(3, 5), torch.ones(3, dtype=torch.int64))
    wanted = slopes * background.x.std(0, correction=0)
    torch.testing.assert_close(maps, wanted.expand(3, -1), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("of", ["probability", "label", "logit"])
@pytest.mark.parametrize("background", [FEW, BACKGROUND], ids=["weights", "plain"])
def test_shap_is_the_shap_packages(of: str, background: Reference, model: nn.Module, x: Tensor) -> None:
    shap = pytest.importorskip("shap")
    from shap.utils._legacy import DenseData

    x, target = x[:4], torch.tensor([2, 0, 1, 1])
    maps = SHAPTabular(model, background, samples=14, of=of, seed=9)(x, target)  # type: ignore[arg-type]

    def said(rows: np.ndarray, c: int) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.from_numpy(rows).float()).double()
        by = {"probability": logits.softmax(1)[:, c], "label": (logits.argmax(1) == c).double(), "logit": logits[:, c]}
        return by[of].numpy()

    for row, c, seed, found in zip(x, target.tolist(), seeds(x, 9, "shap-tabular"), maps, strict=True):
        weights = np.ones(30) if background.weights is None else background.weights.double().numpy().copy()
        data = DenseData(background.x.double().numpy(), list(NAMES), None, weights)
        explainer = shap.KernelExplainer(lambda rows, c=c: said(rows, c), data)
        np.random.seed(seed)  # noqa: NPY002
        wanted = explainer.shap_values(row.double().numpy(), nsamples=14, silent=True)
        torch.testing.assert_close(found, torch.from_numpy(wanted).float(), rtol=1e-4, atol=1e-6)


def exact_shapley(model: nn.Module, row: Tensor, background: Reference, c: int) -> Tensor:
    """Shapley's formula: over every coalition, columns outside of it from each row of the background in turn."""
    d = len(row)
    weights = torch.ones(len(background.x)) if background.weights is None else background.weights
    weights = weights.double() / weights.double().sum()

    def worth(coalition: tuple[int, ...]) -> float:
        total = 0.0
        for other, share in zip(background.x, weights.tolist(), strict=True):
            mixed = other.double().clone()
            for j in coalition:
                mixed[j] = row[j]
            total += share * float(model(mixed[None]).softmax(1)[0, c])
        return total

    values = torch.zeros(d, dtype=torch.float64)
    for i in range(d):
        rest = [j for j in range(d) if j != i]
        for size in range(d):
            factor = math.factorial(size) * math.factorial(d - size - 1) / math.factorial(d)
            for coalition in itertools.combinations(rest, size):
                values[i] += factor * (worth((*coalition, i)) - worth(coalition))
    return values


def test_shap_gives_exact_shapley_values_on_few_columns_with_the_backgrounds_weights(
    model: nn.Module, x: Tensor
) -> None:
    pytest.importorskip("shap")
    model, x = model.double(), x[:2].double()
    maps = SHAPTabular(model, FEW)(x, torch.tensor([2, 1]))
    with torch.no_grad():
        wanted = torch.stack([exact_shapley(model, x[0], FEW, 2), exact_shapley(model, x[1], FEW, 1)])
        torch.testing.assert_close(maps, wanted, rtol=1e-6, atol=1e-9)
        said = (model(x).softmax(1) - FEW.shares() @ model(FEW.x.double()).softmax(1))[[0, 1], [2, 1]]
        torch.testing.assert_close(maps.sum(1), said)
        unweighted = SHAPTabular(model, Reference(FEW.x))(x, torch.tensor([2, 1]))
    assert (unweighted - wanted).abs().max() > 1e-3


def test_shap_names_only_so_many_columns_as_it_is_told(model: nn.Module, x: Tensor) -> None:
    pytest.importorskip("shap")
    two = SHAPTabular(model, FEW, select=2)(x)
    assert ((two != 0).sum(1) <= 2).all()
    everything = SHAPTabular(model, FEW, select=None)(x)
    torch.testing.assert_close(SHAPTabular(model, FEW)(x), everything, rtol=1e-3, atol=1e-5)
    assert SHAPTabular(model, FEW, select="aic")(x).shape == (6, 5)


@pytest.mark.parametrize("name", ["lime", "shap"])
def test_both_name_the_column_that_a_biased_model_goes_by(name: str) -> None:
    pytest.importorskip(name)
    model, rows = Biased().eval(), table(12, seed=7)
    rows[:, 2] = torch.arange(12) % 2
    interpreter: Interpreter
    if name == "lime":
        interpreter = LIMETabular(model, Reference(table(200)), samples=500)
    else:
        interpreter = SHAPTabular(model, Reference(table(10)), of="label")
    assert (interpreter(rows).abs().argmax(1) == 2).all()


def test_the_packages_are_silent(model: nn.Module, x: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shap")
    logger, many = logging.getLogger("shap"), Reference(table(101))
    level = logger.level
    SHAPTabular(model, many, samples=10)(x[:1])
    LIMETabular(model, many, samples=50)(x[:1])
    out, err = capfd.readouterr()
    assert out == err == ""
    assert logger.level == level


@pytest.mark.parametrize(("cls", "name"), [(LIMETabular, "lime"), (SHAPTabular, "shap")])
def test_without_the_package_the_error_says_what_to_install(
    cls: type[Interpreter], name: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, "lime.lime_tabular"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDataError, match=rf'needs the {name} package.*pip install "robustexplain\[tabular\]"'):
        cls(model, BACKGROUND)(x)  # type: ignore[call-arg]


# Backgrounds


def data(number: int) -> TensorDataset:
    return TensorDataset(table(number, seed=11), torch.zeros(number, dtype=torch.int64))


def test_a_background_of_kmeans_is_shaps_own_on_standardised_columns(model: nn.Module) -> None:
    shap = pytest.importorskip("shap")
    rows = data(80)
    made = INTERPRETERS.get("shap-tabular").train(model, rows, SHAPTabularTraining(size=7))  # type: ignore[misc]
    x = rows.tensors[0].double()
    mean, std = x.mean(0), x.std(0, correction=0)
    theirs = shap.kmeans(((x - mean) / std).numpy(), 7)
    torch.testing.assert_close(made.background.x.double(), torch.from_numpy(theirs.data) * std + mean)
    torch.testing.assert_close(made.background.shares(), torch.from_numpy(theirs.weights))
    for column in range(5):
        assert torch.isin(made.background.x[:, column], rows.tensors[0][:, column]).all()
    repeated = TensorDataset(table(2).repeat(5, 1), torch.zeros(10, dtype=torch.int64))
    assert interpreters.shap_background(repeated, "kmeans", 10).x.shape == (2, 5)  # type: ignore[arg-type]


def test_large_numbers_do_not_decide_who_is_near_whom() -> None:
    pytest.importorskip("shap")
    rng = torch.Generator().manual_seed(0)
    group = (torch.arange(60) % 2).float()
    x = torch.stack([group, 1e5 * torch.rand(60, generator=rng), torch.full((60,), 3.0)], 1)
    found = interpreters.shap_background(TensorDataset(x, group.long()), "kmeans", 2)  # type: ignore[arg-type]
    assert sorted(found.x[:, 0].tolist()) == [0.0, 1.0]
    assert found.x[:, 2].tolist() == [3.0, 3.0]


def test_a_background_that_is_drawn_comes_from_the_seed(model: nn.Module) -> None:
    rows, train = data(60), INTERPRETERS.get("shap-tabular").train
    assert train is not None
    some = [train(model, rows, SHAPTabularTraining("sample", 9), seed=s) for s in (1, 1, 2)]
    assert torch.equal(some[0].background.x, some[1].background.x)
    assert not torch.equal(some[0].background.x, some[2].background.x)
    assert len(some[0].background.x.unique(dim=0)) == 9
    assert [s.seed for s in some] == [1, 1, 2]
    everything = train(model, rows, SHAPTabularTraining("all", of="label", select=None, batch_size=7))
    assert torch.equal(everything.background.x, rows.tensors[0])
    assert (everything.of, everything.select, everything.batch_size) == ("label", None, 7)
    lime = INTERPRETERS.get("lime-tabular").train
    assert lime is not None
    assert torch.equal(lime(model, rows).background.x, rows.tensors[0])
    small = lime(model, rows, LIMETabularTraining(size=8, categorical=(2,), discretize=True), seed=3)
    assert (len(small.background.x), small.categorical, small.discretize, small.seed) == (8, (2,), True, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m: SHAPTabular(m, table(3)), "must be a Reference of table rows"),
        (lambda m: LIMETabular(m, Reference(torch.rand(3, 1, 4, 4))), r"must hold table rows \[N, D\]"),
        (lambda m: LIMETabular(m, FEW), "no weights"),
        (lambda m: LIMETabular(m, BACKGROUND, kernel_width=0.0), "kernel_width must be above 0, or None"),
        (lambda m: LIMETabular(m, BACKGROUND, of="logit"), "must be one of 'probability', 'label'"),
        (lambda m: LIMETabular(m, BACKGROUND, categorical=("race",)), "'race' is a name.*with_indices"),
        (lambda m: LIMETabular(m, BACKGROUND, categorical=(5,)), "column 5 does not exist: places are 0 to 4"),
        (lambda m: SHAPTabular(m, BACKGROUND, samples=0), "samples must be at least 1, or None"),
        (lambda m: SHAPTabular(m, BACKGROUND, select="auto"), "select must be a whole number, or 'aic', 'bic', None"),
        (lambda m: SHAPTabular(m, BACKGROUND)(torch.rand(2, 4)), r"the reference holds rows \[5\], got \[4\]"),
        (lambda m: SHAPTabularTraining(select=0), "select"),
        (lambda m: LIMETabularTraining(size=0), "size must be at least 1"),
        (lambda m: interpreters.shap_background(data(3), "median"), "'kmeans', 'sample' or 'all', got 'median'"),
        (
            lambda m: interpreters.draw_lime_background(m, TensorDataset(torch.rand(2, 1, 4, 4), torch.zeros(2))),
            r"must be table rows \[D\], and the data set holds \[1, 4, 4\]",
        ),
        (lambda m: interpreters.draw_shap_background(m, data(0)), "the data set is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    bad: Callable[[nn.Module], object], message: str, model: nn.Module
) -> None:
    with pytest.raises(InputError, match=message):
        bad(model)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"4 samples needs as many weights, got \[3\]"),
        (torch.tensor([1.0, -1, 1, 1]), "not negative"),
        (torch.zeros(4), "not all 0"),
        (torch.tensor([1.0, math.nan, 1, 1]), "finite"),
    ],
)
def test_weights_that_are_no_distribution_are_refused(weights: Tensor, message: str, model: nn.Module) -> None:
    with pytest.raises(InputError, match=message):
        Reference(FEW.x, weights=weights)
    with pytest.raises(InputError, match="has no weights"):
        interpreters.Influence(model, Reference(FEW.x, torch.zeros(4, dtype=torch.int64), FEW.weights))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: SHAPTabular(m, FEW, samples=20, of="label", select=None, seed=4),
        lambda m: LIMETabular(m, BACKGROUND, 100, 1.5, categorical=(2, 3), seed=4),
        lambda m: IntegratedGradients(m, 4, baseline=MEAN),
        lambda m: SmoothGrad(m, 4, units="model"),
    ],
    ids=["shap", "lime", "baseline", "units"],
)
def test_a_saved_system_explains_as_before(build: Make, model: Standardised, x: Tensor, tmp_path: Path) -> None:
    system = System(model, build(model))
    loaded = System.load(system.save(tmp_path / "saved"), model=copy.deepcopy(model))
    assert type(loaded.interpreter) is type(system.interpreter)
    assert torch.equal(loaded(x).maps, system(x).maps)
    if isinstance(loaded.interpreter, SHAPTabular):
        assert loaded.interpreter.background.weights is not None
        assert torch.equal(loaded.interpreter.background.weights, FEW.weights)  # type: ignore[arg-type]


def test_another_seed_draws_other_rows(model: nn.Module, x: Tensor) -> None:
    pytest.importorskip("lime")
    system = System(model, LIMETabular(model, BACKGROUND, 100))
    assert system.random
    assert not torch.equal(system(x).maps, system.redrawn(1)(x).maps)


def test_influence_works_on_rows(model: Standardised, x: Tensor) -> None:
    influence = interpreters.Influence(model, Reference(table(9), torch.arange(9) % 3), damping=0.1)
    scores = influence.scores(x)
    assert scores.shape == (6, 9)
    assert torch.isfinite(scores).all()


# Columns by name


@dataclass(frozen=True)
class Inner:
    feature: Feature = "race"
    columns: ClassVar[tuple[str, ...]] = ("feature",)


@dataclass(frozen=True)
class Outer:
    label: str = "race"
    innocent: tuple[Feature, ...] = ("stay", 1)
    none: Feature | None = None
    parts: tuple[Inner, ...] = (Inner(), Inner(3))
    inner: Inner = field(default_factory=Inner)
    columns: ClassVar[tuple[str, ...]] = ("innocent", "none")


def test_names_of_columns_become_places_in_nested_components() -> None:
    found = with_indices(Outer(), NAMES)
    assert found == Outer("race", (4, 1), None, (Inner(2), Inner(3)), Inner(2))
    assert with_indices(found, NAMES) is found
    assert with_indices(LIMETabularTraining(categorical=("race",)), NAMES).categorical == (2,)
    assert with_indices("race", NAMES) == "race"
    with pytest.raises(UnknownNameError, match="unknown column 'rice'; did you mean 'race'"):
        with_indices(Inner("rice"), NAMES)
    with pytest.raises(InputError, match="column 7 does not exist: places are 0 to 4"):
        with_indices(Inner(7), NAMES)


def test_a_column_is_a_place_or_a_name() -> None:
    assert (index_of("stay", NAMES), index_of(3, NAMES), index_of(3), index_of(3, width=4)) == (4, 3, 3, 3)
    for column, message in ((-1, "0 or more"), (True, "place or its name"), (1.0, "place or its name")):
        with pytest.raises(InputError, match=message):
            index_of(column)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names of columns are not known here"):
        index_of("race")
    with pytest.raises(FieldError, match="select"):
        SHAPTabularTraining(select=-1)


@pytest.mark.parametrize(("shift", "unit"), [(1.7e9, 1.8e3), (0.0, 1e-9), (1e6, 2.0)], ids=["time", "mol", "price"])
def test_shap_gives_a_column_its_share_whatever_its_unit(shift: float, unit: float) -> None:
    pytest.importorskip("shap")

    class Standardised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = (x - x.new_tensor([shift, 0, 0])) / x.new_tensor([unit, 1, 1])
            return torch.stack([torch.zeros_like(z[:, 0]), 2 * z[:, 0] + z[:, 1]], 1)

    scale, move = torch.tensor([unit, 1.0, 1.0]), torch.tensor([shift, 0.0, 0.0])
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    # The last column is the same everywhere: it gets 0.
    rows = torch.cat([z[:, :2], torch.ones(6, 1)], 1) * scale + move
    maps = SHAPTabular(Standardised().eval(), Reference(rows[1:]), of="logit")(rows[:1], torch.tensor([1]))[0]
    rest = ((rows - move) / scale)[:, :2] * torch.tensor([2.0, 1.0])
    assert torch.allclose(maps[:2], rest[0] - rest[1:].mean(0), atol=1e-4)
    assert float(maps[2]) == 0
