"""Smoothing of maps: beta searched and its bound, uniform gradients, kernels; and the published benefit of each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain import interpreters
from robustexplain import maps as ops
from robustexplain.attacks import ADV2, Dombrowski
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.slopes import network_slopes
from robustexplain.data import stack
from robustexplain.defenses import BetaSmoothing, Defense, KernelSmoothing, UniformGradient
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM, Gradient, KernelSmoothed, Smoothed, SmoothGrad
from robustexplain.interpreters.composed.map_bound import curvature, map_bound
from robustexplain.metrics import Curvature, Infidelity, MaxSensitivity, Pearson, Spearman
from robustexplain.models import Classifier
from robustexplain.progress import Silent
from robustexplain.training import Session


@dataclass
class Heard(Silent):
    """Keeps what is said."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Keep it."""
        self.lines.append(text)


@pytest.fixture
def heard() -> Session:
    return Session(progress=Heard())


def said(session: Session) -> str:
    assert isinstance(session.progress, Heard)
    return " ".join(session.progress.lines)


@pytest.fixture(scope="module")
def plain(trained: Classifier) -> rx.System:
    return rx.System(trained, Gradient(trained))


# --- kernels and uniform noise ---


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_a_kernel_smoothed_map_is_the_mean_over_copies(tiny_model: nn.Module, grey: Tensor, noise: Any) -> None:
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    base, width, target = GradCAM(model), 0.2, torch.tensor([1, 0, 2, 3, 1])
    smooth = KernelSmoothed(model, base, width, samples=40, noise=noise, batch_size=7)
    found = smooth(x, target).detach()
    (draws,) = smooth._drawn.values()
    expected = torch.stack([base.explain(x + width * draw, target).maps for draw in draws]).mean(0)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    assert float(draws.std()) == pytest.approx(1.0 if noise == "gaussian" else 3**-0.5, rel=0.02)
    assert noise == "gaussian" or float(draws.abs().max()) <= 1
    assert not torch.allclose(smooth.redrawn(1)(x, target), found)


def test_the_uniform_gradient_is_the_mean_of_signed_gradients(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:3], judged[1][:3]
    system = rx.System(trained, Gradient(trained, of="logit", channels="max"))
    found = UniformGradient(radius=0.2, samples=40)(system).interpreter
    assert isinstance(found, SmoothGrad)
    rng = torch.Generator().manual_seed(5)
    many = []
    for _ in range(400):
        near = (x + 0.2 * (2 * torch.rand(x.shape, generator=rng) - 1)).requires_grad_()
        many.append(torch.autograd.grad(trained(near).gather(1, y[:, None]).sum(), near)[0])
    expected = torch.stack(many).mean(0).abs().amax(1)
    more = replace(found, samples=400)(x, y).detach()
    assert float(Pearson()(more, expected).min()) > 0.95
    for pooled in (Gradient(trained, pool=4), Gradient(trained, layer="net.features.5")):
        with pytest.raises(UnsupportedModelError, match="gradient by the input, not pooled"):
            UniformGradient()(rx.System(trained, pooled))
    with pytest.raises(UnsupportedModelError, match="explains by CAM; see kernel-smoothing"):
        UniformGradient()(rx.System(trained, CAM(trained)))


def test_a_searched_width_trades_infidelity_for_sensitivity(
    plain: rx.System, few: Dataset[Any], heard: Session
) -> None:
    with pytest.raises(InputError, match="needs data"):
        KernelSmoothing("auto")(plain)
    defense = KernelSmoothing("auto", samples=4, loss=0.2, images=4)
    found = defense(plain, few, heard).interpreter
    assert isinstance(found, KernelSmoothed)
    assert f"width {found.width:g}, infidelity" in said(heard)
    x = stack(few, range(8))[0]
    infidelity, sensitivity = Infidelity(scaled=True), MaxSensitivity(samples=5)
    with torch.no_grad():
        target = plain(x).prediction
        before, after = (i(x, target) for i in (plain.interpreter, found))
        worse = infidelity(plain.model, x, after, target).mean() / infidelity(plain.model, x, before, target).mean()
        moved = [sensitivity(i, x, target).nanmean() for i in (plain.interpreter, found)]
    assert float(worse) < 1.5, "other images than the search looked at, hence not 1.2"
    assert float(moved[1]) < 0.8 * float(moved[0])


# --- beta ---


