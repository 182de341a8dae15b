"""What every registered attack must keep: generated from the registry, so that a new class gets tested by existing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import PGD, Adaptation, Attack, Attacked, Noise
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.interpreters import CAM, GradCAM, Gradient, Interpreter
from robustexplain.models import Classifier, admit
from robustexplain.registry import ATTACKS
from robustexplain.training import Training

EPS = 0.1
FEW = {"eps": EPS, "steps": 6, "step_size": 0.03}
SMALL: dict[str, dict[str, Any]] = {
    "adaptive-squeezing": {"squeezed_steps": 3, "squeezers": ("bit-depth-3", "median-3")},
    "torchattacks": {"settings": {"steps": 3}},
    "foolbox": {"settings": {"steps": 3}},
    "art": {"settings": {"max_iter": 3}},
    "gd-uap": {"check_every": 4, "batch_size": 4},
    "patch": {"batch_size": 4, "adapt": Adaptation(draws=2)},
    "uap": {"batch_size": 4},
    "universal-hiding-patch": {"batch_size": 4},
    "cw": {"steps": 8, "search_steps": 3, "initial_constant": 1.0, "step_size": 0.05},
    "lbfgs": {"steps": 4, "search_steps": 2, "initial_constant": 1.0},
    "feature-deletion": {"steps": 4},
    "constant-shift": {"steps": 3},
    "dombrowski": {"steps": 3},
    "ghorbani-center": {"steps": 3},
    "ghorbani-influence": {"steps": 1, "damping": 1.0},
    "ghorbani-random": {"steps": 3},
    "ghorbani-region": {"steps": 3},
    "ghorbani-topk": {"steps": 3},
    "square": {"max_queries": 12},
    "nes": {"max_queries": 28, "samples": 6, "sigma": 0.1},
    "spsa": {"max_queries": 28, "samples": 6, "sigma": 0.1},
    "row-search": {"directions": 4},
    "column-switch": {"tries": 20},
    "evolution": {"population": 5, "steps": 4, "sigma": 0.01},
    "substitute": {"craft": PGD(EPS, 3, 0.03), "rounds": 2, "training": Training(epochs=1, batch_size=8)},
}
"""Further settings, by registered name, that keep an attack's tests short."""


