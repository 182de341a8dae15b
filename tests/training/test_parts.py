"""Frozen layers, factors of the learning rate, balanced classes: what they change, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import models
from robustexplain.attacks import PGD
from robustexplain.defenses import AdversarialTraining
from robustexplain.errors import InputError, UnknownNameError
from robustexplain.recipe.experiment import Model
from robustexplain.schema import make
from robustexplain.training import Session, Training, TrainingStep, cross_entropy, fit

ONE = Training(
    epochs=1, batch_size=60, lr=0.1, optimizer="sgd", momentum=0.0, weight_decay=0, schedule="constant", clip=0
)
"""One step of plain gradient descent on all samples."""


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
        return nn.Sequential(body, nn.Tanh(), nn.Linear(8, 3))


def points() -> TensorDataset:
    """Sixty points: forty of class 0, fifteen of class 1, five of class 2."""
    y = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + y[:, None]
    return TensorDataset(x, y)


def trained(settings: Training, **options: object) -> nn.Sequential:
    module = net()
    fit(module, cross_entropy, points(), settings, name="net", **options)  # type: ignore[arg-type]
    return module


def moved(settings: Training) -> dict[str, Tensor]:
    """How far each tensor is from where it began."""
    before, after = net().state_dict(), trained(settings).state_dict()
    return {name: (after[name] - before[name]).double() for name in before}


def test_frozen_modules_keep_weights_and_statistics_and_the_rest_is_trained() -> None:
    settings = Training(epochs=2, batch_size=20, micro_batch=10, lr=0.05, freeze=("0",))
    found = moved(settings)
    assert {name for name, change in found.items() if change.any()} == {"2.weight", "2.bias"}
    assert all(p.requires_grad for p in trained(settings).parameters()), "flags are as they were"
    assert moved(replace(settings, freeze=()))["0.1.running_mean"].any()


def test_a_frozen_part_gives_in_training_what_it_gives_afterwards() -> None:
    seen: list[tuple[bool, bool]] = []

    def watched(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        assert isinstance(module, nn.Sequential)
        seen.append((module[0][1].training, module.training))  # type: ignore[index]
        return cross_entropy(module, x, y, step)

    fit(net(), watched, points(), replace(ONE, epochs=2, freeze=("0.1",)), name="net")
    assert seen == [(False, True)] * 2


def test_the_learning_rate_is_multiplied_under_the_longest_name_that_fits() -> None:
    plain = moved(ONE)
    found = moved(replace(ONE, lr_factors={"0": 0.5, "0.3": 0.1, "2.bias": 3.0}))
    for name, factor in {"0.0.weight": 0.5, "0.1.bias": 0.5, "0.3.weight": 0.1, "2.weight": 1.0, "2.bias": 3.0}.items():
        torch.testing.assert_close(found[name], factor * plain[name], rtol=1e-3, atol=2e-7)


def test_groups_resume_and_a_factor_of_one_changes_no_bit(tmp_path: Path) -> None:
    settings = Training(epochs=3, batch_size=20, lr_factors={"0": 0.3}, freeze=("0.3",))
    whole = trained(settings)

    def killed(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        if step.epoch == 2:
            raise KeyboardInterrupt
        return cross_entropy(module, x, y, step)

    with pytest.raises(KeyboardInterrupt):
        fit(net(), killed, points(), settings, name="net", session=Session(folder=tmp_path), identity="points")
    resumed = trained(settings, session=Session(folder=tmp_path), identity="points")
    same = [(whole, resumed), (trained(ONE), trained(replace(ONE, lr_factors={"0": 1.0})))]
    for a, b in same:
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_balanced_classes_weigh_as_scikit_learn_says() -> None:
    x, y = points().tensors
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=y.numpy())).float()
    reference = net().train()
    (nn.functional.cross_entropy(reference(x), y, reduction="none") * weights[y]).mean().backward()
    found = moved(replace(ONE, class_weights="balanced"))
    for name, p in reference.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], (-0.1 * p.grad).double(), rtol=1e-3, atol=2e-7)


def test_adversarial_training_freezes_parts_too() -> None:
    model = models.build("small-cnn", num_classes=3, in_channels=1)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = Training(
        epochs=1, batch_size=6, freeze=("net.features",), lr_factors={"net.head": 0.5}, class_weights="balanced"
    )
    defense = AdversarialTraining(attack=PGD(0.05, steps=1), training=settings)
    found = defense.hardened(model.eval(), TensorDataset(x, torch.arange(12) % 3), Session())
    same = {name: torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items()}
    assert all(kept for name, kept in same.items() if name.startswith("net.features."))
    assert not same["net.head.weight"]


def test_a_recipe_writes_them_as_lists_and_mappings() -> None:
    entry = {
        "name": "small-cnn",
        "train": {"freeze": ["a.b"], "lr_factors": {"b": 0.1, "a": 2}, "class_weights": "balanced"},
    }
    settings = make(Model, entry, "model").train
    assert settings == Training(freeze=("a.b",), lr_factors={"a": 2, "b": 0.1}, class_weights="balanced")
    assert hash(settings) == hash(
        Training(freeze=("a.b",), lr_factors=(("b", 0.1), ("a", 2)), class_weights="balanced")
    )
    assert asdict(settings)["lr_factors"] == (("a", 2), ("b", 0.1))
    for key, value in {"lr_factors": {"a": "fast"}, "class_weights": "even", "freeze": "a"}.items():
        with pytest.raises(InputError, match=rf"model\.train\.{key}"):
            make(Model, {"name": "small-cnn", "train": {key: value}}, "model")


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: trained(replace(ONE, freeze=("0.33",))), "unknown layer '0.33'; did you mean '0.3'"),
        (lambda: trained(replace(ONE, lr_factors={"3": 0.1})), "unknown layer '3'"),
        (lambda: trained(replace(ONE, freeze=("0",), lr_factors={"0.3": 0.1})), "no effect on '0.3': nothing under it"),
        (lambda: trained(replace(ONE, freeze=("0", "2"))), "'net' has nothing to train"),
        (lambda: Training(lr_factors={"0": 0.0}), "lr_factors must be above 0 for '0'"),
        (lambda: Training(lr_factors={"0": 1e9}), "lr_factors times lr must be at most 1e6"),
        (lambda: Training(freeze="head"), "freeze must be a list of names, got 'head'"),  # type: ignore[arg-type]
        (lambda: Training(class_weights="even"), "class_weights must be one of 'balanced', None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_there_or_has_no_effect_is_refused(make_it: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_it()
    assert not message.startswith("unknown") or isinstance(caught.value, UnknownNameError)


def test_balanced_classes_are_for_classifiers() -> None:
    def other(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        return module(x).square().mean(1)

    with pytest.raises(InputError, match="class_weights is for classifiers, and 'net' trains something else"):
        fit(net(), other, points(), replace(ONE, class_weights="balanced"), name="net")
