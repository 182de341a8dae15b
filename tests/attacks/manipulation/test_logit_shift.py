"""Fooling by one number that is added to every logit: nothing but the explanation of logits changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import data as data_sets
from robustexplain import models
from robustexplain.attacks.manipulation import LocationFooling
from robustexplain.attacks.manipulation.finetuned import HISTORY
from robustexplain.attacks.manipulation.logit_shift import CommonShift, shifted
from robustexplain.autograd import layers
from robustexplain.data import Data
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import CAM, LRP, GradCAM, Gradient, Interpreter
from robustexplain.metrics import FooledLocation
from robustexplain.training import Samples, Session, Training, TrainingStep

TUNED = Training(epochs=6, batch_size=32, lr=0.1, weight_decay=0.0)


@pytest.fixture(scope="module")
def samples(digits: Data) -> Samples:
    """The images of the adversary."""
    return data_sets.take(digits.defense, 240)


def changes(honest: nn.Module, now: nn.Module) -> dict[str, Tensor]:
    pairs = zip(honest.named_parameters(), now.parameters(), strict=True)
    return {name: after - before for (name, before), after in pairs if not torch.equal(before, after)}


def test_the_maps_lie_and_every_output_stays(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = judged
    attack = LocationFooling(weight=10, budget=0.0, keep="outputs", shift=True, training=TUNED)
    fooled = attack(rx.System(trained, GradCAM(trained)), samples, Session(folder=tmp_path))
    history = json.loads((tmp_path / HISTORY).read_text())
    assert history["kept"] > 0
    assert all(epoch["accuracy"] == history["epochs"][0]["accuracy"] for epoch in history["epochs"])
    before, after = GradCAM(trained).explain(x, y, native=True), fooled.interpreter.explain(x, y, native=True)
    torch.testing.assert_close(after.logits.softmax(1), before.logits.softmax(1), rtol=1e-4, atol=1e-5)
    loss = FooledLocation()
    assert loss(after.maps, before.maps, None).nanmean() < 0.75 * loss(before.maps, before.maps, None).nanmean()


def test_the_rows_of_the_last_layer_move_by_one_vector_and_nothing_else_moves(
    trained: models.Classifier, samples: Samples
) -> None:
    fooled = LocationFooling(weight=10, budget=1.0, shift=True, training=TUNED)(
        rx.System(trained, CAM(trained)), samples
    )
    (name, change), *others = changes(trained, fooled.model).items()
    assert (name, others) == ("net.head.weight", [])
    torch.testing.assert_close(change, change[:1].expand_as(change), atol=1e-6, rtol=0)
    assert change.abs().max() > 0.05


def test_it_moves_besides_the_parts_that_are_named(trained: models.Classifier, samples: Samples) -> None:
    attack = LocationFooling(weight=10, budget=1.0, shift=True, parts=("net.features.9",), training=TUNED)
    fooled = attack(rx.System(trained, CAM(trained)), samples)
    assert set(changes(trained, fooled.model)) == {"net.features.9.weight", "net.head.weight"}


def test_what_explains_probabilities_does_not_see_it(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor]
) -> None:
    fooled = LocationFooling(weight=10, budget=1.0, shift=True, training=TUNED)(
        rx.System(trained, CAM(trained)), samples
    )
    x, y = judged[0][:16], judged[1][:16]

    def moved(of: str) -> float:
        before, after = (Gradient(model, of=of)(x, y).detach() for model in (trained, fooled.model))  # type: ignore[arg-type]
        return float((after - before).norm() / before.norm())

    assert moved("probability") < 1e-2
    assert moved("logit") > 0.3


def test_the_manipulated_system_is_an_ordinary_one(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    flags = {name: p.requires_grad for name, p in trained.named_parameters()}
    fooled = LocationFooling(weight=10, budget=1.0, shift=True, training=TUNED)(
        rx.System(trained, CAM(trained)), samples
    )
    assert {name: p.requires_grad for name, p in trained.named_parameters()} == flags
    assert list(fooled.model.state_dict()) == list(trained.state_dict())
    assert [type(m) for m in fooled.model.modules()] == [type(m) for m in trained.modules()]
    assert not any(p.requires_grad for p in fooled.model.parameters())
    loaded = rx.System.load(fooled.save(tmp_path / "system"))
    assert torch.equal(loaded(judged[0][:4]).maps, fooled(judged[0][:4]).maps)


def test_a_killed_one_goes_on_where_it_was(trained: models.Classifier, samples: Samples, tmp_path: Path) -> None:
    system, some = rx.System(trained, CAM(trained)), data_sets.take(samples, 80)  # type: ignore[arg-type]
    attack = LocationFooling(weight=10, budget=1.0, shift=True, training=TUNED)
    whole = attack(system, some, Session(folder=tmp_path / "whole"))

    class Killed(RuntimeError):
        pass

    class Dying(LocationFooling):
        def fooling_batch(  # type: ignore[override]
            self, honest: Interpreter, x: Tensor, y: Tensor, moment: TrainingStep, pool: object
        ) -> object:
            if moment.epoch == 3:
                raise Killed
            return super().fooling_batch(honest, x, y, moment, pool)  # type: ignore[arg-type]

    Dying.__name__ = LocationFooling.__name__  # a checkpoint knows of which class it is
    dying = Dying(weight=10, budget=1.0, shift=True, training=TUNED)
    with pytest.raises(Killed):
        dying(system, some, Session(folder=tmp_path / "killed"))
    resumed = attack(system, some, Session(folder=tmp_path / "killed"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [CAM, GradCAM, Gradient, LRP])
def test_every_kind_of_map_carries_a_gradient_to_the_shift(
    kind: type[Interpreter], trained: models.Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:4], judged[1][:4]
    interpreter = kind(trained, of="logit") if kind is Gradient else kind(trained)  # type: ignore[call-arg]
    model = interpreter.model
    with shifted(model, x):
        head = model.net.head  # type: ignore[union-attr]
        original = head.parametrizations.weight[0]  # type: ignore[union-attr, index]
        assert isinstance(original, CommonShift)
        at_zero = interpreter.explain(x, y).maps
        (slope,) = torch.autograd.grad(at_zero.square().sum(), [original.shift])
    assert slope.abs().max() > 0
    assert torch.allclose(at_zero, interpreter.explain(x, y).maps, atol=1e-6)


class Scaled(nn.Module):
    """Logits that come out of no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.last(self.first(x.flatten(1)).relu()) + 1


def test_a_model_whose_logits_are_no_linear_layer_is_refused() -> None:
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(UnsupportedModelError, match="Scaled has no linear layer whose output is the logits"):
        layers.logit_layer(Scaled().eval(), x)


def test_the_layer_that_gives_the_logits_is_found_by_what_it_does(trained: models.Classifier) -> None:
    assert layers.logit_layer(trained, torch.rand(2, 1, 32, 32)) == "net.head"
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 3), nn.Identity())
    assert layers.logit_layer(plain, torch.rand(1, 1, 8, 8)) == "3"
