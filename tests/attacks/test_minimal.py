"""Attacks that look for the smallest change, and deletion by attribution: against plain loops and other libraries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import CW, LBFGS, DeepFool, FeatureDeletion, TanhBox
from robustexplain.attacks.prediction.carlini_wagner import Constants
from robustexplain.interpreters import CAM, LIME, Gradient
from robustexplain.interpreters.perturbation.removal import Fill
from robustexplain.models import Classifier

ROWS = 8
Bench = tuple[rx.System, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> Bench:
    """A float64 system, images it gets right, their labels and goal classes."""
    model = copy.deepcopy(trained).double()
    x, y = judged[0].double(), judged[1]
    right = model(x).argmax(1) == y
    x, y = x[right][:ROWS], y[right][:ROWS]
    return rx.System(model, CAM(model)), x, y, (y + 3) % 10


@pytest.fixture(scope="module")
def planes() -> Bench:
    """Classes that are half-spaces: the smallest change is known in closed form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 4, 4, bias=True), nn.Flatten()).double().eval()
    x = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = model(x).argmax(1)
    return rx.System(model, Gradient(model, of="logit")), x, y, (y + 1) % 4


def distances_to_planes(model: nn.Module, x: Tensor, y: Tensor, p: float) -> Tensor:
    """``[B, K]``: how far the boundary to each class is, in the norm dual to ``p``; infinite for the label's own."""
    weight = model[0].weight.detach().flatten(1)  # type: ignore[index]
    logits = model(x).detach()
    found = torch.full_like(logits, torch.inf)
    for i in range(len(x)):
        for k in range(logits.shape[1]):
            if k != y[i]:
                found[i, k] = (logits[i, y[i]] - logits[i, k]) / (weight[k] - weight[y[i]]).norm(p=p)
    return found


def lengths(found: Tensor, x: Tensor) -> Tensor:
    return (found - x).flatten(1).norm(dim=1)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the model's forward passes."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    yield sizes
    handle.remove()


# --- DeepFool ---


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0)])
def test_deepfool_finds_the_nearest_plane_in_one_step(planes: Bench, norm: str, dual: float) -> None:
    system, x, y, _ = planes
    found = DeepFool(norm=norm, overshoot=0.0)(system, x, y)  # type: ignore[arg-type]
    expected = distances_to_planes(system.model, x, y, dual).amin(1) + 1e-4
    moved = (found.x - x).flatten(1)
    size = moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)
    torch.testing.assert_close(size, expected, rtol=0, atol=1e-9)
    assert bool(found.success.all())
    assert found.queries.tolist() == [2] * len(x)


def test_targeted_deepfool_goes_to_the_goals_own_plane(planes: Bench) -> None:
    system, x, y, goal = planes
    found = DeepFool(overshoot=0.0)(system, x, y, goal)
    assert bool(found.success.all())
    to_goal = distances_to_planes(system.model, x, y, 2.0).gather(1, goal[:, None])[:, 0]
    single = found.queries == 2
    assert int(single.sum()) >= 2
    torch.testing.assert_close(lengths(found.x, x)[single], to_goal[single] + 1e-4, rtol=0, atol=1e-9)


def slow_deepfool(model: nn.Module, x: Tensor, label: int, eta: float, steps: int) -> Tensor:
    """Algorithm 2, one image, every class, with the code's 1e-4 and stretch."""
    classes = [k for k in range(model(x[None]).shape[1]) if k != label]
    total, now = torch.zeros_like(x), x.clone()
    for _ in range(steps):
        leaf = now[None].clone().requires_grad_()
        logits = model(leaf)[0]
        if int(logits.argmax()) != label:
            break
        best, step = np.inf, total
        for k in classes:
            (w,) = torch.autograd.grad(logits[k] - logits[label], leaf, retain_graph=True)
            f = abs(float((logits[k] - logits[label]).detach()))
            size = f / float(w.norm())
            if size < best:
                best, step = size, (size + 1e-4) * w[0] / float(w.norm())
        total = total + step
        now = (x + (1 + eta) * total).clamp(0, 1)
    return now


def test_deepfool_is_a_plain_loop_over_images_and_classes(bench: Bench) -> None:
    system, x, y, _ = bench
    found = DeepFool()(system, x[:4], y[:4])
    for i in range(4):
        expected = slow_deepfool(system.model, x[i], int(y[i]), 0.02, 50)
        torch.testing.assert_close(found.x[i], expected, rtol=0, atol=1e-9)
    assert bool(found.success.all())


