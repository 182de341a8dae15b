"""What an epoch of a defense that attacks in training costs beside the attack and the passes that it counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.attacks import ADV2, PGD
from robustexplain.autograd.second_derivatives import twice_differentiable
from robustexplain.defenses import (
    TRADES,
    ConsistentAID,
    FineTuned,
    GradientAlignment,
    Revealing,
    RobustAttribution,
)
from robustexplain.defenses.models.inner_attacks import Divergence
from robustexplain.interpreters import CAM, RTS, MaskingModel
from robustexplain.interpreters.masks.rts_training import mask_loss
from robustexplain.random_streams import Streams
from robustexplain.training import Training

from .test_attack_speed import Run, ratios, retried

ATTACK = ADV2(0.03, steps=10, step_size=0.006, warm_start=0.5)
BATCH = 32
SETTINGS = Training(epochs=1, batch_size=BATCH, lr=1e-4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """CIFAR's ResNet-20, random weights."""
    return models.build("cifar-resnet20", seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    x = torch.rand(2 * BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(2 * BATCH) % 10


def epoch_over_counted(train: Run, train_long: Run, counted: Run) -> float:
    """An epoch's time over that of the counted passes; what is paid once a training is left out."""

    def measure() -> dict[str, float]:
        found = ratios({"counted": counted, "short": train, "long": train_long}, "counted", rounds=3)
        return {"epoch": (found["long"] - found["short"]) / 2, "one epoch in all": found["short"]}

    return retried(measure, lambda r: r["epoch"] <= 1.15)["epoch"]


@pytest.mark.benchmark
def test_an_epoch_of_revealing_costs_its_counted_passes(model: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    data, honest = TensorDataset(x, y), copy.deepcopy(model)
    short = Revealing(("cam",), attack=ATTACK, training=SETTINGS)
    long = replace(short, training=replace(SETTINGS, epochs=3))
    trained = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)

    def counted() -> None:
        # The attack; the honest outputs of two inputs; one pass of three inputs with maps, and back to the weights.
        for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            goal = (labels + 1) % 10
            trained.requires_grad_(False)
            forged = ATTACK(rx.System(trained, CAM(trained)), some, labels, goal).x
            trained.requires_grad_(True)
            with torch.no_grad():
                honest(torch.cat([some, some]))
            logits, maps, *_ = CAM(trained).explain(torch.cat([some, forged, some]), torch.cat([labels, goal, labels]))
            (maps.square().mean() + nn.functional.cross_entropy(logits[:BATCH], labels)).backward()
            optimizer.step()
            optimizer.zero_grad()

    ratio = epoch_over_counted(lambda: short.hardened(model, data), lambda: long.hardened(model, data), counted)
    assert ratio <= 1.15


@pytest.mark.benchmark
def test_an_epoch_of_consistent_aid_costs_its_counted_passes(model: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    data = TensorDataset(x, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        masker = MaskingModel.around(copy.deepcopy(model), x, width=16).eval()
    short = ConsistentAID(attack=ATTACK, training=SETTINGS)
    long, system = replace(short, training=replace(SETTINGS, epochs=3)), rx.System(model, RTS(model, masker))
    trained = copy.deepcopy(masker).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)

    def counted() -> None:
        # The attack; one pass of three inputs through the interpreter's network; the terms of eq. 8 on one mask.
        for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            goal = (labels + 1) % 10
            trained.requires_grad_(False)
            forged = ATTACK(rx.System(model, RTS(model, trained)), some, labels, goal).x
            trained.requires_grad_(True)
            masks, logits = trained(torch.cat([some, forged, some]), torch.cat([labels, goal, labels]))
            streams = Streams.of(some, 0)
            loss = mask_loss(model, short.objective, 1.0, some, labels, masks[:BATCH], logits[:BATCH], streams)
            (loss.mean() + masks.square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert epoch_over_counted(lambda: short(system, data), lambda: long(system, data), counted) <= 1.15


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["aga", "rar"])
def test_an_epoch_of_a_loss_on_input_gradients_costs_its_counted_passes(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    data, trained = TensorDataset(x, y), copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)
    pgd = PGD(0.03, steps=4, step_size=0.01, random_start=True)
    short: FineTuned = GradientAlignment(softplus=None, training=SETTINGS)
    if name == "rar":
        short = RobustAttribution(attack=pgd, points=3, inner_points=2, task="attacked", training=SETTINGS)
    long = replace(short, training=replace(SETTINGS, epochs=3))

    def slopes(inputs: Tensor, labels: Tensor, graph: bool = True) -> tuple[Tensor, Tensor]:
        """Logits and input gradients: one pass forth, one back."""
        given = inputs if inputs.requires_grad else inputs.clone().requires_grad_()
        logits = trained(given)
        score = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return logits, torch.autograd.grad(score, given, create_graph=graph, retain_graph=True)[0]

    def aga(some: Tensor, labels: Tensor) -> Tensor:
        logits, own = slopes(some, labels, graph=False)
        _, other = slopes(some + 0.01, labels)
        return nn.functional.cross_entropy(logits, labels) + (own - other).square().mean()

    def path(start: Tensor, end: Tensor, labels: Tensor, points: int) -> Tensor:
        between = torch.cat([start + (k + 1) / points * (end - start) for k in range(points)])
        logits, found = slopes(between, labels.repeat(points))
        lengths = (found.unflatten(0, (points, -1)).mean(0) * (end - start)).abs().mean()
        return nn.functional.cross_entropy(logits[-BATCH:], labels) + lengths

    def rar(some: Tensor, labels: Tensor) -> Tensor:
        moved = some + 0.01
        trained.requires_grad_(False)
        with twice_differentiable():
            for _ in range(4):
                moved = moved.detach().requires_grad_()
                moved = moved + 0.01 * torch.autograd.grad(path(some, moved, labels, 2), moved)[0].sign()
            # The last iterate is looked at once, by its loss and by its prediction.
            path(some, moved.detach().requires_grad_(), labels, 2)
            with torch.no_grad():
                trained(moved)
        trained.requires_grad_(True)
        return path(some, moved.detach(), labels, 3)

    def counted() -> None:
        for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            {"aga": aga, "rar": rar}[name](some, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    ratio = epoch_over_counted(lambda: short.hardened(model, data), lambda: long.hardened(model, data), counted)
    assert ratio <= 1.15


@pytest.mark.benchmark
def test_an_epoch_of_trades_costs_its_counted_passes(model: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    (x, y), steps = samples, 4
    data = TensorDataset(x, y)
    short = TRADES(attack=Divergence(0.03, steps=steps, step_size=0.01), training=SETTINGS)
    long = replace(short, training=replace(SETTINGS, epochs=3))
    trained = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)
    entropy = nn.functional.cross_entropy

    def counted() -> None:
        # The answers of x, the steps of the attack, one pass of two inputs.
        for some, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            trained.requires_grad_(False)
            with torch.no_grad():
                trained(some)
            for _ in range(steps):
                at = some.detach().requires_grad_()
                torch.autograd.grad(entropy(trained(at), labels, reduction="sum"), at)
            trained.requires_grad_(True)
            entropy(trained(torch.cat([some, some])), torch.cat([labels, labels])).backward()
            optimizer.step()
            optimizer.zero_grad()

    ratio = epoch_over_counted(lambda: short.hardened(model, data), lambda: long.hardened(model, data), counted)
    assert ratio <= 1.15
