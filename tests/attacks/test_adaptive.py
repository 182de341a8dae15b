"""Attacks that know the defense: straight through what has no gradient, and in expectation over what is random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import (
    ADV2,
    CW,
    DRAWS,
    FGSM,
    NES,
    PGD,
    UAP,
    Adaptation,
    Auto,
    DeepFool,
    Dombrowski,
    FeatureDeletion,
    GradientDirection,
    HidingPatch,
    Linf,
    StAdv,
    random_classes,
)
from robustexplain.attacks.adaptive import evasion
from robustexplain.attacks.search.directions import StepContext
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.straight_through import StraightThrough, straight_through
from robustexplain.defenses import InputTransform
from robustexplain.errors import InputError, NotDifferentiableError, ZeroDirectionWarning, ZeroMapGradientWarning
from robustexplain.interpreters import CAM, GradCAM, Gradient, Mask, SmoothGrad, VarGrad
from robustexplain.metrics import L1
from robustexplain.models import Classifier, with_transforms
from robustexplain.objectives import EvadeDetector, Goal, MatchMap, Misclassify, Objective
from robustexplain.random_streams import Streams, derive
from robustexplain.registry import ATTACKS
from robustexplain.schema import make
from robustexplain.system import Detector

EPS = 0.1
LEVELS = 15


class Rounding(nn.Module):
    """A classifier that sees images of sixteen levels."""

    def __init__(self, model: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.how = model, how
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.how(x))
        return logits


def rounded(x: Tensor) -> Tensor:
    return (LEVELS * x).round() / LEVELS


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy((LEVELS * x.detach().numpy()).round() / LEVELS).to(x.dtype)


def system(model: nn.Module) -> rx.System:
    return rx.System(model, Gradient(model))


# --- straight through ---


def test_plain_pgd_stalls_on_rounding_and_says_so_and_straight_through_it_succeeds(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged
    goal = random_classes(x, y, 10)
    model = Rounding(trained, rounded)
    plain = PGD(EPS, 20, 0.02)
    with pytest.warns(ZeroDirectionWarning, match=r"gradient of the prediction is exactly zero.*adapt.straight"):
        stuck = plain(system(model), x, y, goal)
    through = replace(plain, adapt=Adaptation(straight=True))(system(model), x, y, goal)
    assert torch.equal(stuck.zero_direction, model(x).argmax(1) != goal)
    assert not bool(through.zero_direction.any())
    assert bool(stuck.stalled[~stuck.success].all())
    assert float(stuck.success.float().mean()) < 0.1
    assert torch.equal(stuck.x, x)
    bare = plain(system(trained), x, y, goal)
    assert float(through.success.float().mean()) >= float(bare.success.float().mean()) - 0.1 > 0.6
    assert not bool(through.stalled[through.success].any())


def test_a_step_that_leaves_the_graph_is_refused_until_it_is_wrapped(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:12], judged[1][:12]
    goal = random_classes(x, y, 10)
    attack = PGD(EPS, 20, 0.02)
    with pytest.raises(NotDifferentiableError, match="wrap such a step in StraightThrough"):
        attack(system(Rounding(trained, through_numpy)), x, y, goal)

    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return through_numpy(x)

    model = nn.Sequential(StraightThrough(Numpy()), trained).eval()
    assert float(attack(system(model), x, y, goal).success.float().mean()) > 0.6
    torch.testing.assert_close(model(x), Rounding(trained, through_numpy)(x), rtol=0, atol=1e-4)


STEPS = ("round", "floor", "ceil", "trunc", "sign")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("form", ["function", "method", "in place"])
def test_steps_keep_their_value_and_get_the_derivative_of_the_identity(name: str, form: str) -> None:
    x = torch.linspace(-2.3, 2.4, 9, dtype=torch.float64)
    call: dict[str, Callable[[Tensor], Tensor]] = {
        "function": getattr(torch, name),
        "method": getattr(Tensor, name),
        "in place": lambda v: getattr(v, f"{name}_")(),
    }
    leaf = x.clone().requires_grad_()
    with straight_through():
        value = call[form](3 * leaf)
    torch.testing.assert_close(value, getattr(torch, name)(3 * x), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], torch.full_like(x, 3.0))
    outside = call[form](3 * leaf)
    assert not torch.autograd.grad(outside.sum(), leaf)[0].any()


def test_rounding_to_decimals_is_gone_through_as_well() -> None:
    x = torch.tensor([0.1234, 0.5678], requires_grad=True)
    with straight_through():
        value = torch.round(x, decimals=2)
    torch.testing.assert_close(value.detach(), torch.tensor([0.12, 0.57]))
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [1, 1]


def test_an_error_inside_leaves_rounding_as_it_was() -> None:
    x = torch.rand(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="boom"), straight_through():
        raise RuntimeError("boom")
    assert not torch.autograd.grad(x.round().sum(), x)[0].any()


def test_a_module_that_changes_the_shape_cannot_be_gone_through() -> None:
    with pytest.raises(InputError, match=r"keeps the shape \[2, 3\], got \[2, 6\]"):
        StraightThrough(nn.Linear(3, 6))(torch.rand(2, 3))


def test_deepfool_goes_straight_through_rounding(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    model = with_transforms(trained, ["bit-depth-4"])
    right = model(judged[0]).argmax(1) == judged[1]
    x, y = judged[0][right][:8], judged[1][right][:8]
    behind = rx.System(model, CAM(model))
    attack = DeepFool(overshoot=0.5)
    assert not bool(attack(behind, x, y).success.any())
    found = attack.adapted(behind)(behind, x, y)
    assert float(found.success.float().mean()) >= 0.75
    # Each step looks at the logits and at their straight-through form; the last look ends it.
    assert set((found.queries[found.success] % 2).tolist()) == {1}
    with pytest.raises(InputError, match=r"adapt\.evade must be 0"):
        DeepFool(adapt=Adaptation(evade=1.0))


# --- in expectation over randomness ---


def test_the_gradient_of_several_draws_is_the_mean_of_each_draws(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    import copy

    model = copy.deepcopy(trained).double()
    x, y = judged[0][:3].double(), judged[1][:3]
    noisy = rx.System(model, SmoothGrad(model, samples=2, seed=5))
    goal = Goal(x, y, (y + 1) % 10, goal_map=torch.rand(3, *x.shape[2:], dtype=torch.float64))
    objective = Misclassify() + 500.0 * MatchMap()
    problem = StepContext(noisy, Linf(EPS), goal, objective, Streams.of(x, 0), 0.0, tick=7)
    found = GradientDirection(Softplus(), draws=3)(problem, x, check=False)
    gradients, losses = [], []
    for draw in range(3):
        other = noisy.redrawn(derive(7, "redraw", draw))
        leaf = x.clone().requires_grad_()
        with swapped(Softplus()):
            logits, maps, *_ = other.interpreter.explain(leaf, goal.goal_class, native=True)
        now, wanted = ((m - m.amin((1, 2), True)) / (m.amax((1, 2), True) - m.amin((1, 2), True))
                       for m in (maps, goal.goal_map))  # fmt: skip
        loss = -logits.log_softmax(1)[range(3), (y + 1) % 10] + 500 * (now - wanted).square().mean((1, 2))
        gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
        losses.append(loss.detach())
    torch.testing.assert_close(found.gradient, torch.stack(gradients).mean(0), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(0))
    assert found.queries == 3
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=0)


def test_averaging_over_draws_fools_a_smoothgrad_whose_seed_is_unknown(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:4], judged[1][:4]
    goal = random_classes(x, y, 10)
    deployed = SmoothGrad(trained, samples=1, seed=1234)
    guessed = rx.System(trained, replace(deployed, seed=0))

    def distance(image: Tensor, seed: int) -> float:
        smoothed = replace(deployed, seed=seed)
        with torch.no_grad():
            return float(L1()(smoothed(image, goal), smoothed(x)).mean())

    single = ADV2(0.125, steps=16, step_size=0.025, weight=50.0)
    one, six = (attack(guessed, x, y, goal) for attack in (single, replace(single, adapt=Adaptation(draws=6))))
    assert bool(one.success.all())
    assert bool(six.success.all())
    unseen = [sum(distance(found.x, seed) for seed in range(900, 916)) / 16 for found in (one, six)]
    print(
        f"L1: one draw {distance(one.x, 0):.4f} where guessed, {unseen[0]:.4f} unseen; six draws {unseen[1]:.4f} unseen"
    )
    assert distance(one.x, 0) < 0.9 * unseen[0], "one draw fits the guessed seed alone"
    assert unseen[1] < unseen[0]


def test_draws_of_a_system_in_which_nothing_is_random_are_refused(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:2], judged[1][:2]
    with pytest.raises(InputError, match=r"draws=3: nothing in this system or threat model is random"):
        ADV2(EPS, steps=4, adapt=Adaptation(draws=3))(rx.System(trained, CAM(trained)), x, y)


# --- what an adversary who knows the system does ---


def test_an_adaptation_sets_what_the_system_calls_for_and_nothing_that_is_set(
    trained: Classifier, quiet: Detector
) -> None:
    plain, noisy = rx.System(trained, CAM(trained)), rx.System(trained, VarGrad(trained))
    coarse, moved = (
        rx.System(model, CAM(model)) for model in (with_transforms(trained, [n]) for n in ("jpeg-75", "resize-pad-3"))
    )
    watched = replace(plain, detector=quiet)
    for attack in (PGD(), ADV2(), FGSM(), CW(), StAdv(), Dombrowski(), HidingPatch(), UAP()):
        assert attack.adapts
        assert attack.adapted(plain) is attack
        assert attack.adapted(noisy).adapt == Adaptation(draws=DRAWS)
        assert attack.adapted(coarse).adapt == Adaptation(straight=True)
        assert attack.adapted(moved).adapt == Adaptation(draws=DRAWS)
        evade = 1e3 if isinstance(attack, Dombrowski) else 1.0
        assert attack.adapted(watched).adapt == Adaptation(evade=evade)
        chosen = Adaptation(evade=0.3, draws=4, straight=True)
        assert replace(attack, adapt=chosen).adapted(replace(noisy, detector=quiet)).adapt == chosen
        # The undefended row of the same column has nothing to average over; a patch has its place.
        assert replace(attack, adapt=chosen).adapted(plain).adapt.draws == (4 if isinstance(attack, HidingPatch) else 1)
    assert Auto().adapted(plain) == Auto(), "its members adapt, when it attacks"
    assert not FeatureDeletion.adapts
    assert FeatureDeletion().adapted(coarse).adaptation == "nothing to adapt"
    assert DeepFool().adapted(replace(coarse, detector=quiet)).adapt == Adaptation(straight=True)
    assert PGD().adapted(replace(moved, detector=quiet)).adaptation == "detector in the loss, mean of 10 draws"


def test_against_mask_the_bilevel_search_needs_no_draws(trained: Classifier) -> None:
    shaken = rx.System(trained, Mask(trained))
    assert shaken.random
    assert ADV2().adapted(shaken) == ADV2()


def test_draws_that_the_loss_does_not_see_are_not_paid_for(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:3], judged[1][:3]
    noisy = rx.System(trained, SmoothGrad(trained, samples=2))
    plain = PGD(EPS, 5, 0.02)
    one, ten = plain(noisy, x, y), plain.adapted(noisy)(noisy, x, y)
    assert torch.equal(one.x, ten.x)
    assert torch.equal(one.queries, ten.queries)
    averaged = ADV2(EPS, steps=4, warm_start=0.5).adapted(noisy)(noisy, x, y)
    # Two steps on the prediction, two on five draws of two copies each, and two looks at the real system.
    assert averaged.queries.tolist() == [2 + 2 * 5 + 2] * 3


def test_restarts_see_other_draws(
    trained: Classifier, judged: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, redrawn = [], rx.System.redrawn

    def noted(self: rx.System, seed: int) -> rx.System:
        seeds.append(seed)
        return redrawn(self, seed)

    monkeypatch.setattr(rx.System, "redrawn", noted)
    model = with_transforms(trained, ["resize-pad-2"])
    x = judged[0][:2]
    PGD(1e-4, 3, 1e-4, restarts=2, adapt=Adaptation(draws=2))(system(model), x, model(x).argmax(1))
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 2


def test_a_detectors_own_evasion_comes_first(
    trained: Classifier, quiet: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def its_evasion(weight: float) -> Objective:
        return weight * EvadeDetector(threshold=0.7)

    watched = rx.System(trained, CAM(trained), quiet)
    assert evasion(2.0, watched).terms() == ((2.0, EvadeDetector(quiet.soft_threshold)),)
    monkeypatch.setattr(quiet, "evasion", its_evasion, raising=False)
    found = evasion(2.0, watched)
    assert found.terms() == ((2.0, EvadeDetector(threshold=0.7)),)


@pytest.mark.parametrize(("name", "eps"), [("bit-depth-2", 0.06), ("resize-pad-6", 0.15)])
def test_adaptive_pgd_beats_the_oblivious_one_behind_a_transform(
    name: str, eps: float, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    root = rx.System(trained, CAM(trained))
    defense = InputTransform([name])
    defended = defense(root)
    right = defended.model(judged[0]).argmax(1) == judged[1]
    x, y = judged[0][right][:24], judged[1][right][:24]
    goal = random_classes(x, y, 10)
    attack = PGD(eps, 20, eps / 5)
    oblivious = attack(defense.oblivious_view(defended, root), x, y, goal).x
    known = attack.adapted(defended)(defended, x, y, goal).x

    def reached(x: Tensor) -> float:
        # On draws that neither of them saw.
        systems = [defended.redrawn(seed) for seed in range(70, 76)]
        return sum(float((s.model(x).argmax(1) == goal).float().mean()) for s in systems) / len(systems)

    print(f"{name}: oblivious {reached(oblivious):.2f}, adaptive {reached(known):.2f}")
    assert reached(known) > reached(oblivious) + 0.1


# --- what a search says where it has no direction ---


def test_a_black_box_without_differences_does_not_speak_of_rectifiers(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    flat = nn.Sequential(trained, nn.Threshold(1e9, 0.0)).eval()
    attack = NES(EPS, samples=4, max_queries=12)
    with pytest.warns(ZeroDirectionWarning, match="every difference of two losses was zero") as warned:
        found = attack(system(flat), judged[0][:2], judged[1][:2])
    assert bool(found.zero_direction.all())
    assert not any(isinstance(w.message, ZeroMapGradientWarning) or "rectifiers" in str(w.message) for w in warned)
    gradient_system = rx.System(trained, Gradient(trained, of="logit"))
    wanted = torch.rand(2, *judged[0].shape[2:], generator=torch.Generator().manual_seed(0))
    with pytest.warns(ZeroMapGradientWarning, match="2 of 2 samples.*rectifiers"):
        ADV2(EPS, steps=2, surrogate="none")(gradient_system, judged[0][:2], judged[1][:2], goal_map=wanted)


@pytest.mark.parametrize("word", ["draws", "straight", "evade"])
def test_a_recipe_of_before_is_told_the_new_word(word: str) -> None:
    with pytest.raises(InputError, match=f"{word}: unknown key; it is called 'adapt.{word}' now"):
        make(ADV2, {word: 1}, "attacks[0]")
    assert make(ADV2, {"adapt": {"draws": 4}}, "attacks[0]").adapt == Adaptation(draws=4)
    with pytest.raises(InputError, match=r"attacks\[0\].adapt.draws"):
        make(ADV2, {"adapt": {"draws": 0}}, "attacks[0]")


def adaptable() -> list[str]:
    # ``auto`` adapts its members when it attacks: tests/attacks/test_auto.py.
    built = ((entry.name, entry.build) for entry in ATTACKS if getattr(entry.build, "adapts", False))
    return [name for name, build in built if any(f.name == "adapt" for f in fields(build))]


@pytest.mark.parametrize("name", adaptable())
def test_every_attack_that_adapts_runs_against_a_detector_and_a_classifier_that_draws_and_rounds(
    name: str, tiny_model: Classifier, grey: Tensor, quiet: Detector
) -> None:
    model = with_transforms(tiny_model, ["resize-pad-2", "bit-depth-5"])
    defended = rx.System(model, GradCAM(model), quiet)
    x = grey[:2]
    y = model(x).argmax(1)
    known = {"steps": 3, "search_steps": 2, "squeezed_steps": 2, "batch_size": 2, "adapt": Adaptation(draws=2)}
    built = ATTACKS.get(name).build()
    attack = replace(built, **{f.name: known[f.name] for f in fields(built) if f.name in known})
    attack = attack.adapted(defended)
    assert (attack.adapt.draws, attack.adapt.straight) == (2, True)
    attack = attack.fitted(defended, x, y) if attack.needs_data else attack
    found = attack(defended, x, y, None if attack.keeps_prediction else (y + 1) % 4)
    assert found.x.shape == x.shape
    assert bool(found.x.isfinite().all())
    # Two draws a step, and looks at the real system; what is fitted shows it nothing any more.
    assert built.needs_data or int(found.queries.min()) > 2
