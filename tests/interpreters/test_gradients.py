"""Input times gradient, integrated and expected gradients, SmoothGrad, VarGrad: against captum, loops and formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import data as data_sets
from robustexplain import models
from robustexplain.data import Data
from robustexplain.errors import InputError
from robustexplain.interpreters import (
    ExpectedGradients,
    ExpectedGradientsTraining,
    InputXGradient,
    IntegratedGradients,
    Interpreter,
    Reference,
    SmoothGrad,
    VarGrad,
    draw_background,
)
from robustexplain.interpreters.gradients.smoothgrad import variance
from robustexplain.random_streams import generator
from robustexplain.registry import INTERPRETERS

Case = tuple[nn.Module, Tensor, Tensor]


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted.to(found), rtol=rtol, atol=rtol * wanted.abs().max().item())


@pytest.fixture(scope="module", params=["trained", "timm:test_resnet", "torchvision:squeezenet1_1", "timm:test_vit"])
def case(request: pytest.FixtureRequest, trained: nn.Module, judged: tuple[Tensor, Tensor], colour: Tensor) -> Case:
    """A model, inputs, and classes that are not all predicted."""
    if request.param == "trained":
        return trained, judged[0][:3], torch.tensor([1, 4, 7])
    side = 160 if "vit" in request.param else 64
    x = torch.nn.functional.interpolate(colour, size=(side, side))
    return models.build(request.param, num_classes=5, seed=2), x, torch.tensor([0, 2, 4])


def probabilities(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).softmax(1)


# Input times gradient


def test_input_x_gradient_is_captums(case: Case) -> None:
    model, x, target = case
    theirs = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), target)
    close(InputXGradient(model)(x, target), theirs.sum(1))
    close(InputXGradient(model, channels="abs_sum")(x, target), theirs.abs().sum(1))
    close(InputXGradient(model, channels="max")(x, target), theirs.abs().amax(1))


def test_input_x_gradient_of_a_probability_is_captums(case: Case) -> None:
    model, x, target = case
    theirs = captum.attr.InputXGradient(probabilities(model)).attribute(x.clone().requires_grad_(), target)
    close(InputXGradient(model, of="probability")(x, target), theirs.sum(1), 1e-3)


def test_input_x_gradient_of_a_linear_model_adds_up_to_its_logit() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).eval()
    x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    close(InputXGradient(linear)(x, torch.tensor([2, 0])).sum((1, 2)), linear(x)[[0, 1], [2, 0]].detach())


# Integrated gradients


@pytest.mark.parametrize(
    ("rule", "method"),
    [("gauss-legendre", "gausslegendre"), ("midpoint", "riemann_middle"), ("right", "riemann_right")],
)
def test_integrated_gradients_are_captums(case: Case, rule: Any, method: str) -> None:
    model, x, target = case
    theirs = captum.attr.IntegratedGradients(model).attribute(x, 0.25, target, n_steps=7, method=method)
    close(IntegratedGradients(model, steps=7, rule=rule, baseline=0.25)(x, target), theirs.float().sum(1))


def test_integrated_gradients_at_the_defaults_are_captums_at_its_own(case: Case) -> None:
    model, x, target = case
    x, target = x[:1], target[:1]
    theirs = captum.attr.IntegratedGradients(model).attribute(x, target=target)
    close(IntegratedGradients(model)(x, target), theirs.float().sum(1))


def test_integrated_gradients_of_a_probability_are_captums(case: Case) -> None:
    model, x, target = case
    theirs = captum.attr.IntegratedGradients(probabilities(model)).attribute(x, target=target, n_steps=5)
    found = IntegratedGradients(model, steps=5, of="probability", channels="abs_sum")(x, target)
    close(found, theirs.float().abs().sum(1), 1e-3)


@pytest.mark.parametrize("of", ["logit", "probability", "log_probability"])
def test_integrated_gradients_are_complete(smooth_net: nn.Module, grey: Tensor, of: Any) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey.double()
    target = torch.tensor([0, 1, 2, 3, 0])
    maps = IntegratedGradients(model, steps=20, baseline=0.5, of=of)(x, target)

    def score(x: Tensor) -> Tensor:
        z = model(x)
        z = {"logit": z, "probability": z.softmax(1), "log_probability": z.log_softmax(1)}[of]
        return z.gather(1, target[:, None])[:, 0].detach()

    close(maps.sum((1, 2)), score(x) - score(torch.full_like(x, 0.5)), 1e-9)


def test_integrated_gradients_of_a_trained_network_are_complete_to_a_percent(
    trained: nn.Module, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged
    with torch.no_grad():
        maps = IntegratedGradients(trained, steps=100, rule="midpoint")(x, y)
        change = (trained(x) - trained(0 * x)).gather(1, y[:, None])[:, 0]
    assert float((maps.sum((1, 2)) - change).abs().max() / change.abs().max()) < 0.01


def test_the_right_rule_is_the_papers_sum(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x, m = copy.deepcopy(smooth_net).double(), grey[:1].double(), 4
    wanted = torch.zeros_like(x)
    for k in range(1, m + 1):
        point = (x * k / m).requires_grad_()
        wanted += torch.autograd.grad(model(point)[0, 2], point)[0] / m
    close(IntegratedGradients(model, steps=m, rule="right")(x, torch.tensor([2])), (x * wanted).sum(1), 1e-12)


def test_the_class_explained_is_the_predicted_one_along_the_whole_path(
    trained: nn.Module, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:5]
    prediction = trained(x).argmax(1)
    assert (trained(x * 0.02).argmax(1) != prediction).any(), "the example is too easy"
    theirs = captum.attr.IntegratedGradients(trained).attribute(x, target=prediction, n_steps=10)
    close(IntegratedGradients(trained, steps=10)(x), theirs.float().sum(1))


# Expected gradients


def some(x: Tensor, number: int) -> Reference:
    return Reference(torch.rand(number, *x.shape[1:], generator=torch.Generator().manual_seed(9)))


def test_expected_gradients_are_a_slow_loop_over_their_draws(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey.double()
    interpreter = ExpectedGradients(model, some(x, 4), samples=6)
    target = torch.tensor([0, 1, 2, 3, 0])
    wanted = torch.zeros_like(x)
    for i, share in zip(*(v.tolist() for v in interpreter.draws()), strict=True):
        start = interpreter.background.x[i].double()
        for row in range(len(x)):
            point = (start + share * (x[row] - start))[None].requires_grad_()
            (gradient,) = torch.autograd.grad(model(point)[0, target[row]], point)
            wanted[row] += (x[row] - start) * gradient[0] / 6
    close(interpreter(x, target), wanted.sum(1), 1e-6)


def test_the_expectation_is_integrated_gradients_averaged_over_the_background(smooth_net: nn.Module) -> None:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    background, target = some(x, 4), torch.tensor([1, 3])
    each = [
        captum.attr.IntegratedGradients(smooth_net).attribute(x, start[None].expand_as(x), target, n_steps=20)
        for start in background.x
    ]
    exact = torch.stack(each).float().mean(0).sum(1)
    found = ExpectedGradients(smooth_net, background, samples=4000, batch_size=1000)(x, target)
    close(found, exact, 2e-3)
    few = [ExpectedGradients(smooth_net, background, samples=8, seed=s)(x, target) for s in range(60)]
    close(torch.stack(few).mean(0), exact, 2e-2)


def test_captums_gradient_shap_comes_to_the_same_expectation(smooth_net: nn.Module) -> None:
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    background, target = some(x, 4), torch.tensor([2])
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        theirs = captum.attr.GradientShap(smooth_net).attribute(x, background.x, 4000, 0.0, target)
    np.random.set_state(before)  # noqa: NPY002
    found = ExpectedGradients(smooth_net, background, samples=4000, batch_size=1000)(x, target)
    # Theirs is a Monte Carlo estimate: 4000 draws err by a few percent of the largest value.
    close(found, theirs.float().sum(1), 5e-2)


def test_draws_use_every_image_equally_often_and_every_stratum_once(tiny_model: nn.Module, grey: Tensor) -> None:
    images, shares = ExpectedGradients(tiny_model, some(grey, 5), samples=20).draws()
    assert torch.bincount(images).tolist() == [4] * 5
    assert (shares * 20).floor().sort().values.tolist() == list(range(20))
    other, _ = ExpectedGradients(tiny_model, some(grey, 5), samples=20, seed=1).draws()
    assert not torch.equal(images, other)


def test_a_recipe_draws_the_background_from_the_training_data(trained: nn.Module, digits: Data, tmp_path: Path) -> None:
    entry = INTERPRETERS.get("expected-gradients")
    settings = ExpectedGradientsTraining(images=16, samples=8)
    made = entry.train(trained, digits.train, settings, seed=3)  # type: ignore[misc]
    pool = {tuple(x.flatten().tolist()) for x, _ in (digits.train[i] for i in range(len(digits.train)))}  # type: ignore[arg-type]
    rows = [tuple(row.flatten().tolist()) for row in made.background.x]
    assert len(set(rows)) == 16
    assert set(rows) <= pool
    assert not torch.equal(draw_background(trained, digits.train, settings, seed=4).background.x, made.background.x)
    x, _ = data_sets.stack(data_sets.take(digits.test, 3))
    rx.System(trained, made).save(tmp_path / "system")
    assert torch.equal(rx.System.load(tmp_path / "system").interpreter(x), made(x))


def test_a_background_of_another_size_or_none_is_refused(tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(InputError, match=r"reference holds images \[1, 8, 8\], got \[1, 16, 16\]"):
        ExpectedGradients(tiny_model, Reference(torch.rand(3, 1, 8, 8)))(grey)
    for x, message in (
        (torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8), "Reference.x must be floating point, got torch.uint8"),
        (255 * torch.rand(3, 1, 8, 8), r"Reference.x must lie in \[0, 1\]"),
        (torch.full((3, 4), torch.nan), "Reference.x holds NaN or infinity"),
    ):
        with pytest.raises(InputError, match=message):
            Reference(x)
    with pytest.raises(InputError, match="background must be a Reference of images or rows, got Tensor"):
        ExpectedGradients(tiny_model, torch.rand(3, 1, 16, 16))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the data set is empty"):
        draw_background(tiny_model, [])  # type: ignore[arg-type]


# SmoothGrad and VarGrad


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, int, float], None]:
    """Make captum's NoiseTunnel add the noise that SmoothGrad adds."""

    def give(x: Tensor, count: int, sigma: float) -> None:
        draws = torch.randn(count, *x.shape[1:], generator=generator(0, "noise"))
        monkeypatch.setattr(torch, "normal", lambda mean, std: sigma * draws.to(x).repeat(len(x), 1, 1, 1))

    return give


