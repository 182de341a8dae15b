"""What an epoch of each training costs beside the passes that its algorithm counts, written in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.attacks import ADV2, PGD, random_classes
from robustexplain.autograd.layers import captured
from robustexplain.autograd.second_derivatives import twice_differentiable
from robustexplain.defenses import (
    ATEX,
    CURE,
    ADV2Training,
    AdversarialSaliencyGuided,
    AdversarialTraining,
    AttributionRegularisers,
    DefensiveDistillation,
    EnsembleAdversarialTraining,
    FeatureDenoising,
    ImageAlignment,
    InputGradientPenalty,
    InterpretabilityTraining,
    ModelDefense,
    RankThickness,
    Retrained,
    SaliencyGuided,
    SelfExplaining,
    SmoothCurvature,
    SmoothSurface,
    Woods,
)
from robustexplain.defenses.models.inner_attacks import RandomFGSM
from robustexplain.interpreters import CAM
from robustexplain.objectives.confident import SPREAD
from tests.benchmarks.test_training_speed import BATCH, SETTINGS, epoch_over_counted

STEPS = 2
WITHIN = PGD(0.03, steps=STEPS, step_size=0.01, random_start=True)
FORGER = ADV2(0.03, steps=STEPS, step_size=0.01, warm_start=0.5)


@torch.no_grad()
def usual(name: str, seed: int = 0) -> nn.Module:
    """A network with logits of the size that a trained one has: tiny and huge ones cost an attack another pass."""
    model = models.build(name, seed=seed).eval().requires_grad_(False)
    logits = model(torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    model.get_submodule("net.linear").weight.mul_(SPREAD / (logits.amax(1) - logits.amin(1)).mean())  # type: ignore[operator, union-attr]
    return model


OTHER = usual("cifar-resnet20", seed=1)


@dataclass
class Passes:
    """A network in training, and the passes of the algorithms.

    Args:
        network: in the mode that the training has.
        before: the network as it was.
    """

    network: nn.Module
    before: nn.Module

    @contextmanager
    def still(self) -> Iterator[None]:
        """In eval mode, with weights that need no gradient."""
        mode = self.network.training
        self.network.eval().requires_grad_(False)
        yield
        self.network.train(mode).requires_grad_(True)

    def entropy(self, x: Tensor, y: Tensor) -> Tensor:
        """One pass forth."""
        return F.cross_entropy(self.network(x), y)

    def slopes(self, x: Tensor, y: Tensor, graph: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The cross-entropy, its input gradient and the input: one pass forth, one back."""
        given = x if x.requires_grad else x.detach().requires_grad_()
        loss = F.cross_entropy(self.network(given), y, reduction="sum")
        return loss / len(x), torch.autograd.grad(loss, given, create_graph=graph, retain_graph=graph)[0], given

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        """The input gradient alone."""
        with self.still():
            return self.slopes(x, y, graph=False)[1]

    def moved(self, x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
        """The steps of PGD, and a look at the last iterate."""
        at = x + 0.001
        with self.still():
            for _ in range(steps):
                at = (at + 0.01 * self.slopes(at, y, graph=False)[1].sign()).clamp(0, 1)
            with torch.no_grad():
                self.network(at)
        return at

    def raised(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The steps of an attack on a loss with input gradients in it, and two looks at the last iterate."""
        at = x + 0.001
        with self.still(), twice_differentiable():
            for _ in range(STEPS):
                at = at.detach().requires_grad_()
                at = at + 0.01 * torch.autograd.grad(loss(at), at)[0].sign()
            loss(at.detach().requires_grad_())
            with torch.no_grad():
                self.network(at)
        return at.detach()


def adversarial(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    return p.entropy(p.moved(x, y), y)


def squared(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    loss, slope, _ = p.slopes(x, y)
    return loss + slope.square().sum()


def curved(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    loss, slope, given = p.slopes(x, y)
    return loss + torch.autograd.grad((slope * torch.randn_like(x)).sum(), given, create_graph=True)[0].square().sum()


def surface(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    given = x.clone().requires_grad_()
    logits = p.network(given)
    columns = [torch.autograd.grad(logits[:, k].sum(), given, create_graph=True)[0] for k in range(3)]
    return F.cross_entropy(logits, y) + torch.stack(columns).square().sum()


def ranked(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    (loss, own, _), (_, other, _) = p.slopes(x, y), p.slopes(x + 0.001, y)
    return loss + own.abs().sum() + (other - own).square().sum()


def cured(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    return squared(p, torch.cat([x, x + 0.01 * p.slope(x, y).sign()]), torch.cat([y, y]))


def two(p: Passes, x: Tensor) -> tuple[Tensor, Tensor]:
    given = x if x.requires_grad else x.detach().requires_grad_()
    logits = p.network(given)
    label, rival = (torch.autograd.grad(logits[:, k].sum(), given, create_graph=True)[0] for k in (0, 1))
    return logits, (label - rival).square().sum()


def aligned(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    p.slope(x, y)
    logits, distance = two(p, torch.cat([x, p.raised(x, lambda at: two(p, at)[1])]))
    return F.cross_entropy(logits[len(x) :], y) + distance


def regularised(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    at = p.raised(x, lambda at: sum(part.abs().sum() for part in p.slopes(at, y)[:2]))  # type: ignore[arg-type, return-value]
    loss, last, _ = p.slopes(at, y)
    own, wrong = two(p, torch.cat([0.5 * at, at]))
    _, base, _ = p.slopes(torch.cat([0.5 * x, x]), torch.cat([y, y]))
    _, change, _ = p.slopes(0.5 * (x + at), y)
    return loss + own.square().sum() + wrong + base.abs().sum() + (change + last).abs().sum()


def guided(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    p.slope(x, y)
    return p.entropy(torch.cat([x, x]), torch.cat([y, y]))


def adversarially_guided(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    p.slope(p.moved(x, y), y)
    return p.entropy(torch.cat([x, x, x]), torch.cat([y, y, y]))


def across(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    p.slope(x, y), p.slope(x, y)
    with torch.no_grad():
        p.before(torch.cat([x, x]))
    return p.entropy(torch.cat([x, x]), torch.cat([y, y]))


def controlled(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    return squared(p, p.moved(x, y), y)


def steady_cams(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    def maps(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with captured(p.network, ["net.layer3"]) as outputs:
            logits = p.network(inputs)
        return logits, torch.einsum(
            "kc,bchw->bkhw", p.network.get_submodule("net.linear").weight, outputs["net.layer3"]
        )  # type: ignore[arg-type]

    with p.still():
        with torch.no_grad():
            benign = maps(x)[1]
        at = x + 0.001
        for _ in range(STEPS):
            at = at.detach().requires_grad_()
            at = at + 0.01 * torch.autograd.grad((maps(at)[1] - benign).abs().sum(), at)[0].sign()
        with torch.no_grad():
            maps(at)
    logits, found = maps(torch.cat([x, at.detach()]))
    return F.cross_entropy(logits[: len(x)], y) + (found[: len(x)] - found[len(x) :]).abs().sum()


def forged(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    goal = random_classes(x, y, 10)
    with p.still():
        moved = FORGER(rx.System(p.network, CAM(p.network)), x, y, goal).x
    logits, maps, *_ = CAM(p.network).explain(torch.cat([x, moved]), torch.cat([y, y]))
    return F.cross_entropy(logits, torch.cat([y, y])) + maps.square().mean()


def of_another(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        p.before(x)
    at = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(p.before(at), y), at)
    with torch.no_grad():
        p.before(at)
    return p.entropy(torch.cat([x, at.detach()]), torch.cat([y, y]))


def distilled(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    p.entropy(x, y).backward()
    with torch.no_grad():
        p.before(x)
    return p.entropy(x, y)


def explaining(p: Passes, x: Tensor, y: Tensor) -> Tensor:
    with captured(p.network, ["net.concepts", "net.parametriser"]) as outputs:
        logits = p.network(x.clone().requires_grad_())
    slope = torch.autograd.grad(logits[:, 0].sum(), outputs["net.concepts"], create_graph=True)[0]
    return (
        F.cross_entropy(logits, y) + (outputs["net.parametriser"].flatten(1)[:, :1] - slope.flatten(1)).square().sum()
    )


Mode = Literal["eval", "train"]
CASES: dict[str, tuple[ModelDefense, Callable[[Passes, Tensor, Tensor], Tensor], Mode]] = {
    "adv2-at": (ADV2Training(interpreters=("cam",), attack=FORGER), forged, "eval"),
    "art": (ImageAlignment(attack=WITHIN, softplus=None), aligned, "eval"),
    "asgt": (AdversarialSaliencyGuided(attack=WITHIN), adversarially_guided, "train"),
    "atex": (ATEX(samples=2, draws=2), across, "eval"),
    "attribution-regularisers": (AttributionRegularisers(attack=WITHIN, points=2, inner_points=1), regularised, "eval"),
    "cure": (CURE(), cured, "eval"),
    "distillation": (DefensiveDistillation(), distilled, "train"),
    "ensemble-at": (EnsembleAdversarialTraining((), networks=(OTHER,), attack=RandomFGSM(0.03)), of_another, "train"),
    "feature-denoising": (FeatureDenoising(attack=WITHIN, filter="mean"), adversarial, "train"),
    "input-gradient-penalty": (InputGradientPenalty(), squared, "eval"),
    "int": (InterpretabilityTraining(attack=WITHIN, ramp=(0, 0)), steady_cams, "eval"),
    "pgd-at": (AdversarialTraining(WITHIN), adversarial, "train"),
    "r2et": (RankThickness(softplus=None, k=50), ranked, "eval"),
    "retrained": (Retrained(), Passes.entropy, "train"),
    "saliency-guided": (SaliencyGuided(), guided, "train"),
    "senn": (SelfExplaining(classes=1), explaining, "train"),
    "smooth-curvature": (SmoothCurvature(softplus=None, score="cross_entropy"), curved, "eval"),
    "ssr": (SmoothSurface(classes=3), surface, "eval"),
    "woods": (Woods(attack=replace(WITHIN, norm="l2", eps=1.0), attacked_share=1.0, delta=None), controlled, "eval"),
}  # fmt: skip


@pytest.mark.benchmark
@pytest.mark.parametrize("name", CASES)
def test_an_epoch_of_a_training_costs_its_counted_passes(name: str) -> None:
    made, loss, mode = CASES[name]
    model = usual("cifar-resnet20")
    x, y = torch.rand(2 * BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(2 * BATCH) % 10
    data, short = TensorDataset(x, y), with_epochs(made, 1)
    long = with_epochs(made, 3)
    # Blocks and concepts are parts of the network that is trained.
    network = short.hardened(model, data).train(getattr(made, "norms", mode) == "train").requires_grad_(True)
    passes = Passes(network, copy.deepcopy(model))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def counted() -> None:
        for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            loss(passes, some, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert epoch_over_counted(lambda: short.hardened(model, data), lambda: long.hardened(model, data), counted) <= 1.15


def with_epochs(defense: Any, epochs: int) -> ModelDefense:
    """The defense with the settings of all measurements."""
    made: ModelDefense = replace(defense, training=replace(SETTINGS, epochs=epochs))
    return made
