"""Universal perturbations: against plain loops, and the papers' claims on a small network trained on digits."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import GDUAP, PGD, UAP, Attack, Noise, SignStep, Universal, UniversalSearch, fit_universal
from robustexplain.attacks.prediction.gd_uap import LargeActivations, activation_loss
from robustexplain.attacks.search.universal import Fitted, mini_batches
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.data import Data, stack, take
from robustexplain.errors import InputError, UnsupportedModelError, ZeroMapGradientWarning
from robustexplain.interpreters import CAM, Gradient
from robustexplain.maps import clipped
from robustexplain.models import Classifier
from robustexplain.objectives import Goal, MatchMap, Observation
from robustexplain.random_streams import Streams


@dataclass
class Bench:
    """System, the adversary's images, and test images."""

    system: rx.System
    x: Tensor
    y: Tensor
    own_x: Tensor
    own_y: Tensor

    def double(self, count: int = 10) -> tuple[rx.System, Tensor, Tensor]:
        """In float64, where a sign step does not hang on rounding, with some of the adversary's own images."""
        model = copy.deepcopy(self.system.model).double()
        return rx.System(model, CAM(model)), self.own_x[:count].double(), self.own_y[:count]

    def fooled(self, attack: Attack) -> float:
        """Share of the judging images that the attack gets wrong."""
        return float(attack(self.system, self.x, self.y).success.float().mean())


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor], digits: Data) -> Bench:
    own_x, own_y = stack(take(digits.defense, 96))
    return Bench(rx.System(trained, CAM(trained)), *judged, own_x, own_y)


# --- the threat model ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_universal_perturbation_stays_in_its_ball_and_images_in_the_unit_range(norm: str) -> None:
    x = torch.rand(6, 3, 8, 8)
    threat = Universal(0.3, norm)  # type: ignore[arg-type]
    wild = 10 * torch.randn(6, 3, 8, 8)
    for variable in (threat.project(x, wild), threat.start(x, Streams.of(x, 0))):
        sizes = variable.flatten(1).abs().amax(1) if norm == "linf" else variable.flatten(1).norm(dim=1)
        assert float(sizes.max()) <= 0.3 * (1 + 1e-6)
        assert float(sizes.min()) > 0.25
        patched = threat.apply(x, variable)
        assert 0 <= float(patched.min()) <= float(patched.max()) <= 1
        torch.testing.assert_close(patched, (x + variable).clamp(0, 1))
    small = 1e-3 * torch.rand(6, 3, 8, 8)
    assert torch.equal(threat.project(x, small), small)
    assert not threat.start(x).any()
    with pytest.raises(InputError, match=r"fitted on images of shape \[3, 8, 8\], got \[3, 4, 4\]"):
        threat.apply(x[..., :4, :4], wild)


def test_clipping_is_not_taken_for_a_rectifier_of_the_network() -> None:
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], requires_grad=True)
    with swapped(Softplus(10.0)):
        found = clipped(x)
    assert torch.equal(found, x.detach().clamp(0, 1))
    (gradient,) = torch.autograd.grad(clipped(x).sum(), x)
    assert gradient.tolist() == [0, 1, 1, 1, 0]


# --- data-driven ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal_class", [None, 3])
def test_uap_is_the_mini_batch_loop_of_the_paper(bench: Bench, norm: str, goal_class: int | None) -> None:
    system, x, y = bench.double()
    eps, size, cap = (0.2, 0.06, 2.5) if norm == "linf" else (3.0, 0.8, 2.5)
    attack = UAP(eps, 7, size, norm, cap, 4, goal_class, seed=5).fitted(system, x, y)  # type: ignore[arg-type]
    if goal_class is not None:
        x, y = x[y != goal_class], y[y != goal_class]
    v, batches, capped = torch.zeros_like(x[:1]), mini_batches(len(x), 4, 5), 0
    for _ in range(7):
        rows, total = next(batches).tolist(), torch.zeros_like(v)
        for i in rows:
            bare = x[i : i + 1] + v
            leaf = bare.clamp(0, 1).requires_grad_()
            logits = system.model(leaf)
            wanted = y[i : i + 1] if goal_class is None else torch.tensor([goal_class])
            loss = F.cross_entropy(logits, wanted)
            capped += int(loss.detach() > cap)
            loss = torch.clamp(loss, max=cap) if goal_class is None else -loss
            # What lies outside [0, 1] is clipped, and moves nothing.
            total += torch.autograd.grad(loss, leaf)[0] * ((bare >= 0) & (bare <= 1)) / len(rows)
        if norm == "linf":
            v = (v + size * total.sign()).clamp(-eps, eps)
        else:
            v = v + size * total / max(float(total.norm()), 1e-12)
            v = v * min(1.0, eps / float(v.norm()))
    assert capped, "no loss was ever beyond the cap: the test shows nothing of it"
    torch.testing.assert_close(attack.applied.variable, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(attack(system, x, y).x, (x + v).clamp(0, 1), rtol=0, atol=1e-12)


def test_mini_batches_show_every_image_once_before_any_twice() -> None:
    batches = mini_batches(10, 4, 0)
    epochs = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("norm", "eps", "size"), [("linf", 0.1, 0.01), ("l2", 2.0, 0.2)])