@pytest.mark.parametrize(
    ("average", "tunnel", "magnitude"),
    [("signed", "smoothgrad", False), ("magnitude", "smoothgrad", True), ("square", "smoothgrad_sq", False)],
)
def test_smoothgrad_is_captums(case: Case, same_noise: Any, average: Any, tunnel: str, magnitude: bool) -> None:
    model, x, target = case
    same_noise(x, 5, 0.1)
    theirs = captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(
        x, nt_type=tunnel, nt_samples=5, stdevs=0.1, target=target, abs=magnitude
    )
    found = SmoothGrad(model, samples=5, sigma=0.1, average=average, channels="sum")(x, target)
    close(found, theirs.sum(1).detach())
    close(SmoothGrad(model, 5, 0.1, average)(x, target), theirs.abs().sum(1).detach())


def test_vargrad_is_captums(case: Case, same_noise: Any) -> None:
    model, x, target = case
    # In float64: captum's difference of mean squares loses half of the digits.
    model, x = copy.deepcopy(model).double(), x.double()
    same_noise(x, 5, 0.1)
    theirs = captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(
        x, nt_type="vargrad", nt_samples=5, stdevs=0.1, target=target, abs=False
    )
    close(VarGrad(model, samples=5, sigma=0.1)(x, target), theirs.sum(1).detach())


