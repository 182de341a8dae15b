"""The frame of the trainings that fine-tune a classifier: what they share, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import maximised
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.data import Data, stack, take
from robustexplain.defenses import Retrained
from robustexplain.defenses.models.fine_tuned import FineTuned, refuse_no_room
from robustexplain.defenses.models.input_gradients import classified, gradient, runner_up, score
from robustexplain.defenses.models.loss_module import HardeningLoss, LossModule, Smoothed
from robustexplain.errors import InputError
from robustexplain.models import Classifier
from robustexplain.training import Session, Training, TrainingStep

NOW = TrainingStep(3, 1, 0.5)


@dataclass(frozen=True)
class FlatLoss(HardeningLoss):
    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        given, logits = classified(network, x)
        return self.task(logits, y) + gradient(score(logits, y, "label"), given).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Flat(FineTuned):
    """Cross-entropy and the squared gradient of the label's logit."""

    attack: PGD = field(default_factory=PGD)
    training: Training = field(default_factory=lambda: Training(epochs=1, batch_size=20, lr=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return FlatLoss(network)


def squares(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(loss, x).square().sum()


@pytest.mark.parametrize("beta", [None, 3.0])
def test_a_loss_on_input_gradients_is_differentiated_in_one_pass(
    beta: float | None, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    model = copy.deepcopy(trained).double()
    x, y = judged[0][:3].double(), judged[1][:3]
    network = model if beta is None else Smoothed(model, beta)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found = FlatLoss(network)(LossModule(model, network), x, y, NOW)
    assert len(passes) == 1
    found.sum().backward()
    weight = next(p for p in model.parameters() if p.dim() > 1)
    assert weight.grad is not None
    for i in range(3):
        smooth = swapped(Softplus(beta)) if beta else torch.enable_grad()
        with smooth:
            flat = squares(lambda z, c=int(y[i]): model(z)[0, c], x[i : i + 1])  # type: ignore[misc]
            task = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        torch.testing.assert_close(found[i], task + flat)
    # A finite difference in one weight.
    index = tuple(int(v) for v in (weight.grad.abs() == weight.grad.abs().max()).nonzero()[0])
    sums = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            next(p for p in moved.parameters() if p.dim() > 1)[index] += step
        other = moved if beta is None else Smoothed(moved, beta)
        sums.append(float(FlatLoss(other)(LossModule(moved, other), x, y, NOW).sum().detach()))
    assert (sums[0] - sums[1]) / 2e-6 == pytest.approx(float(weight.grad[index]), rel=1e-4)


def test_what_is_frozen_smoothed_or_normalised_is_one_setting_for_all(
    trained: Classifier, digits: Data, few: Dataset[Any]
) -> None:
    plain = Flat().hardened(trained, few)
    before, after = trained.state_dict(), plain.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if "running" in n)
    assert not torch.equal(before["net.head.weight"], after["net.head.weight"])
    frozen = Flat(training=replace(Flat().training, freeze=("net.features",)), norms="train").hardened(trained, few)
    same = {n for n, value in frozen.state_dict().items() if torch.equal(before[n], value)}
    assert {n for n in before if ".features." in n} <= same
    assert "net.head.weight" not in same
    moved = Flat(norms="train").hardened(trained, few).state_dict()
    assert not any(torch.equal(before[n], moved[n]) for n in before if "running_mean" in n)
    # With a softplus it is another training, and what comes out is a network of rectifiers.
    soft = Flat(softplus=2.0).hardened(trained, few)
    assert not torch.equal(soft.state_dict()["net.head.weight"], after["net.head.weight"])
    assert type(soft) is type(trained)
    x = stack(take(digits.test, 4))[0]
    plain_logits = soft(x)
    with swapped(Softplus(2.0)):
        assert not torch.allclose(soft(x), plain_logits), "its rectifiers are still there"
    chosen = Training(epochs=1, batch_size=20, lr=1e-3, validation=0.3, label_smoothing=0.1)
    assert isinstance(Flat(training=chosen, softplus=2.0).hardened(trained, few, Session()), nn.Module)


def test_the_control_is_trained_as_what_it_stands_beside(trained: Classifier, few: Dataset[Any]) -> None:
    brief, before = Flat().training, trained.state_dict()
    found = [
        control.hardened(trained, few).state_dict()
        for control in (Retrained(brief), Retrained(brief, "eval"), Retrained(brief, "eval", 2.0))
    ]
    means = [n for n in before if "running_mean" in n]
    assert [all(torch.equal(before[n], state[n]) for n in means) for state in found] == [False, True, True]
    heads = [state["net.head.weight"] for state in (before, *found)]
    assert not any(torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    anew = Retrained(brief, "eval", fresh=True).hardened(trained, few).state_dict()["net.head.weight"]
    assert float((anew - heads[0]).abs().mean()) > 3 * float((heads[2] - heads[0]).abs().mean())


def test_an_inner_attack_raises_a_loss_of_input_gradients_and_keeps_samples_apart(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    model = copy.deepcopy(trained).double().train()
    network = Smoothed(model, 3.0)
    x, y = judged[0][:5].double(), judged[1][:5]
    order = torch.tensor([4, 0, 2])

    def moved(rows: Tensor) -> Tensor:
        start, logits = classified(network.eval(), x[rows])
        known = gradient(score(logits, y[rows], "label"), start).detach()

        def apart(net: nn.Module, z: Tensor, out: Tensor) -> Tensor:
            now = gradient(score(out, y[rows], "label"), z)
            return 1 - torch.cosine_similarity(now.flatten(1), known.flatten(1))

        network.train()
        found = maximised(PGD(0.1, 6, 0.03, random_start=True), network, apart, x[rows], y[rows], NOW)
        assert all(part.training for part in network.modules())
        given, out = classified(network.eval(), found)
        assert float((found - x[rows]).abs().max()) <= 0.1 + 1e-9
        gains.append(apart(network, given, out).detach())
        return found

    gains: list[Tensor] = []
    whole, some = moved(torch.arange(5)), moved(order)
    torch.testing.assert_close(some, whole[order], rtol=0, atol=1e-9)
    assert float(gains[0].min()) > 0.05
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match=r"one number a sample, \[5\], got \[\]"):
        maximised(PGD(0.1, 1), network, lambda net, z, out: out.sum(), x, y, NOW)


def test_what_is_differentiated_is_named(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    given, logits = classified(trained, judged[0][:4])
    y = logits.argmax(1)
    second = logits.topk(2, 1).indices[:, 1]
    assert torch.equal(runner_up(logits, y), second)
    assert torch.equal(score(logits, y, "runner_up"), logits.topk(2, 1).values[:, 1])
    found = gradient(score(logits, y, "label"), given, graph=False)
    assert not found.requires_grad
    assert torch.equal(found, gradient(score(logits, y, "label"), given).detach())


class Spread(nn.Module):
    """A linear classifier whose logits differ by about ``spread``; it notes the sizes of the batches that it sees."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3)[:, None] * torch.full((1, 64), spread / 64))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize(("spread", "sloped", "passes"), [(16, False, 4), (16, True, 5), (90, False, 5)])
def test_an_inner_attack_takes_the_passes_of_its_steps_and_a_look_at_the_last_iterate(
    spread: float, sloped: bool, passes: int
) -> None:
    # One more for a loss of input gradients, of which the look has no graph, and for logits of a size to be looked at.
    model, x = Spread(spread).eval(), torch.full((7, 1, 8, 8), 0.5)
    pgd = PGD(0.1, steps=3, step_size=0.05, random_start=True)
    for _ in range(2):  # the first call has a look at the model besides
        model.seen.clear()
        maximised(pgd, model, lambda _, moved, logits: logits[:, 0], x, torch.zeros(7).long(), NOW, sloped=sloped)
    assert model.seen.count(7) == passes