def test_one_perturbation_fools_most_images_that_it_was_not_made_from(
    bench: Bench, norm: str, eps: float, size: float
) -> None:
    attack = UAP(eps, 60, size, norm).fitted(bench.system, bench.own_x, bench.own_y)  # type: ignore[arg-type]
    noise = Noise(eps, "sign" if norm == "linf" else "gaussian", norm)  # type: ignore[arg-type]
    assert bench.fooled(attack) > 0.7
    assert bench.fooled(noise) < 0.5 * bench.fooled(attack)
    # One for all is a harder thing to find than one for each.
    assert bench.fooled(attack) <= bench.fooled(PGD(eps, 20, size, norm)) + 0.05  # type: ignore[arg-type]


def test_success_is_judged_by_the_callers_goal(bench: Bench) -> None:
    attack = UAP(0.15, 60, 0.01, goal_class=7).fitted(bench.system, bench.own_x, bench.own_y)
    rows = bench.y != 7
    x, y = bench.x[rows], bench.y[rows]
    towards = attack(bench.system, x, y, torch.full_like(y, 7))
    assert float(towards.success.float().mean()) > 0.8
    other = torch.where(y == 2, 4, 2)
    asked = attack(bench.system, x, y, other)
    assert torch.equal(asked.x, towards.x)
    assert torch.equal(asked.success, bench.system.model(towards.x).argmax(1) == other)


def test_a_fitted_attack_shows_the_system_nothing_and_says_whether_the_fit_got_anywhere(bench: Bench) -> None:
    attack = UAP(0.1, 10, 0.02).fitted(bench.system, bench.own_x, bench.own_y)
    found = attack(bench.system, bench.x, bench.y)
    assert not found.queries.any()
    assert not found.stalled.any()
    stuck = UAP(0.0, 3, 0.02).fitted(bench.system, bench.own_x, bench.own_y)(bench.system, bench.x, bench.y)
    assert bool(stuck.stalled.all())


def test_who_runs_it_unfitted_is_told_what_to_do(bench: Bench) -> None:
    for attack in (UAP(), GDUAP()):
        with pytest.raises(InputError, match=r"attack\.fitted\(system, x, y\)"):
            attack(bench.system, bench.x, bench.y)
    with pytest.raises(InputError, match="shape"):
        UAP(steps=1).fitted(bench.system, bench.own_x, bench.own_y)(bench.system, bench.x[..., :16, :16], bench.y)


def test_a_fit_refuses_what_it_cannot_use(bench: Bench) -> None:
    system, x, y = bench.system, bench.own_x[:8], bench.own_y[:8]
    with pytest.raises(InputError, match="goal_class holds class 10"):
        UAP(goal_class=10).fitted(system, x, y)
    with pytest.raises(InputError, match="every image is of goal_class 4"):
        UAP(goal_class=4).fitted(system, x, torch.full_like(y, 4))
    with pytest.raises(InputError, match=r"y must have shape \[8\]"):
        UAP().fitted(system, x, y[:3])
    with pytest.raises(InputError, match="PGD plans no UniversalSearch"):
        fit_universal(PGD(), system, x, y, None)


@dataclass(frozen=True)
class Blind(UAP):
    """Follows the maps of a network of rectifiers, which have no gradient."""

    def plan(self, system: rx.System) -> UniversalSearch:
        return UniversalSearch(Universal(self.eps), MatchMap(), self.steps, SignStep(0.01))


def test_a_map_gradient_of_zero_is_reported(bench: Bench) -> None:
    system = rx.System(bench.system.model, Gradient(bench.system.model, of="logit"))
    x, y = bench.own_x[:4], bench.own_y[:4]
    zeros = torch.zeros(4, *x.shape[2:])
    plan = Blind(steps=2).plan(system)
    with pytest.warns(ZeroMapGradientWarning, match="every image"):
        applied = plan.fit(system, Goal(x, y, goal_map=zeros), 0)
    assert bool(Fitted(UAP(), applied)(system, x, y).zero_direction.all())


