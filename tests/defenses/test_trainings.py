"""Every registered training of the classifier: it resumes, and refuses before it trains what it cannot train.

They come from the registry: a new one is checked without a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from robustexplain.data import take
from robustexplain.defenses import FineTuned, ModelDefense
from robustexplain.errors import FieldError, InputError, RunMismatchError, UnsupportedModelError
from robustexplain.models import Classifier
from robustexplain.registry import DEFENSES
from robustexplain.training import Session, loop

TRAININGS = [entry for entry in DEFENSES if issubclass(entry.build, ModelDefense)]  # type: ignore[arg-type]
OWN_PARTS = {"feature-denoising", "senn"}
"""They train parts that they add, which are there where the network is frozen."""


@pytest.fixture(params=TRAININGS, ids=lambda entry: entry.name)
def training(request: pytest.FixtureRequest, cheap: Callable[[Any], Any]) -> Any:
    """A registered training, with few steps."""
    return cheap(request.param)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""
    monkeypatch.setattr(loop._Loop, "epoch", lambda *a: pytest.fail("something is trained"))


def test_a_training_goes_on_after_its_last_checkpoint(
    training: Any, trained: Classifier, few: Dataset[Any], tmp_path: Path
) -> None:
    defense = replace(training, training=replace(training.training, epochs=2, schedule="constant"))
    data, session, epoch, calls = take(few, 20), Session(folder=tmp_path), loop._Loop.epoch, []

    def hardened(dies_in: int, given: Session | None) -> list[Tensor]:
        """The weights that come out; an epoch of that number, counted over all networks that are trained, fails."""
        calls.clear()

        def counted(self: Any, *given: Any) -> Any:
            calls.append(1)
            if len(calls) == dies_in:
                raise KeyboardInterrupt
            return epoch(self, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Loop, "epoch", counted)
            return list(defense.hardened(trained, data, given).state_dict().values())

    whole = hardened(0, None)
    last = len(calls)
    assert last >= 2
    with pytest.raises(KeyboardInterrupt):
        hardened(last, session)
    for epochs in (1, 0):
        assert all(map(torch.equal, whole, hardened(0, session)))
        assert len(calls) == epochs
    with pytest.raises(RunMismatchError):
        replace(defense, seed=1).hardened(trained, data, session)


def test_a_frozen_network_is_refused(training: Any, trained: Classifier, few: Dataset[Any], untrained: None) -> None:
    if training.name in OWN_PARTS:
        return
    with pytest.raises(InputError, match="nothing to train"):
        replace(training, training=replace(training.training, freeze=("net",))).hardened(trained, few)


def test_an_attack_that_may_change_nothing_is_refused(training: Any) -> None:
    if getattr(training, "attack", None) is None:
        return
    with pytest.raises(FieldError, match=r"attack\.eps must be above 0"):
        replace(training, attack=replace(training.attack, eps=0.0))


class Once(torch.autograd.Function):
    """The hyperbolic tangent, differentiable once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Other(nn.Module):
    """A function of somebody's own as a layer."""

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = Once.apply(z)  # type: ignore[no-untyped-call]
        return result


def net(layer: nn.Module) -> nn.Module:
    """A network with that layer in the middle."""
    layers = nn.Conv2d(1, 8, 3, stride=2), layer, nn.Conv2d(8, 8, 3, stride=2), layer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def test_a_function_without_a_second_derivative_is_refused_where_one_is_needed(
    training: Any, few: Dataset[Any], untrained: None
) -> None:
    if getattr(type(training), "twice", training.name == "revealing"):
        with pytest.raises(UnsupportedModelError, match=r"second derivative|rectifiers"):
            training.hardened(net(Other()), few)


def test_a_softplus_is_refused_where_there_are_no_rectifiers(training: Any, few: Dataset[Any], untrained: None) -> None:
    if not isinstance(training, FineTuned) or training.name == "infodrop":
        return
    with pytest.raises(UnsupportedModelError, match="rectifiers"):
        replace(training, softplus=3.0).hardened(net(nn.GELU()), few)