@pytest.fixture(autouse=True)
def short_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` has no settings for its steps."""
    monkeypatch.setattr("robustexplain.attacks.joint.auto.STEPS", 6)


def has(attack: Attack, name: str) -> bool:
    return name in {f.name for f in fields(attack)}


def set_where_known(attack: Attack, **values: Any) -> Attack:
    return replace(attack, **{k: v for k, v in values.items() if has(attack, k)})


def variants() -> list[Any]:
    """Each registered attack with few steps, and with each of the shared options that it has."""
    found = []
    for entry in ATTACKS:
        plain = set_where_known(entry.build(), **{**FEW, **SMALL.get(entry.name, {})})
        found.append(pytest.param(plain, id=entry.name))
        if has(plain, "norm") and has(plain, "eps"):
            found.append(pytest.param(replace(plain, norm="l2", eps=0.7), id=f"{entry.name}-l2"))
        if has(plain, "restarts"):
            found.append(pytest.param(replace(plain, restarts=2), id=f"{entry.name}-restarts"))
        if has(plain, "random_start"):
            found.append(pytest.param(replace(plain, random_start=True), id=f"{entry.name}-random-start"))
        if has(plain, "early_stop"):
            found.append(pytest.param(replace(plain, early_stop=True), id=f"{entry.name}-early-stop"))
        if plain.needs_maps:
            found.append(pytest.param((plain, Gradient), id=f"{entry.name}-on-gradient"))
            found.append(pytest.param((plain, GradCAM), id=f"{entry.name}-on-gradcam"))
    return found


@dataclass
class Case:
    """An attack, the system it attacks (float64, so that a sign step does not depend on rounding) and its inputs."""

    attack: Attack
    system: rx.System
    x: Tensor
    y: Tensor
    goal: Tensor

    def run(self, rows: Any = slice(None), *, targeted: bool = True, attack: Attack | None = None) -> Attacked:
        attack = self.ready(attack or self.attack)
        goal = self.goal[rows] if targeted and not attack.keeps_prediction else None
        return attack(self.system, self.x[rows], self.y[rows], goal)

    def ready(self, attack: Attack) -> Attack:
        """Fitted on images of its own, if it needs that."""
        x, y = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(11)), torch.arange(8) % 4
        return attack.fitted(self.system, x.to(self.x.dtype), y) if attack.needs_data else attack

    def to(self, dtype: torch.dtype) -> Case:
        model = copy.deepcopy(self.system.model).to(dtype)
        system = rx.System(model, type(self.system.interpreter)(model))
        return Case(self.attack, system, self.x.to(dtype), self.y, self.goal)


@pytest.fixture(params=variants())
def case(request: pytest.FixtureRequest, tiny_model: Classifier, grey: Tensor) -> Case:
    attack, interpreter = request.param if isinstance(request.param, tuple) else (request.param, CAM)
    if (name := ATTACKS.name_of(type(attack))) in ("torchattacks", "foolbox", "art"):
        pytest.importorskip(name)
    model = copy.deepcopy(tiny_model).double()
    x = grey.double()
    y = model(x).argmax(1)
    return Case(attack, rx.System(model, interpreter(model)), x, y, (y + torch.tensor([1, 2, 3, 1, 2])) % 4)


@pytest.mark.parametrize("targeted", [True, False])
def test_gives_images_of_the_same_shape_and_dtype_in_the_unit_range(case: Case, targeted: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        found = case.to(dtype).run(targeted=targeted)
        assert found.x.shape == case.x.shape
        assert found.x.dtype == dtype
        assert not found.x.requires_grad
        assert 0 <= float(found.x.min()) <= float(found.x.max()) <= 1
        assert found.success.shape == found.zero_direction.shape == (5,)
        assert found.success.dtype == found.zero_direction.dtype == torch.bool


@pytest.mark.parametrize("targeted", [True, False])
def test_stays_in_its_ball(case: Case, targeted: bool) -> None:
    if not has(case.attack, "eps"):
        pytest.skip("no ball")
    single = case.to(torch.float32)
    moved = (single.run(targeted=targeted).x.double() - single.x.double()).flatten(1)
    if getattr(case.attack, "norm", "linf") == "linf":
        # One float32 ulp of a pixel below 1.
        assert float(moved.abs().max()) <= EPS + 2**-24
    else:
        assert float(moved.norm(dim=1).max()) <= 0.7 * (1 + 1e-6)
    assert float(moved.abs().max()) > 0


def test_without_a_radius_gives_the_input_back(case: Case) -> None:
    if not has(case.attack, "eps"):
        pytest.skip("no ball")
    assert torch.equal(case.run(attack=replace(case.attack, eps=0.0)).x, case.x)  # type: ignore[call-arg]


@pytest.mark.parametrize("targeted", [True, False])
def test_a_sample_does_not_depend_on_its_batch(case: Case, targeted: bool) -> None:
    together = case.run(targeted=targeted)
    backwards = case.run(torch.arange(4, -1, -1), targeted=targeted)
    torch.testing.assert_close(backwards.x.flip(0), together.x, rtol=0, atol=1e-9)
    for i in range(2):
        alone = case.run(slice(i, i + 1), targeted=targeted)
        torch.testing.assert_close(alone.x, together.x[i : i + 1], rtol=0, atol=1e-9)
        assert torch.equal(alone.success, together.success[i : i + 1])


def test_the_same_seed_gives_the_same_bits_whatever_the_global_state(case: Case) -> None:
    first = case.run()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = case.run()
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.success, second.success)


def test_another_seed_gives_another_result_where_something_is_random(case: Case) -> None:
    if not (isinstance(case.attack, Noise) or getattr(case.attack, "random_start", False)):
        pytest.skip("nothing need be random")
    other = replace(case.attack, seed=case.attack.seed + 1)
    assert not torch.equal(case.run().x, case.run(attack=other).x)


def state_of(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in model.modules()],
        [[len(getattr(module, h)) for h in hooks] for module in model.modules()],
        [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
        [t.tolist() for t in model.state_dict().values()],
    ]


def test_leaves_model_inputs_and_random_state_as_found(case: Case) -> None:
    model = case.system.model
    next(model.parameters()).requires_grad_(False)
    x, y, goal = case.x.clone().requires_grad_(), case.y.clone(), case.goal.clone()
    before = state_of(model)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    attack = case.ready(case.attack)
    found = attack(case.system, x, y, None if attack.keeps_prediction else goal)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(x, case.x)
    assert torch.equal(y, case.y)
    assert torch.equal(goal, case.goal)
    assert found.x.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("targeted", [True, False])
def test_success_is_what_a_fresh_forward_pass_says(case: Case, targeted: bool) -> None:
    found = case.run(targeted=targeted)
    prediction = case.system.model(found.x).argmax(1)
    if case.attack.keeps_prediction:
        wanted = prediction == case.system.model(case.x).argmax(1)
    else:
        wanted = prediction == case.goal if targeted else prediction != case.y
    assert torch.equal(found.success, wanted)


def test_works_where_the_caller_has_switched_autograd_off(case: Case) -> None:
    with torch.no_grad():
        found = case.run()
    assert torch.equal(found.x, case.run().x)


def test_takes_classes_as_int32(case: Case) -> None:
    attack = case.ready(case.attack)
    goal = None if attack.keeps_prediction else case.goal.int()
    found = attack(case.system, case.x, case.y.int(), goal)
    assert torch.equal(found.x, case.run().x)


class Bang(Exception):
    pass


def test_an_error_inside_the_model_leaves_no_hook(case: Case) -> None:
    calls, fuse = 0, 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fuse:
            raise Bang

    model = case.system.model
    admit(model, case.x)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(count)
    before = state_of(model)
    case.run()
    total = calls
    for last in sorted({2, total // 2, total - 1, total}):
        calls, fuse = 0, last
        # A new interpreter looks for its layers again, with hooks of its own.
        case.system = rx.System(model, type(case.system.interpreter)(model))
        with pytest.raises(Bang):
            case.run()
        assert state_of(model) == before


def bad(what: str) -> Callable[[Case], tuple[Any, ...]]:
    def arguments(case: Case) -> tuple[Any, ...]:
        x, y, goal = case.x, case.y, case.goal
        nan = x.clone()
        nan[0, 0, 0, 0] = torch.nan
        return {
            "x above 1": (x + 1, y, goal),
            "x below 0": (x - 1, y, goal),
            "x nan": (nan, y, goal),
            "x uint8": ((x * 255).to(torch.uint8), y, goal),
            "x without batch": (x[0], y, goal),
            "x empty": (x[:0], y[:0], goal[:0]),
            "y too large": (x, y + 4, goal),
            "y negative": (x, y - 5, goal),
            "y too short": (x, y[:-1], goal),
            "y float": (x, y.double(), goal),
            "goal too large": (x, y, goal + 4),
            "goal is y": (x, y, torch.cat([y[:1], goal[1:]])),
            "map of another size": (x, y, goal, torch.zeros(5, 8, 8)),
            "map nan": (x, y, goal, torch.full((5, 16, 16), torch.nan)),
        }[what]

    return arguments


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("x above 1", r"\[0, 1\].*got values"),
        ("x below 0", r"\[0, 1\].*got values"),
        ("x nan", "NaN"),
        ("x uint8", "floating point"),
        ("x without batch", r"\[B, C, H, W\]"),
        ("x empty", "empty"),
        ("y too large", "y holds class"),
        ("y negative", "y holds class"),
        ("y too short", r"y must have shape \[5\]"),
        ("y float", "integer"),
        ("goal too large", "goal_class holds class"),
        ("goal is y", "goal_class equals the label"),
        ("map of another size", r"goal_map must have shape \[5, 16, 16\]"),
        ("map nan", "goal_map holds NaN"),
    ],
)
def test_bad_input_is_refused_at_the_door(case: Case, what: str, says: str) -> None:
    attack, (x, y, goal, *rest) = case.ready(case.attack), bad(what)(case)
    if attack.keeps_prediction and what.startswith("goal"):
        says = "takes no goal_class"
    elif attack.keeps_prediction:
        goal = None
    with pytest.raises(InputError, match=says):
        attack(case.system, x, y, goal, *rest)


def test_a_model_in_train_mode_is_refused(case: Case) -> None:
    case.system.model.train()
    with pytest.raises(InputError, match="train mode"):
        case.run()


@dataclass(frozen=True, eq=False)
class Opaque(CAM):
    """An interpreter that says it has no gradient."""

    differentiable = False


def test_maps_without_a_gradient_are_refused_by_who_needs_it(case: Case) -> None:
    opaque: Interpreter = Opaque(case.system.model)
    system = rx.System(case.system.model, opaque)
    attack = case.ready(case.attack)
    goal = None if attack.keeps_prediction else case.goal
    if not attack.differentiates(system):
        assert attack(system, case.x, case.y, goal).x.shape == case.x.shape
        return
    with pytest.raises(NotDifferentiableError, match=r"Opaque.*cam.*gradcam.*gradient"):
        attack(system, case.x, case.y, goal)


def test_works_under_bfloat16_autocast(case: Case) -> None:
    single = case.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = single.run()
    assert found.x.dtype == torch.float32
    assert bool(torch.isfinite(found.x).all())


def test_reports_what_it_cost_and_whether_it_got_anywhere(case: Case) -> None:
    found = case.run()
    assert found.queries.shape == found.stalled.shape == found.surrogate_misled.shape == (5,)
    assert found.queries.dtype == torch.int64
    assert found.stalled.dtype == found.surrogate_misled.dtype == torch.bool
    assert not bool((found.surrogate_misled & ~found.stalled).any())


def test_says_what_it_is_made_of(case: Case) -> None:
    assert all(isinstance(word, str) for word in case.attack.summaries())


@pytest.mark.parametrize("entry", list(ATTACKS), ids=lambda e: e.name)
def test_the_seed_is_never_taken_by_position(entry: Any) -> None:
    assert all(f.kw_only for f in fields(entry.build) if f.name == "seed")
    with pytest.raises(ValueError, match="seed"):
        entry.build(seed=-1)