def test_the_noise_is_the_same_for_every_sample_and_follows_the_seed(tiny_model: nn.Module, grey: Tensor) -> None:
    x = grey[:1].expand(3, -1, -1, -1)
    maps = SmoothGrad(tiny_model, samples=3)(x)
    close(maps[1:], maps[:1].expand(2, -1, -1), 1e-5)
    assert not torch.allclose(maps, SmoothGrad(tiny_model, samples=3, seed=1)(x), rtol=1e-2)


def test_noise_is_drawn_anew_for_another_size(tiny_model: nn.Module, grey: Tensor) -> None:
    interpreter = SmoothGrad(tiny_model, samples=3)
    first = interpreter(grey)
    assert interpreter(grey[..., :12]).shape == (5, 16, 12)
    assert torch.equal(interpreter(grey), first)


def test_little_noise_leaves_the_gradient_and_no_variance(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey.double()
    gradient = captum.attr.Saliency(model).attribute(x.clone().requires_grad_(), model(x).argmax(1), abs=False)
    close(SmoothGrad(model, samples=4, sigma=1e-7, channels="sum")(x), gradient.sum(1), 1e-5)
    assert float(VarGrad(model, samples=4, sigma=1e-7)(x).detach().max()) < 1e-10


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_merged_variance_is_torchs(offset: float) -> None:
    values = torch.randn(11, 3, 4, generator=torch.Generator().manual_seed(0)) + offset
    for sizes in ([11], [1] * 11, [4, 4, 3]):
        wanted = values.double().var(0, correction=0)
        torch.testing.assert_close(variance(iter(values.split(sizes))).double(), wanted, rtol=1e-3, atol=0)


# What they share


def all_of_them(model: nn.Module, x: Tensor, number: int, batch_size: int) -> list[Interpreter]:
    return [
        IntegratedGradients(model, steps=number, batch_size=batch_size),
        ExpectedGradients(model, some(x, 3), samples=number, batch_size=batch_size),
        SmoothGrad(model, samples=number, batch_size=batch_size),
        VarGrad(model, samples=number, batch_size=batch_size),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 12])