# --- data-free ---


def test_the_activation_loss_is_the_log_of_the_product_of_all_convolutions_norms(bench: Bench) -> None:
    system, x, _ = bench.double(3)
    outputs: list[Tensor] = []
    layers = [m for m in system.model.modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_hook(lambda m, a, output: outputs.append(output.clone())) for m in layers]
    system.model(x)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 4
    product = torch.ones(3, dtype=torch.float64)
    for output in outputs:
        product *= torch.stack([(one.flatten() @ one.flatten()) / 2 for one in output])
    torch.testing.assert_close(activation_loss(system.model, x), -product.log())
    seen = Observation(x, torch.zeros(3, 10), system=system)
    torch.testing.assert_close(LargeActivations().loss(seen, Goal(x, torch.zeros(3))), -product.log())


def test_activations_are_read_in_front_of_what_overwrites_them() -> None:
    def net(inplace: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = nn.Conv2d(1, 3, 3), nn.ReLU(inplace), nn.Conv2d(3, 2, 3), nn.ReLU(inplace)
            return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    losses = [activation_loss(net(inplace), x) for inplace in (False, True)]
    assert torch.equal(*losses)
    assert bool(torch.autograd.grad(losses[1].sum(), x)[0].any())
    with pytest.raises(UnsupportedModelError, match="Sequential runs none"):
        activation_loss(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), x)


@pytest.mark.parametrize(("lr", "halvings"), [(0.0002, 0), (0.05, 2)])
def test_gd_uap_is_the_loop_of_the_published_code(bench: Bench, lr: float, halvings: int) -> None:
    system, x, y = bench.double(12)
    eps, steps = 0.1, 60
    attack = GDUAP(eps, steps, lr, check_every=14, patience=3, batch_size=5, seed=2).fitted(system, x, y)
    v = (torch.rand((1, *x.shape[1:]), generator=_generator(2)) * 2 - 1).double() * eps
    leaf = v.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=lr)
    clean, best, best_rate = system.model(x).argmax(1), v, -1.0
    saturation, checked, bad, halved = 0.0, 0, 0, 0
    for i in range(steps):
        optimiser.zero_grad()
        activation_loss(system.model, (0.5 + leaf).clamp(0, 1)).sum().backward()
        optimiser.step()
        with torch.no_grad():
            leaf.clamp_(-eps, eps)
            previous, saturation = saturation, float((leaf.abs() == eps).double().mean())
            saturated = abs(saturation - previous) < 1e-5 and saturation > 0.5
            if (i - checked > 7 and saturated) or i - checked == 14:
                checked = i
                rate = float((system.model((x + leaf).clamp(0, 1)).argmax(1) != clean).double().mean())
                if rate > best_rate:
                    best, best_rate, bad = leaf.detach().clone(), rate, 0
                else:
                    bad += 1
                    if bad == 3:
                        break
            if saturated:
                leaf /= 2
                checked, halved = i, halved + 1
    rate = float((system.model((x + leaf.detach()).clamp(0, 1)).argmax(1) != clean).double().mean())
    best = leaf.detach() if rate > best_rate else best
    assert (halved >= halvings) if halvings else halved == 0
    torch.testing.assert_close(attack.applied.variable, best, rtol=0, atol=1e-9)


def _generator(seed: int) -> torch.Generator:
    from robustexplain.random_streams import generator

    return generator(seed, "gd-uap")


@pytest.mark.parametrize("prior", ["none", "range", "data"])
def test_without_any_data_activations_alone_make_a_perturbation_that_fools(bench: Bench, prior: str) -> None:
    steps = 150 if prior == "none" else 40
    attack = GDUAP(0.15, steps, 0.01, prior, batch_size=8, check_every=20)  # type: ignore[arg-type]
    fitted = attack.fitted(bench.system, bench.own_x, bench.own_y)
    assert float(fitted.applied.variable.abs().max()) <= 0.15 + 1e-7
    assert bench.fooled(fitted) > bench.fooled(Noise(0.15, "sign")) + 0.2
    # No label is looked at.
    again = attack.fitted(bench.system, bench.own_x, (bench.own_y + 1) % 10)
    assert torch.equal(fitted.applied.variable, again.applied.variable)


def test_a_perturbation_that_was_never_checked_needs_no_image(bench: Bench) -> None:
    attack = GDUAP(0.1, 5, 0.01, check_every=100)
    one, two = (attack.fitted(bench.system, bench.own_x[i : i + 8], bench.own_y[i : i + 8]) for i in (0, 8))
    assert torch.equal(one.applied.variable, two.applied.variable)
    assert replace(one, seed=1).applied is one.applied