def test_a_searched_beta_is_the_smoothest_that_keeps_the_order_of_pixels(
    plain: rx.System, few: Dataset[Any], heard: Session
) -> None:
    defense = BetaSmoothing("auto", correlation=0.9, images=40)
    with pytest.raises(InputError, match="needs data"):
        defense(plain)
    found = defense(plain, few, heard).interpreter
    assert isinstance(found, Smoothed)
    beta = found.smooth.beta
    x = stack(few)[0]

    def agreement(beta: float) -> float:
        with torch.no_grad():
            logits, maps = plain.interpreter.explain(x)[:2]
            other = Smoothed(plain.model, plain.interpreter, Softplus(beta))(x, logits.argmax(1))
        return float(Spearman(magnitude=True)(other, maps).mean())

    assert agreement(beta) >= 0.9 > agreement(0.9 * beta)
    assert f"beta {beta:g}, rank correlation 0.9" in said(heard)
    assert "a map moves by at most" in said(heard)
    assert defense(plain, few).interpreter.smooth.beta == beta  # type: ignore[attr-defined]
    looser = BetaSmoothing("auto", correlation=0.7, images=40)(plain, few).interpreter
    assert looser.smooth.beta < beta  # type: ignore[attr-defined]


def test_what_no_beta_can_hold_is_refused(trained: Classifier, plain: rx.System, few: Dataset[Any]) -> None:
    with pytest.raises(InputError, match=r"BetaSmoothing\.correlation: no beta holds it"):
        BetaSmoothing("auto", correlation=1.0, images=8)(plain, few)
    for wrong in (0, -1.0, "none", True, torch.inf):
        with pytest.raises(FieldError, match=r"BetaSmoothing\.beta must be"):
            BetaSmoothing(wrong)  # type: ignore[arg-type]
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    with pytest.raises(UnsupportedModelError, match="rectifiers"):
        BetaSmoothing("auto")(rx.System(smooth, Gradient(smooth)), few)


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)).double().eval()


def test_the_slopes_of_two_layers_are_those_of_the_formula() -> None:
    net, x = mlp(), torch.rand(1, 1, 3, 3, dtype=torch.float64)
    first, second = (float(torch.linalg.matrix_norm(net[i].weight.detach(), 2)) for i in (1, 3))  # type: ignore[index, union-attr, arg-type]
    found = network_slopes(net, x, beta=8.0)
    assert found.first == pytest.approx(first * second)
    # L2(W2 s(W1 x)) = |W2| beta/4 |W1|^2
    assert found.second == pytest.approx(second * 8 / 4 * first**2)


@pytest.mark.parametrize("of", ["logit", "probability", "log_probability"])
def test_no_map_moves_beyond_the_bound(trained: Classifier, judged: tuple[Tensor, Tensor], of: Any) -> None:
    x, y = judged[0][:8], judged[1][:8]
    smoothed = Smoothed(trained, Gradient(trained, of=of, channels="abs_sum"), Softplus(3.0))
    bound = map_bound(smoothed, x[:1])
    step = 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moved = (smoothed(x, y) - smoothed((x + step).clamp(0, 1), y)).flatten(1).norm(dim=1)
    assert bool((moved <= bound * step.flatten(1).norm(dim=1)).all())
    if of == "logit":
        harder = Smoothed(trained, smoothed.base, Softplus(6.0))
        assert map_bound(harder, x[:1]) == pytest.approx(2 * bound, rel=1e-5)


def test_the_bound_is_reached_by_one_rectifier() -> None:
    # For w softplus(v x) the largest second derivative is w v^2 beta / 4, at 0: a smaller bound would be broken.
    net = (
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).double().eval()
    )
    with torch.no_grad():
        net[1].weight.fill_(3.0)
        net[3].weight.copy_(torch.tensor([[2.0], [0.0]]))
    smoothed = Smoothed(net, Gradient(net, of="logit", channels="sum"), Softplus(5.0))
    x = torch.tensor([0.0, 1e-4], dtype=torch.float64).reshape(2, 1, 1, 1)
    maps = smoothed(x, torch.zeros(2, dtype=torch.int64)).detach().flatten()
    bound = map_bound(smoothed, x[:1])
    assert bound == pytest.approx(2 * 9 * 5 / 4)
    assert float(maps[1] - maps[0]) / 1e-4 == pytest.approx(bound, rel=1e-4)


