"""Attacks inside of losses, and the defenses that train the classifier on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import PGD
from robustexplain.attacks.inner import crafted
from robustexplain.data import Data, Samples, stack, subset, take
from robustexplain.defenses import Aggregate, ModelDefense
from robustexplain.defenses.models import AdversarialTraining
from robustexplain.defenses.models.adversarial import AdversarialLoss
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import RTS, GradCAM, Gradient, MaskingModel
from robustexplain.models import Classifier
from robustexplain.random_streams import derive
from robustexplain.system import Detector
from robustexplain.training import Session, Training, TrainingStep, histories

EPS = 0.06
WITHIN = PGD(EPS, steps=4, step_size=0.025, random_start=True)
NOW = TrainingStep(3, 1, 0.5)


def plain(model: nn.Module) -> rx.System:
    return rx.System(model, Gradient(model))


# --- an attack inside of a loss ---


def in_training(trained: Classifier) -> Classifier:
    """A model whose parts are in different modes, and some of whose weights are frozen."""
    model = copy.deepcopy(trained).train()
    model.net.features[1].eval()
    model.net.head.bias.requires_grad_(False)
    return model


def test_the_network_is_as_it_was_after_an_attack_and_after_an_error(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    model = in_training(trained)
    modes = [part.training for part in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(set(modes)) == len(set(flags)) == 2

    @dataclass(frozen=True)
    class Failing(PGD):
        def plan(self, system: rx.System) -> object:  # type: ignore[override]
            assert not any(part.training for part in system.model.modules())
            assert not any(p.requires_grad for p in system.model.parameters())
            raise KeyboardInterrupt

    attacked, goal = crafted(WITHIN, model, plain, x, y, NOW)
    with pytest.raises(KeyboardInterrupt):
        crafted(Failing(), model, plain, x, y, NOW)
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not attacked.requires_grad
    assert torch.equal(goal, y)
    assert torch.equal(attacked, replace(WITHIN, seed=derive(NOW.seed, NOW.epoch))(plain(trained), x, y).x)


def test_what_is_crafted_is_not_judged(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y, model, seen = judged[0][:6], judged[1][:6], copy.deepcopy(trained), []
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    made, _ = crafted(WITHIN, model, plain, x, y, NOW)
    assert seen.count(6) == WITHIN.steps + 1, "the steps, and a look at the last iterate"
    seen.clear()
    same = replace(WITHIN, seed=derive(NOW.seed, NOW.epoch))(plain(model.eval()), x, y)
    assert seen.count(6) == WITHIN.steps + 2
    assert torch.equal(made, same.x)


def test_what_is_crafted_depends_on_epoch_and_input_alone(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    model = copy.deepcopy(trained).double().train()
    x, y = judged[0][:6].double(), judged[1][:6]
    whole, goal = crafted(WITHIN, model, plain, x, y, NOW, targeted=True)
    order = torch.tensor([4, 0, 5])
    some, some_goal = crafted(WITHIN, model, plain, x[order], y[order], replace(NOW, progress=0.9), targeted=True)
    assert torch.equal(goal[order], some_goal)
    assert not bool((goal == y).any())
    torch.testing.assert_close(some, whole[order], rtol=0, atol=1e-9)
    later, _ = crafted(WITHIN, model, plain, x, y, replace(NOW, epoch=2), targeted=True)
    assert not torch.equal(later, whole)


def test_an_attack_inside_of_a_loss_goes_through_rounding_in_front_of_the_model(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    model = trained.with_transforms(["bit-depth-2"])
    x, y = judged[0][:6], judged[1][:6]
    moved, _ = crafted(replace(WITHIN, random_start=False), model, plain, x, y, NOW)
    assert bool(((moved - x).flatten(1).abs().amax(1) > 0).all())


# --- adversarial training ---


def test_pgd_fools_an_adversarially_trained_model_far_less_often_at_little_clean_accuracy(
    trained: Classifier, digits: Data
) -> None:
    x, y = stack(take(digits.test, 120))
    defense = AdversarialTraining(WITHIN, Training(epochs=5, batch_size=32, lr=1e-2))
    before = plain(trained)
    after = defense(before, take(digits.train, 448))
    attack = PGD(EPS, steps=20, step_size=0.01, random_start=True, seed=1)
    success = [float(attack(system, x, y).success.double().mean()) for system in (before, after)]
    accuracy = [float((system.model(x).argmax(1) == y).double().mean()) for system in (before, after)]
    print(f"PGD succeeds on {success[0]:.0%}, after training on {success[1]:.0%}")
    print(f"clean accuracy {accuracy[0]:.0%}, after training {accuracy[1]:.0%}")
    assert success[0] > 0.9
    assert success[1] < 0.4
    assert accuracy[1] > accuracy[0] - 0.05


def test_its_loss_is_that_of_both_kinds_of_inputs(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    model = copy.deepcopy(trained).eval()
    forged, _ = crafted(WITHIN, model, plain, x, y, NOW)
    clean, attacked = (nn.functional.cross_entropy(model(v), y, reduction="none") for v in (x, forged))
    assert float(attacked.mean()) > 2 * float(clean.mean())
    for weight in (0.0, 0.3):
        found = AdversarialLoss(attack=WITHIN, model=model, clean_weight=weight)(model, x, y, NOW)
        torch.testing.assert_close(found, weight * clean + (1 - weight) * attacked, rtol=1e-4, atol=1e-5)


def test_it_can_keep_the_epoch_of_the_best_robust_accuracy_and_begin_anew(
    trained: Classifier, digits: Data, tmp_path: Path
) -> None:
    settings = Training(epochs=2, batch_size=32, lr=1e-2, validation=0.25, label_smoothing=0.1)
    defense = AdversarialTraining(replace(WITHIN, steps=1), settings, fresh=True)
    model = defense.hardened(trained, take(digits.train, 96), Session(folder=tmp_path))
    figures = [record["figures"] for record in histories(tmp_path)["pgd-at"]]
    assert [set(f) for f in figures] == [{"accuracy", "robust_accuracy"}] * 2
    assert not any(p.requires_grad for p in model.parameters())
    x, y = stack(take(digits.test, 60))
    right = [float((m(x).argmax(1) == y).double().mean()) for m in (model, trained)]
    assert right[0] < 0.6 < right[1], "two epochs from random weights are not enough"
    with pytest.raises(UnsupportedModelError, match="fresh weights need a model that robustexplain"):
        defense.hardened(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval(), digits.train)
    with pytest.raises(InputError, match="needs data"):
        defense.hardened(trained, subset(digits.train, []))


# --- the contract of defenses of models ---


@dataclass(frozen=True)
class Doubled(ModelDefense):
    """Doubles every weight."""

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        assert all(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        return model


def test_the_interpreter_and_all_it_is_made_of_are_put_on_the_hardened_model(trained: Classifier, digits: Data) -> None:
    before = rx.System(trained, Aggregate(trained, (Gradient(trained), GradCAM(trained))))
    after = Doubled()(before, digits.train)
    assert isinstance(after.interpreter, Aggregate)
    assert {id(member.model) for member in after.interpreter.members} == {id(after.model)}
    pairs = zip(trained.parameters(), after.model.parameters(), strict=True)
    assert all(torch.equal(2 * a, b) for a, b in pairs)
    assert Doubled.part == "train"


def test_what_was_made_for_the_model_as_it_was_is_refused(
    trained: Classifier, digits: Data, quiet: Detector, judged: tuple[Tensor, Tensor]
) -> None:
    watched = rx.System(trained, GradCAM(trained), quiet)
    with pytest.raises(UnsupportedModelError, match="detector watches the model as it was; harden the model first"):
        Doubled()(watched, digits.train)
    rts = RTS(trained, MaskingModel.around(copy.deepcopy(trained), judged[0], width=4, levels=2).eval())
    for interpreter in (rts, Aggregate(trained, (Gradient(trained), rts))):
        with pytest.raises(UnsupportedModelError, match="RTS was trained for the model as it was; train another"):
            Doubled()(rx.System(trained, interpreter), digits.train)