def test_the_chunk_changes_passes_and_nothing_else(tiny_model: nn.Module, grey: Tensor, batch_size: int) -> None:
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    models.admit(model, x)
    whole = all_of_them(model, x, 7, 1000)
    for interpreter, other in zip(all_of_them(model, x, 7, batch_size), whole, strict=True):
        sizes: list[int] = []
        with model.register_forward_pre_hook(lambda m, args, sizes=sizes: sizes.append(len(args[0]))):
            maps = interpreter(x)
        close(maps, other(x), 1e-10)
        # The first pass gives the logits; the others share out seven points of five samples.
        assert sizes[0] == 5
        assert sum(sizes[1:]) == 7 * 5
        assert max(sizes[1:]) <= batch_size


def test_without_autograd_memory_does_not_grow_with_the_points(tiny_model: nn.Module, grey: Tensor) -> None:
    def most(number: int, index: int) -> int:
        held, peak = 0, 0

        class Held:
            def __init__(self, value: Tensor) -> None:
                nonlocal held, peak
                self.value = value.detach()
                held += value.numel()
                peak = max(peak, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.value.numel()

        interpreter = all_of_them(tiny_model, grey, number, 5)[index]
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.value):
            interpreter(grey)
        return peak

    for index in range(4):
        assert 0 < most(12, index) <= 1.5 * most(3, index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: IntegratedGradients(m, steps=0), r"IntegratedGradients\.steps must be at least 1, got 0"),
        (lambda m: IntegratedGradients(m, rule="left"), r"rule must be one of 'gauss-legendre', .*got 'left'"),
        (lambda m: IntegratedGradients(m, baseline=2.0), r"baseline must be at most 1, got 2\.0"),
        (lambda m: SmoothGrad(m, sigma=0.0), r"SmoothGrad\.sigma must be above 0"),
        (lambda m: SmoothGrad(m, average="median"), "average must be one of"),
        (lambda m: SmoothGrad(m, batch_size=0), r"batch_size must be at least 1"),
        (lambda m: VarGrad(m, samples=1), r"VarGrad\.samples must be at least 2, got 1"),
        (lambda m: InputXGradient(m, of="loss"), r"InputXGradient\.of must be one of .*got 'loss'"),
    ],
)
def test_a_setting_out_of_range_is_refused(
    tiny_model: nn.Module, make: Callable[[nn.Module], Interpreter], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(tiny_model)