@pytest.mark.parametrize(("norm", "name"), [("l2", "L2DeepFoolAttack"), ("linf", "LinfDeepFoolAttack")])
def test_deepfool_changes_as_little_as_foolboxs(bench: Bench, norm: str, name: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    system, x, y, _ = bench
    model = copy.deepcopy(system.model).float()
    single = rx.System(model, CAM(model))
    found = DeepFool(norm=norm)(single, x.float(), y)  # type: ignore[arg-type]
    attack = getattr(foolbox.attacks, name)()
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x.float(), y, epsilons=None)
    torch.testing.assert_close(lengths(found.x, x.float()), lengths(theirs, x.float()), rtol=0.01, atol=1e-4)


def test_deepfool_looks_no_more_once_a_sample_is_past_the_boundary(bench: Bench) -> None:
    system, x, y, _ = bench
    with counted(system.model) as sizes:
        found = DeepFool()(system, x, y)
    # One look at the door, and one for the verdict on each.
    assert sum(sizes) == 1 + int(found.queries.sum()) + len(x)
    wrong = DeepFool()(system, x, (y + 1) % 10)
    assert torch.equal(wrong.x, x)
    assert wrong.queries.tolist() == [1] * len(x)


# --- Carlini and Wagner ---


def test_tanh_box_stands_for_the_image_and_never_leaves_the_box() -> None:
    x = torch.tensor([[0.0, 0.25, 0.5, 1.0]], dtype=torch.float64)
    box = TanhBox()
    start = box.start(x)
    torch.testing.assert_close(box.apply(x, start), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(start[0, 1], torch.atanh(torch.tensor(-0.5 * 0.999999, dtype=torch.float64)))
    far = box.apply(x, torch.tensor([[-50.0, 50.0, 0.0, 0.5]], dtype=torch.float64))
    assert 0 <= float(far.min()) <= float(far.max()) <= 1


def test_constants_grow_tenfold_until_they_succeed_and_are_bisected_then() -> None:
    constants = Constants.first(torch.zeros(2, 1), 0.01)
    tried = []
    for first, second in ((False, True), (False, True), (True, False), (True, True)):
        tried.append(constants.now.tolist())
        constants.tried(torch.tensor([first, second]))
    expected = [[0.01, 0.01], [0.1, 0.005], [1.0, 0.0025], [0.55, 0.00375]]
    np.testing.assert_allclose(tried, expected, rtol=1e-6)


def slow_cw(model: nn.Module, x: Tensor, goal: int, c: float, steps: int, lr: float, rounds: int) -> Tensor:
    """Section V for one image, with torch's own Adam; constants as in the code, no early abort."""
    low, high, best, nearest = 0.0, np.inf, np.inf, x.clone()
    for _ in range(rounds):
        w = torch.atanh(0.999999 * (2 * x - 1)).requires_grad_()
        optimizer, success = torch.optim.Adam([w], lr=lr), False
        for step in range(steps + 1):
            image = (torch.tanh(w) + 1) / 2
            logits = model(image[None])[0]
            rival = max(v for k, v in enumerate(logits.tolist()) if k != goal)
            if float(logits[goal]) > rival:
                success = True
                size = float((image - x).norm())
                if size < best:
                    best, nearest = size, image.detach().clone()
            if step == steps:
                break
            others = torch.cat([logits[:goal], logits[goal + 1 :]])
            loss = (image - x).square().sum() + c * torch.clamp(others.max() - logits[goal], min=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        low, high = (low, min(high, c)) if success else (max(low, c), high)
        c = c * 10 if high == np.inf else (low + high) / 2
    model.zero_grad()
    return nearest


def test_cw_is_a_plain_loop_with_torchs_adam(bench: Bench) -> None:
    system, x, y, goal = bench
    model = copy.deepcopy(system.model)
    attack = CW(steps=25, step_size=0.02, search_steps=4, initial_constant=0.1, abort_early=False)
    found = attack(system, x[:3], y[:3], goal[:3])
    assert int(found.success.sum()) >= 2
    for i in range(3):
        expected = slow_cw(model, x[i], int(goal[i]), 0.1, 25, 0.02, 4)
        torch.testing.assert_close(found.x[i], expected, rtol=0, atol=1e-6)


def test_cw_changes_as_little_as_foolboxs(bench: Bench) -> None:
    foolbox = pytest.importorskip("foolbox")
    system, x, y, _ = bench
    model, x = copy.deepcopy(system.model).float(), x[:4].float()
    single = rx.System(model, CAM(model))
    found = CW(steps=40, step_size=0.02, search_steps=3, initial_constant=0.1, abort_early=False)(single, x, y[:4])
    attack = foolbox.attacks.L2CarliniWagnerAttack(3, 40, 0.02, 0, 0.1, abort_early=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y[:4], epsilons=None)
    assert bool(found.success.all())
    assert float(lengths(found.x, x).mean()) < 1.03 * float(lengths(theirs, x).mean())


def test_cw_is_near_the_nearest_boundary_where_that_is_known(planes: Bench) -> None:
    system, x, y, _ = planes
    found = CW(steps=80, step_size=0.03, search_steps=6, initial_constant=0.1)(system, x, y)
    best = distances_to_planes(system.model, x, y, 2.0).amin(1)
    assert bool(found.success.all())
    assert bool((lengths(found.x, x) > best - 1e-9).all())
    assert float((lengths(found.x, x) / best).max()) < 1.1


def test_a_larger_kappa_is_surer_and_further_away(bench: Bench) -> None:
    system, x, y, goal = bench
    x, y, goal = x[:3], y[:3], goal[:3]
    plain = CW(steps=40, step_size=0.03, search_steps=3, initial_constant=0.5)
    near, far = plain(system, x, y, goal), replace(plain, kappa=3.0)(system, x, y, goal)
    assert bool((near.success & far.success).all())
    logits = system.model(far.x).detach()
    rival = logits.scatter(1, goal[:, None], -torch.inf).amax(1)
    assert bool((logits.gather(1, goal[:, None])[:, 0] - rival >= 3).all())
    assert bool((lengths(far.x, x) > lengths(near.x, x)).all())


def test_cw_without_success_gives_the_image_back_and_says_so(bench: Bench) -> None:
    system, x, y, goal = bench
    found = CW(steps=2, search_steps=1, initial_constant=1e-6)(system, x, y, goal)
    assert torch.equal(found.x, x)
    assert bool(found.stalled.all())


def test_aborting_early_looks_less_and_is_hardly_worse(bench: Bench) -> None:
    system, x, y, _ = bench
    patient = CW(steps=150, step_size=0.02, search_steps=2, initial_constant=0.3, abort_early=False)
    with counted(system.model) as sizes:
        brief = replace(patient, abort_early=True)(system, x[:2], y[:2])
    assert sum(sizes) == 1 + int(brief.queries.sum()) + 2
    full = patient(system, x[:2], y[:2])
    assert int(brief.queries.sum()) < 0.9 * int(full.queries.sum())
    assert float(lengths(brief.x, x[:2]).mean()) < 1.1 * float(lengths(full.x, x[:2]).mean())


# --- L-BFGS ---


def nearest_in_box(model: nn.Module, x: Tensor, goal: int) -> float:
    """The distance to the part of the box where half-spaces give ``goal``, by another solver."""
    optimize = pytest.importorskip("scipy.optimize")
    weight = model[0].weight.detach().flatten(1).numpy()  # type: ignore[index]
    bias, start = model[0].bias.detach().numpy(), x.flatten().numpy()  # type: ignore[index]
    rest = [k for k in range(len(bias)) if k != goal]
    ahead = {"type": "ineq", "fun": lambda v: [(weight[goal] - weight[k]) @ v + bias[goal] - bias[k] for k in rest]}
    found = optimize.minimize(
        lambda v: ((v - start) ** 2).sum(), start, method="SLSQP", constraints=[ahead], bounds=[(0, 1)] * len(start)
    )
    assert found.success
    return float(np.linalg.norm(found.x - start))


def test_lbfgs_ends_on_the_boundary_near_the_nearest_image(planes: Bench) -> None:
    system, x, y, goal = planes
    found = LBFGS(steps=60, search_steps=14, initial_constant=0.1)(system, x, y, goal)
    assert bool(found.success.all())
    best = torch.tensor([nearest_in_box(system.model, x[i], int(goal[i])) for i in range(len(x))], dtype=x.dtype)
    assert bool((lengths(found.x, x) > best - 1e-6).all())
    # The cross-entropy pulls away from every class at once, not from the nearest alone: that is the price over the
    # nearest image. The smallest constant that succeeds ends on the boundary.
    assert float((lengths(found.x, x) / best).max()) < 1.15
    logits = system.model(found.x).detach()
    assert float((logits.gather(1, goal[:, None])[:, 0] - logits.topk(2).values[:, 1]).max()) < 0.01


def test_lbfgs_minimises_its_loss_no_worse_than_many_small_steps(bench: Bench) -> None:
    system, x, y, goal = bench
    x, goal = x[:1], goal[:1]
    found = LBFGS(steps=200, search_steps=1, initial_constant=1.0)(system, x, y[:1], goal)

    def value(image: Tensor) -> Tensor:
        return (image - x).square().sum() - system.model(image).log_softmax(1)[0, int(goal[0])]

    now = x.clone()
    for _ in range(150):
        leaf = now.requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        now = (leaf - 0.02 * gradient).detach().clamp(0, 1)
    assert bool(found.success.all())
    assert float(value(found.x)) < float(value(now)) + 0.02


def test_lbfgs_changes_little_and_counts_every_look(bench: Bench) -> None:
    system, x, y, goal = bench
    for target in (goal[:2], None):
        with counted(system.model) as sizes:
            found = LBFGS(steps=15, search_steps=3, initial_constant=1.0)(system, x[:2], y[:2], target)
        assert bool(found.success.all())
        assert sum(sizes) == 1 + int(found.queries.sum()) + 2
        assert float(lengths(found.x, x[:2]).max()) < 1.5


# --- deletion ---


def changed(found: Tensor, x: Tensor) -> Tensor:
    """``[B, H, W]`` bool: the pixels that differ."""
    return (found != x).any(1)


def test_deletion_takes_the_top_of_the_map_until_the_prediction_changes(bench: Bench) -> None:
    system, x, y, _ = bench
    fill = Fill(value=0.123)
    found = FeatureDeletion(area=0.5, steps=16, fill=fill)(system, x, y)
    maps = system.interpreter(x, system.model(x).argmax(1)).detach()
    for i in range(len(x)):
        order = sorted(range(1024), key=lambda j: -float(maps[i].flatten()[j]))
        for step in range(17):
            image = x[i].clone().flatten(1)
            image[:, order[: 32 * step]] = 0.123
            if int(system.model(image.reshape(x[i : i + 1].shape)).argmax()) != int(y[i]):
                break
        assert bool(found.success[i])
        assert int(found.queries[i]) == step + 1
        assert torch.equal(found.x[i], image.reshape(x[i].shape))


@pytest.mark.parametrize("fill", [Fill(), Fill(value=0.0), Fill("blur"), Fill("noise")])
@pytest.mark.parametrize("area", [0.0, 0.03, 0.2])
def test_deletion_never_exceeds_its_area(bench: Bench, fill: Fill, area: float) -> None:
    system, x, y, goal = bench
    for target in (goal, None):
        found = FeatureDeletion(area=area, steps=7, fill=fill)(system, x, y, target)
        assert float(changed(found.x, x).double().mean((1, 2)).max()) <= area + 1e-9
        assert int(found.queries.max()) <= 8


def test_deleting_by_the_map_needs_less_area_than_at_random(bench: Bench) -> None:
    system, x, y, _ = bench
    attack = FeatureDeletion(area=1.0, steps=64)
    by_map = changed(attack(system, x, y).x, x).double().mean((1, 2))
    random = torch.rand(x.shape[0], 32, 32, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    order = random.flatten(1).argsort(1).argsort(1).reshape(random.shape)
    at_random = torch.ones(len(x), dtype=x.dtype)
    for step in range(64, -1, -1):
        image = torch.where((order < 16 * step)[:, None], 0.5, x)
        at_random[system.model(image).argmax(1) != y] = step / 64
    assert float(by_map.mean()) < 0.7 * float(at_random.mean())


def test_deletion_works_where_the_map_has_no_gradient_and_counts_its_looks(bench: Bench) -> None:
    system, x, y, _ = bench
    blind = rx.System(system.model, LIME(system.model, samples=40))
    assert int(FeatureDeletion()(blind, x[:2], y[:2]).success.sum()) >= 1
    with counted(system.model) as sizes:
        found = FeatureDeletion()(system, x, y)
    # The door, the benign map of each, and the verdict on each come on top.
    assert sum(sizes) == 1 + len(x) + int(found.queries.sum()) + len(x)