def test_where_no_bound_is_known_it_is_said(trained: Classifier, grey: Tensor) -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 4)).eval()
    with pytest.raises(UnsupportedModelError, match="max_pool2d"):
        map_bound(Smoothed(pooled, Gradient(pooled)), grey[:1])
    for other in (Smoothed(trained, CAM(trained)), Gradient(trained)):
        with pytest.raises(UnsupportedModelError, match="a gradient that is smoothed"):
            map_bound(other, grey[:1])


def test_the_curvature_is_that_of_the_level_set() -> None:
    net, x = mlp(3), torch.rand(2, 1, 3, 3, dtype=torch.float64)
    smoothed = Smoothed(net, Gradient(net, of="logit"), Softplus(6.0))
    target = torch.tensor([1, 2])
    found = curvature(smoothed, x, target, steps=200)
    for i in range(2):

        def score(z: Tensor, i: int = i) -> Tensor:
            with swapped(Softplus(6.0)):
                logit: Tensor = net(z.reshape(1, 1, 3, 3))[0, target[i]]
            return logit

        point = x[i].flatten()
        gradient = torch.autograd.functional.jacobian(score, point)
        hessian = torch.autograd.functional.hessian(score, point)
        normal = gradient / gradient.norm()
        projection = torch.eye(9, dtype=torch.float64) - normal[:, None] * normal
        expected = torch.linalg.eigvalsh(projection @ hessian @ projection).abs().max() / gradient.norm()
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-3)


# --- what the papers claim ---


@dataclass(frozen=True)
class Forged:
    x: Tensor
    y: Tensor
    attacked: Tensor
    goal: Tensor

    def likeness(self, interpreter: interpreters.Interpreter) -> float:
        """How much nearer the attack brings the map to the goal: the gain of the correlation of magnitudes."""
        with torch.no_grad():
            before, after = (interpreter(x, self.y).abs() for x in (self.x, self.attacked))
        pearson = Pearson()
        return float((pearson(after, self.goal) - pearson(before, self.goal)).mean())


@pytest.fixture(scope="module")
def forged(plain: rx.System, judged: tuple[Tensor, Tensor]) -> Forged:
    """Dombrowski's attack on the plain gradient, towards the map of another image."""
    x = judged[0][:8]
    with torch.no_grad():
        y = plain(x).prediction
        goal = ops.unit_sum(plain.interpreter(x.roll(1, 0), y.roll(1, 0)))
    found = Dombrowski(eps=0.1, steps=40, step_size=5e-3, tolerance=1.0)(plain, x, y, goal_map=goal)
    assert torch.equal(plain(found.x).prediction, y)
    return Forged(x, y, found.x, goal)


@pytest.mark.parametrize(
    "defense",
    [BetaSmoothing(0.8), UniformGradient(0.2, samples=30), KernelSmoothing(0.2, samples=30)],
    ids=lambda d: d.name,
)
def test_smoothing_halves_what_an_oblivious_attack_on_the_gradient_reaches(
    defense: Defense, plain: rx.System, forged: Forged
) -> None:
    before, after = (forged.likeness(s.interpreter) for s in (plain, defense(plain)))
    print(f"{defense.name}: correlation gained {before:.3f}, smoothed {after:.3f}")
    assert before > 0.25
    assert after < 0.5 * before


def test_smoothgrad_halves_it_too(plain: rx.System, forged: Forged, trained: Classifier) -> None:
    smooth = SmoothGrad(trained, samples=30, sigma=0.15, of="probability", channels="max")
    assert forged.likeness(smooth) < 0.5 * forged.likeness(plain.interpreter)


@pytest.mark.parametrize(
    "defense", [UniformGradient(0.05, samples=4), KernelSmoothing(0.05, samples=4)], ids=lambda d: d.name
)
def test_an_adaptive_attack_averages_over_draws(defense: Defense, plain: rx.System) -> None:
    smooth = defense(plain)
    assert smooth.random
    assert ADV2().adapted(smooth).adapt.draws > 1
    assert not ADV2().adapted(smooth).adapt.straight


def test_the_metric_is_the_curvature_where_there_is_a_smoothed_network(
    plain: rx.System, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:3], judged[1][:3]
    smoothed = BetaSmoothing(2.0)(plain).interpreter
    assert isinstance(smoothed, Smoothed)
    assert torch.equal(Curvature()(smoothed, x, y), curvature(smoothed, x, y))
    assert bool(Curvature()(plain.interpreter, x).isnan().all())
    sharper = Smoothed(plain.model, plain.interpreter, Softplus(20.0))
    assert float(Curvature()(sharper, x, y).mean()) > 2 * float(Curvature()(smoothed, x, y).mean())
