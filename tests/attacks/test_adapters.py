"""Attacks of other libraries in our matrix: settings as data, judged by us, leaving no trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ART, Attack, Foolbox, Foreign, Torchattacks, random_classes
from robustexplain.attacks.prediction.adapters import GuardedModel, seeded
from robustexplain.errors import FieldError, InputError, UnknownNameError
from robustexplain.interpreters import CAM, Gradient
from robustexplain.models import Classifier, admit
from robustexplain.recipe import read

EPS = 0.1


def ready(attack: Attack) -> Attack:
    """The attack, if its library is installed."""
    name = {Torchattacks: "torchattacks", Foolbox: "foolbox", ART: "art"}.get(type(attack))
    if name is not None:
        pytest.importorskip(name)
    return attack


@pytest.fixture
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> tuple[rx.System, Tensor, Tensor, Tensor]:
    x, y = judged[0][:6], judged[1][:6]
    return rx.System(trained, CAM(trained)), x, y, random_classes(x, y, 10)


MANY: list[Attack] = [
    Torchattacks("PGD", {"eps": EPS, "alpha": 0.02, "steps": 12}),
    Foolbox("LinfPGD", {"steps": 12, "rel_stepsize": 0.2}, EPS),
    ART("ProjectedGradientDescent", {"eps": EPS, "eps_step": 0.02, "max_iter": 12}),
]


@pytest.mark.parametrize("attack", MANY, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("targeted", [True, False])
def test_pgd_of_each_library_succeeds_in_its_ball_and_costs_what_it_shows(
    attack: Attack, targeted: bool, bench: tuple[rx.System, Tensor, Tensor, Tensor]
) -> None:
    system, x, y, goal = bench
    # The door tries a model that it has not seen.
    admit(system.model, x)
    shown: list[int] = []
    handle = system.model.register_forward_hook(lambda module, args, output: shown.append(len(output)))
    found = ready(attack)(system, x, y, goal if targeted else None)
    handle.remove()
    prediction = system.model(found.x).argmax(1)
    assert torch.equal(found.success, prediction == goal if targeted else prediction != y)
    assert float(found.success.float().mean()) >= 0.6
    assert float((found.x - x).abs().max()) <= EPS + 1e-6
    assert not bool(found.stalled[found.success].any())
    # One look at the door, the verdict, and the two by which stalling is judged are not the attack's.
    assert int(found.queries.sum()) == sum(shown) - 1 - 3 * len(x)


UNTARGETED: list[Attack] = [
    Torchattacks("DeepFool", {"steps": 5}),
    Foolbox("LinfFastGradientAttack", {}, EPS),
    ART("DeepFool", {"max_iter": 5}),
]


@pytest.mark.parametrize("attack", UNTARGETED, ids=lambda a: type(a).__name__)
def test_an_attack_without_a_targeted_form_is_refused_a_goal_class(
    attack: Attack, bench: tuple[rx.System, Tensor, Tensor, Tensor]
) -> None:
    system, x, y, goal = bench
    assert bool((ready(attack)(system, x, y).x != x).flatten(1).any(1).all())
    with pytest.raises(InputError, match="targeted form"):
        attack(system, x, y, goal)


@pytest.mark.parametrize("attack", [Torchattacks("PGDD"), Foolbox("LinfPGDD"), ART("ProjectedGradient")])
def test_an_unknown_attack_lists_the_near_ones(attack: Attack, bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, _ = bench
    with pytest.raises(UnknownNameError, match=r"did you mean.*(PGD|ProjectedGradientDescent)|known:"):
        ready(attack)(system, x[:1], y[:1])


@pytest.mark.parametrize("attack", [Torchattacks("PGD"), Foolbox("LinfPGD"), ART("ProjectedGradientDescent")])
def test_settings_that_the_library_refuses_are_our_error(
    attack: Any, bench: tuple[rx.System, Tensor, Tensor, Tensor]
) -> None:
    system, x, y, _ = bench
    attack.settings["epsilonn"] = 1
    with pytest.raises(InputError, match=r"refuses its settings.*epsilonn"):
        ready(attack)(system, x[:1], y[:1])


@pytest.mark.parametrize(("attack", "name"), [(Torchattacks(), "torchattacks"), (Foolbox(), "foolbox"), (ART(), "art")])
def test_a_missing_library_is_named_with_the_extra_that_has_it(
    attack: Attack, name: str, bench: tuple[rx.System, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert attack.summaries()[1] == "misclassify"
    with pytest.raises(InputError, match=rf"needs {name} .*pip install 'robustexplain\[attacks\]'"):
        attack(*bench[:3])


def test_a_whole_batch_may_be_shown_at_once(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, goal = bench
    sizes: list[int] = []
    handle = system.model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    settings = {"eps": EPS, "steps": 4, "random_start": False}
    found = [ready(Torchattacks("PGD", settings, batched=b))(system, x, y, goal) for b in (False, True)]  # type: ignore[arg-type]
    handle.remove()
    assert torch.equal(found[0].queries, found[1].queries)
    assert sizes.count(6) >= 4
    # The loss is a mean over the batch there, whose sign is that of each sample's own.
    assert torch.equal(found[0].success, found[1].success)


def test_any_function_is_an_attack(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, goal = bench
    seen: list[tuple[list[int], Tensor | None]] = []

    def brighter(model: nn.Module, x: Tensor, y: Tensor, goal_class: Tensor | None) -> Tensor:
        seen.append((list(model(x).shape), goal_class))
        return x + torch.rand(x.shape)

    found = Foreign(brighter)(system, x, y, goal)
    assert [shape for shape, _ in seen] == [[1, 10]] * 6
    assert torch.equal(torch.cat([g for _, g in seen if g is not None]), goal)
    assert found.queries.tolist() == [1] * 6
    assert float(found.x.max()) <= 1
    assert torch.equal(found.x, Foreign(brighter)(system, x, y, goal).x), "a sample draws from its own stream"
    assert Foreign(brighter).summaries() == ("as set", "misclassify", "brighter")


@pytest.mark.parametrize("bad", [lambda m, x, y, g: x[..., :4], lambda m, x, y, g: x * torch.nan, lambda m, x, y, g: 1])
def test_what_is_no_batch_of_finite_images_is_refused(
    bad: Any, bench: tuple[rx.System, Tensor, Tensor, Tensor]
) -> None:
    with pytest.raises(InputError, match="must return finite images of shape"):
        Foreign(bad)(*bench[:3])


def test_an_attack_that_changes_nothing_is_reported_as_stalled(
    bench: tuple[rx.System, Tensor, Tensor, Tensor],
) -> None:
    found = Foreign(lambda model, x, y, goal: x)(*bench)
    assert bool(found.stalled[~found.success].all())


def test_a_library_cannot_change_the_model(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, _ = bench
    weight = next(system.model.parameters())
    weight.grad = torch.ones_like(weight)

    def rude(model: nn.Module, x: Tensor, y: Tensor, goal_class: Tensor | None) -> Tensor:
        model.train().zero_grad()
        model.to(torch.float64)
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        return x

    Foreign(rude)(system, x, y)
    assert not any(m.training for m in system.model.modules())
    assert weight.dtype == torch.float32
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.requires_grad for p in system.model.parameters())
    weight.grad = None
    guarded = GuardedModel(system.model, x)
    assert guarded(x.double()).dtype == torch.float64
    assert guarded.count == 6


def test_global_random_states_are_lent_and_given_back() -> None:
    import random

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    draws = []

    def interrupted() -> None:
        with seeded(3, torch.device("cpu")):
            draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002
            raise RuntimeError("boom")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            interrupted()
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[index]  # noqa: NPY002


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(FieldError, match=r"eps must be at least 0, or None, got -0\.1"):
        Foolbox(eps=-0.1)


def test_a_recipe_names_them_with_their_settings(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: t\ndata: digits\nmodel: small-cnn\ninterpreters: [cam]\nattacks:\n"
        "  - {name: torchattacks, attack: PGD, settings: {eps: 8/255, steps: 3, random_start: false}}\n"
        "  - {name: foolbox, attack: L2CarliniWagnerAttack, eps: null}\n"
        "  - {name: art, attack: SquareAttack, settings: {eps: 0.1}}\n"
        "  - {name: adaptive-squeezing, squeezers: [median-3], steps: 4}\n"
    )
    attacks = [column.attack for column in read(file).columns]
    assert attacks[0] == Torchattacks("PGD", {"eps": 8 / 255, "steps": 3, "random_start": False})
    assert attacks[1] == Foolbox("L2CarliniWagnerAttack", eps=None)
    assert attacks[2] == ART("SquareAttack", {"eps": 0.1})
    assert attacks[3].squeezers == ("median-3",)


def test_a_wanted_lead_beyond_that_of_bounded_logits_is_reached_nearby() -> None:
    pytest.importorskip("foolbox")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[10.0], [-10.0]]).expand(2, 16))
        net[1].bias.copy_(torch.tensor([-80.0, 80.0]))
    x = torch.full((1, 1, 4, 4), 0.53)
    settings = {"steps": 40, "binary_search_steps": 5, "stepsize": 0.05, "confidence": 20.0, "initial_const": 1.0}
    attack = Foolbox("L2CarliniWagnerAttack", settings, eps=None)
    found = attack(rx.System(net, Gradient(net)), x, torch.tensor([0]))
    logits = net(found.x)[0].detach()
    assert float(logits[1] - logits[0]) >= 20
    # The nearest such image is 0.37 away, and a corner of the cube, where a search goes that never succeeds, 2.1.
    assert float((found.x - x).norm()) < 0.5
