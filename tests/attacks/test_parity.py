"""The same attack at the same settings in torchattacks and foolbox: the same images, or at least as much success."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import robustexplain as rx
from robustexplain.attacks import BIM, FGSM, MIFGSM, PGD, random_classes
from robustexplain.interpreters import CAM
from robustexplain.models import Classifier

EPS, STEPS, SIZE = 0.03, 10, 0.006
Bench = tuple[rx.System, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> Bench:
    """In float64, where a sign step does not depend on rounding."""
    model = copy.deepcopy(trained).double()
    x, y = judged[0].double(), judged[1]
    return rx.System(model, CAM(model)), x, y, random_classes(x, y, 10)


def torchattacks(name: str, bench: Bench, targeted: bool, **settings: Any) -> Tensor:
    library = pytest.importorskip("torchattacks")
    system, x, y, goal = bench
    attack = getattr(library, name)(system.model, **settings)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    found: Tensor = attack(x, goal if targeted else y)
    return found


def foolbox(name: str, bench: Bench, targeted: bool, **settings: Any) -> Tensor:
    library = pytest.importorskip("foolbox")
    system, x, y, goal = bench
    model = library.PyTorchModel(system.model, bounds=(0, 1), device="cpu")
    aim = library.criteria.TargetedMisclassification(goal) if targeted else library.criteria.Misclassification(y)
    found: Tensor = getattr(library.attacks, name)(**settings)(model, x, aim, epsilons=EPS)[1]
    return found


def rate(bench: Bench, x: Tensor, targeted: bool) -> float:
    system, _, y, goal = bench
    with torch.no_grad():
        prediction = system.model(x).argmax(1)
    return float((prediction == goal if targeted else prediction != y).double().mean())


@pytest.mark.parametrize("targeted", [True, False])
def test_fgsm_is_that_of_torchattacks_and_foolbox(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench
    ours = FGSM(EPS)(system, x, y, goal if targeted else None).x
    assert float((ours - x).abs().max()) == pytest.approx(EPS)
    torch.testing.assert_close(ours, torchattacks("FGSM", bench, targeted, eps=EPS), rtol=0, atol=1e-12)
    if not targeted:  # foolbox has no targeted form
        theirs = foolbox("LinfFastGradientAttack", bench, targeted)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targeted", [True, False])
def test_the_last_iterate_is_that_of_torchattacks_and_foolbox(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench
    ours = BIM(EPS, STEPS, SIZE)(system, x, y, goal if targeted else None).x
    plain = {"steps": STEPS, "random_start": False}
    first = torchattacks("PGD", bench, targeted, eps=EPS, alpha=SIZE, **plain)
    second = foolbox("LinfPGD", bench, targeted, abs_stepsize=SIZE, **plain)
    for theirs in (first, second):
        # A sign may still hang on the last bit of a gradient that is nearly zero.
        assert float(((ours - theirs).abs() > 1e-9).double().mean()) < 1e-3


@pytest.mark.parametrize("targeted", [True, False])
def test_pgd_succeeds_at_least_as_often_as_theirs(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench
    ours = PGD(EPS, STEPS, SIZE)(system, x, y, goal if targeted else None)
    plain = {"steps": STEPS, "random_start": False}
    first = torchattacks("PGD", bench, targeted, eps=EPS, alpha=SIZE, **plain)
    second = foolbox("LinfPGD", bench, targeted, abs_stepsize=SIZE, **plain)
    mine = float(ours.success.double().mean())
    print(
        f"ours {mine:.3f}, torchattacks {rate(bench, first, targeted):.3f}, foolbox {rate(bench, second, targeted):.3f}"
    )
    assert mine > 0.2
    assert mine >= max(rate(bench, x, targeted) for x in (first, second)) - 0.01


@pytest.mark.parametrize("targeted", [True, False])
def test_momentum_takes_the_steps_of_torchattacks(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench
    ours = MIFGSM(EPS, STEPS, SIZE)(system, x, y, goal if targeted else None)
    theirs = torchattacks("MIFGSM", bench, targeted, eps=EPS, alpha=SIZE, steps=STEPS, decay=1.0)
    # Theirs divides the gradient by its mean magnitude, ours by its sum, as the paper: the sign is the same.
    assert float(((ours.x - theirs).abs() > 1e-9).double().mean()) < 1e-3
    assert float(ours.success.double().mean()) >= rate(bench, theirs, targeted) - 0.01


@pytest.mark.parametrize("targeted", [True, False])
def test_momentum_takes_the_steps_of_foolbox(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench
    ours = MIFGSM(EPS, STEPS, SIZE)(system, x, y, goal if targeted else None)
    settings = {"abs_stepsize": SIZE, "steps": STEPS, "momentum": 1.0, "random_start": False}
    theirs = foolbox("LinfMomentumIterativeFastGradientMethod", bench, targeted, **settings)
    print(f"ours {float(ours.success.double().mean()):.3f}, foolbox {rate(bench, theirs, targeted):.3f}")
    assert float(ours.success.double().mean()) >= rate(bench, theirs, targeted) - 0.01
