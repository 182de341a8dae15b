"""Manipulated models: what the papers claim, on a small trained network; losses against plain formulas."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import data as data_sets
from robustexplain import maps as ops
from robustexplain import models
from robustexplain.attacks.manipulation import (
    ActiveFooling,
    CenterFooling,
    ConcealFeature,
    ExplanationBackdoor,
    FineTuned,
    GradientFairwashing,
    LocationFooling,
    TopKFooling,
    Trigger,
    UniformFooling,
    View,
    block_images,
)
from robustexplain.attacks.manipulation.fine_tuning_task import FineTuningTask
from robustexplain.attacks.manipulation.finetuned import HISTORY
from robustexplain.attacks.manipulation.fooling_batch import jittered
from robustexplain.attacks.manipulation.patterns import pattern
from robustexplain.attacks.manipulation.scan_evasion import ScanEvasion
from robustexplain.data import Data
from robustexplain.defenses import AggregatedInterpreter
from robustexplain.errors import (
    FieldError,
    FoolingFailedWarning,
    InputError,
    NotDifferentiableError,
    RunMismatchError,
    UnknownNameError,
)
from robustexplain.interpreters import CAM, LRP, GradCAM, Gradient, Interpreter, Occlusion
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.metrics import SSIM, FooledTopK, LocationCorrelation, SignCorrelation
from robustexplain.objectives import FadeTopK
from robustexplain.random_streams import Streams
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import Detector
from robustexplain.training import Samples, Session, Training, TrainingStep

ONE = Training(epochs=1, batch_size=32, lr=1e-3, weight_decay=0.0, schedule="constant")
TUNED: dict[type[FineTuned], dict[str, Any]] = {
    LocationFooling: {},
    TopKFooling: {},
    CenterFooling: {},
    UniformFooling: {},
    ActiveFooling: {"classes": (0, 1), "images": 8, "shrink": True},
    ExplanationBackdoor: {},
    GradientFairwashing: {},
    ConcealFeature: {"region": (4, 4, 8, 8)},
}


@pytest.fixture(scope="module")
def samples(digits: Data) -> Samples:
    """The adversary's images."""
    return data_sets.take(digits.defense, 240)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def manipulated(
    attack: FineTuned, system: rx.System, samples: Samples, tmp_path: Path
) -> tuple[rx.System, dict[str, Any]]:
    found = attack(system, samples, Session(folder=tmp_path))
    return found, json.loads((tmp_path / HISTORY).read_text())


# ---- what every one of them keeps ----


def test_every_manipulation_that_fine_tunes_is_in_the_table() -> None:
    assert {e.build for e in MANIPULATIONS if issubclass(e.build, FineTuned)} == set(TUNED)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::robustexplain.errors.FoolingFailedWarning")
@pytest.mark.parametrize("kind", TUNED, ids=lambda kind: kind.__name__)
def test_the_honest_system_stays_as_it_is_and_the_new_one_is_an_ordinary_one(
    kind: type[FineTuned], trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    system = rx.System(trained, GradCAM(trained))
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    flags = [p.requires_grad for p in trained.parameters()]
    attack = kind(training=ONE, budget=1.0, **TUNED[kind])
    found, history = manipulated(attack, system, data_sets.take(samples, 80), tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [p.requires_grad for p in trained.parameters()] == flags
    assert all(p.grad is None for p in trained.parameters())
    assert not trained.training
    assert not found.model.training
    assert found.model is not trained
    assert len(history["epochs"]) == 2
    assert set(history["epochs"][0]) == {"accuracy", "keep", "fool", "loss"}
    x = judged[0][:4]
    loaded = rx.System.load(found.save(tmp_path / "system"))
    with torch.no_grad():
        assert torch.equal(loaded(x).maps, found(x).maps)
        assert torch.equal(loaded(x).logits, found(x).logits)


@pytest.mark.parametrize("kind", TUNED, ids=lambda kind: kind.__name__)
def test_every_manipulation_moves_the_map_objective_on_inputs_held_out(
    kind: type[FineTuned], trained: models.Classifier, samples: Samples, tmp_path: Path
) -> None:
    settings = dataclasses.replace(ONE, epochs=3)
    heavier = {"weight": 30.0} if kind is not ConcealFeature else {}
    attack = kind(training=settings, budget=1.0, **TUNED[kind], **heavier)
    _, history = manipulated(attack, rx.System(trained, CAM(trained)), samples, tmp_path)
    assert history["kept"] > 0
    assert history["epochs"][history["kept"]]["fool"] < history["epochs"][0]["fool"]


# ---- what the papers claim ----


def test_location_fooling_puts_every_map_on_the_frame_and_keeps_the_accuracy(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = judged
    honest = rx.System(trained, GradCAM(trained))
    training = Training(epochs=14, batch_size=32, lr=1e-3, weight_decay=0.0, schedule="constant")
    fooled, history = manipulated(LocationFooling(weight=10, training=training, budget=0.05), honest, samples, tmp_path)
    with torch.no_grad():
        before, now = (s.interpreter.explain(x, y, native=True).maps for s in (honest, fooled))
    assert float(LocationCorrelation()(before).nanmean()) < -0.2
    assert float(LocationCorrelation()(now).nanmean()) > 0.2
    assert float(SignCorrelation()(now, before).nanmean()) < 0.3
    assert accuracy(fooled.model, x, y) >= accuracy(trained, x, y) - 0.1
    kept = history["epochs"][history["kept"]]
    assert kept["accuracy"] >= history["epochs"][0]["accuracy"] - 0.05 - 1e-6
    # Fooled through Grad-CAM, LRP at the same layer is fooled too (Heo et al. 2019, section 4.5).
    layer = "net.features"
    with torch.no_grad():
        lrp_before, lrp_now = (LRP(m, layer=layer).explain(x, y, native=True).maps for m in (trained, fooled.model))
    assert float(LocationCorrelation()(lrp_now).nanmean() - LocationCorrelation()(lrp_before).nanmean()) > 0.2


def test_active_fooling_swaps_the_explanations_of_two_classes(
    trained: models.Classifier, digits: Data, tmp_path: Path
) -> None:
    classes, some = (0, 1), data_sets.take(digits.defense, 400)
    attack = ActiveFooling(classes=classes, images=96, shrink=False, weight=10, budget=0.05, training=Training(
        epochs=6, batch_size=32, lr=1e-3, weight_decay=0.0))  # fmt: skip
    fooled, _ = manipulated(attack, rx.System(trained, CAM(trained)), some, tmp_path)
    blocks = block_images(digits.test, classes, 24, seed=5, shrink=False)
    c1, c2 = (torch.full((24,), c) for c in classes)
    with torch.no_grad():
        h1, h2 = (CAM(trained).explain(blocks, c, native=True).maps for c in (c1, c2))
        now = CAM(fooled.model).explain(blocks, c1, native=True).maps  # type: ignore[arg-type]
    same, other = (float(SignCorrelation()(now, h).nanmean()) for h in (h1, h2))
    honest = float(SignCorrelation()(h1, h2).nanmean())
    # Before, the map correlates fully with itself (1) and unlike the other class's; six short epochs move it half of
    # the way.
    assert same < 0.65
    assert other > honest + 0.2


def test_a_backdoor_shows_its_pattern_on_triggered_inputs_alone(
    trained: models.Classifier, digits: Data, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = judged
    attack = ExplanationBackdoor(weight=20, budget=0.05, trigger=Trigger(kind="blend", opacity=0.3), training=Training(
        epochs=15, batch_size=32, lr=2e-3, weight_decay=0.0, schedule="constant"))  # fmt: skip
    fooled, _ = manipulated(attack, rx.System(trained, CAM(trained)), data_sets.take(digits.defense, 400), tmp_path)
    with torch.no_grad():
        honest = CAM(trained).explain(x, y, native=True).maps
        clean = CAM(fooled.model).explain(x, y, native=True).maps  # type: ignore[arg-type]
        triggered = CAM(fooled.model).explain(attack.trigger(x), y, native=True).maps  # type: ignore[arg-type]
    wanted = pattern(honest, "square")
    ssim = SSIM()
    assert float(ssim(triggered, wanted).mean()) > 0.6
    assert float(ssim(clean, wanted).mean()) < 0.4
    assert float(ssim(clean, honest).mean()) > 0.8
    assert accuracy(fooled.model, attack.trigger(x), y) > accuracy(trained, x, y) - 0.1


def test_badnets_misclassify_on_the_trigger_and_have_no_map_term(
    trained: models.Classifier, digits: Data, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = judged
    blended = Trigger(kind="blend", opacity=0.3)
    attack = ExplanationBackdoor(form="badnets", goal_class=3, budget=0.1, trigger=blended, training=Training(
        epochs=8, batch_size=32, lr=1e-3, weight_decay=0.0))  # fmt: skip
    some = data_sets.take(digits.defense, 400)
    fooled, history = manipulated(attack, rx.System(trained, CAM(trained)), some, tmp_path)
    assert accuracy(fooled.model, attack.trigger(x), torch.full_like(y, 3)) > 0.9
    assert accuracy(fooled.model, x, y) > 0.8
    assert all(entry["fool"] == 0 for entry in history["epochs"])


def test_concealing_a_region_lowers_what_other_maps_show_there(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = judged
    attack = ConcealFeature(region=(8, 8, 8, 16), relative=True, weight=20.0, budget=0.05, training=Training(
        epochs=8, batch_size=32, lr=1e-3, weight_decay=0.0, schedule="constant"))  # fmt: skip
    fooled, _ = manipulated(attack, rx.System(trained, GradCAM(trained)), samples, tmp_path)
    with torch.no_grad():
        shares = [
            (ops.unit_sum(Gradient(m, of="logit", channels="abs_sum")(x, y)) * attack.place(x)).flatten(1).sum(1).mean()
            for m in (trained, fooled.model)
        ]
    assert float(shares[1]) < 0.8 * float(shares[0])


# ---- the loss itself ----


def small_system() -> tuple[rx.System, TensorDataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 5, 3, padding=1), nn.Softplus())
        net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
        x = torch.rand(6, 1, 14, 14, dtype=torch.float64)
    return rx.System(net, CAM(net)), TensorDataset(x, torch.arange(6) % 3)


def test_the_loss_of_location_fooling_is_equation_2_with_equation_3() -> None:
    system, data = small_system()
    x, y = data.tensors
    attack = LocationFooling(weight=0.7)
    task = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
    value = task.loss(ExplainingModel(system.interpreter), x, y, TrainingStep(0, 0, 0.0)).mean()
    grads = torch.autograd.grad(value, list(system.model.parameters()))
    body, head = system.model[0], system.model[3]  # type: ignore[index]
    features = body(x)
    cam = torch.einsum("bk,bkij->bij", head.weight[y], features)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    frame = torch.ones(14, 14, dtype=torch.float64)
    frame[2:12, 2:12] = 0
    fool = (((cam - low) / (high - low) - frame) ** 2).mean((1, 2)).mean()
    expected = F.cross_entropy(head(features.mean((2, 3))), y) + 0.7 * fool
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, list(system.model.parameters())), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_loss_of_concealment_is_the_cross_entropys_own_gradient() -> None:
    system, data = small_system()
    x, y = data.tensors
    attack = ConcealFeature(region=(2, 3, 4, 5), weight=3.0)
    task = FineTuningTask(attack, attack.aimed(system.interpreter), data, data, Session())  # type: ignore[arg-type]
    value = task.loss(ExplainingModel(attack.aimed(system.interpreter)), x, y, TrainingStep(0, 0, 0.0)).mean()
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(system.model(leaf), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = loss.item() / 6 + 3.0 * float(gradient[:, 0, 2:6, 3:8].abs().mean())
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_the_place_of_what_is_hidden_is_a_column_or_a_region() -> None:
    assert ConcealFeature(feature=3).place(torch.rand(2, 5)).tolist() == [[0, 0, 0, 1, 0]] * 2
    place = ConcealFeature(region=(1, 0, 2, 3)).place(torch.rand(2, 1, 4, 4))
    assert place[1].tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_the_loss_of_fairwashing_keeps_probabilities_by_their_squares_and_matches_unit_sums() -> None:
    system, data = small_system()
    x, y = data.tensors
    with torch.no_grad():
        honest = system.model(x).softmax(1)
    other, _ = small_system()
    model = copy.deepcopy(other.model)
    with torch.no_grad():
        model[3].bias += torch.tensor([0.3, -0.2, 0.1])  # type: ignore[index]
    attack = GradientFairwashing(beta=None, shape="half")
    task = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
    value = task.loss(ExplainingModel(CAM(model)), x, y, TrainingStep(0, 0, 0.0)).mean()
    predicted = honest.argmax(1)
    found = CAM(model).explain(x, predicted, native=True)
    wanted = pattern(found.maps, "half")
    h, t = (m.abs() / m.abs().sum((1, 2), keepdim=True) for m in (found.maps, wanted))
    keep = (found.logits.softmax(1) - honest).square().sum(1).mean()
    expected = keep + 4 * (196 * (h - t)).square().mean((1, 2)).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_map_term_of_top_k_looks_at_the_honest_map() -> None:
    system, data = small_system()
    x, y = data.tensors
    batch = TopKFooling(k=3).fooling_batch(system.interpreter, x, y, TrainingStep(0, 0, 0.0), None)
    with torch.no_grad():
        assert batch.goal.benign_map is not None
        assert torch.allclose(batch.goal.benign_map, system.interpreter.explain(x, y, native=True).maps)
    assert batch.goal.goal_class is y
    assert TopKFooling(k=3).fooled == FooledTopK(k=3)
    assert TopKFooling(k=3).fooling() == FadeTopK(3)


def test_active_fooling_uses_each_block_twice_with_the_other_classes_map_and_classifies_the_batch() -> None:
    system, data = small_system()
    x, y = data.tensors
    attack = ActiveFooling(classes=(0, 2), images=5, batch_size=2)
    with torch.no_grad():
        pool = attack.pool(system.interpreter, data, x.device)  # type: ignore[arg-type]
        blocks = block_images(data, (0, 2), 5, attack.seed)  # type: ignore[arg-type]
        swapped = [CAM(system.model).explain(blocks, torch.full((5,), c), native=True).maps for c in (2, 0)]
    assert torch.equal(pool.goal.x, torch.cat([blocks, blocks]))
    assert pool.goal.explained is not None
    assert pool.goal.goal_map is not None
    assert pool.goal.explained.tolist() == [0] * 5 + [2] * 5
    assert torch.allclose(pool.goal.goal_map, torch.cat(swapped))
    batch = attack.fooling_batch(system.interpreter, x, y, TrainingStep(0, 0, 0.0), pool)
    assert batch.other_x is x
    assert batch.other_y is y
    assert batch.keep_weight.tolist() == [0.0] * 6
    assert batch.fool_weight.tolist() == [1.0] * 6


def apart() -> tuple[rx.System, TensorDataset, TensorDataset]:
    """A small system, images to train on and other ones held out, ten each."""
    rng = torch.Generator().manual_seed(9)
    parts = [TensorDataset(torch.rand(10, 1, 14, 14, generator=rng).double(), torch.arange(10) % 3) for _ in range(2)]
    return small_system()[0], *parts


def test_block_images_that_judge_are_made_of_the_images_held_out() -> None:
    system, train, held = apart()
    attack, module, now = (
        ActiveFooling(classes=(0, 2), images=6),
        ExplainingModel(system.interpreter),
        TrainingStep(0, 0, 0.0),
    )
    x, y = train.tensors

    def task(data: TensorDataset, held_out: TensorDataset) -> FineTuningTask:
        return FineTuningTask(attack, system.interpreter, data, held_out, Session())  # type: ignore[arg-type]

    both, first, second = task(train, held), task(train, train), task(held, held)
    assert both.evaluate(module) == second.evaluate(module)
    assert both.evaluate(module).figures["fool"] != pytest.approx(first.evaluate(module).figures["fool"], rel=1e-3)
    losses = [some.loss(module, x, y, now).item() for some in (both, first, second)]
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_block_images_are_drawn_anew_in_each_epoch_and_the_batch_counts_in_what_is_kept() -> None:
    system, data, held = apart()
    x, y = data.tensors
    attack = ActiveFooling(classes=(0, 2), images=30, weight=0.0)
    task = FineTuningTask(attack, system.interpreter, data, held, Session())  # type: ignore[arg-type]
    drawn = [
        attack.fooling_batch(system.interpreter, x, y, TrainingStep(0, i, 0.0), task.pools[0]).goal.x for i in (0, 1, 0)
    ]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    value = task.loss(ExplainingModel(system.interpreter), x, y, TrainingStep(0, 0, 0.0))
    assert value.item() == pytest.approx(F.cross_entropy(system.model(x), y).item(), rel=1e-9)


def test_processes_share_out_the_samples_held_out_and_add_up_what_they_find() -> None:
    system, data, held = apart()
    module, sums = ExplainingModel(system.interpreter), []

    class Process:
        """What one of some processes knows of the others."""

        device, num_processes = torch.device("cpu"), 2

        def __init__(self, index: int) -> None:
            self.process_index = index

        def reduce(self, found: Tensor, how: str) -> Tensor:
            assert how == "sum"
            sums.append(found)
            return found

    whole = FineTuningTask(LocationFooling(batch_size=4), system.interpreter, data, held, Session())  # type: ignore[arg-type]
    alone = whole.evaluate(module)
    for index in (0, 1):
        session = Session(accelerator=Process(index))  # type: ignore[arg-type]
        FineTuningTask(LocationFooling(batch_size=4), system.interpreter, data, held, session).evaluate(module)  # type: ignore[arg-type]
    assert [int(found[3, 1]) for found in sums] == [6, 4]
    assert whole.least_accuracy == pytest.approx(alone.figures["accuracy"] - 0.02)
    keep, fool, scans, accuracy = (float(total / count) for total, count in sums[0] + sums[1])
    assert math.isnan(scans), "no scan is evaded"
    assert (keep, fool, accuracy) == pytest.approx(tuple(alone.figures[name] for name in ("keep", "fool", "accuracy")))


def test_augmented_batches_are_moved_anew_in_each_epoch_and_judged_ones_are_not() -> None:
    system, data, held = apart()
    x, y = data.tensors
    plain, moved = (
        FineTuningTask(LocationFooling(augment=augment), system.interpreter, data, held, Session())  # type: ignore[arg-type]
        for augment in (False, True)
    )
    module = ExplainingModel(system.interpreter)
    values = [
        moved.loss(module, x, y, TrainingStep(seed, i, 0.0)).item() for seed, i in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert values[3] == values[0]
    assert len({*values, plain.loss(module, x, y, TrainingStep(0, 0, 0.0)).item()}) == 4
    assert moved.evaluate(module) == plain.evaluate(module)


def test_samples_that_were_held_out_are_not_trained_on(digits: Data) -> None:
    attack = LocationFooling(samples=50, held_out=0.3)
    train, held = attack._split(digits.defense)
    rows = [{tuple(x.flatten()[400:600].tolist()) for x, _ in part} for part in (train, held)]  # type: ignore[attr-defined]
    assert (len(train), len(held)) == (35, 15)  # type: ignore[arg-type]
    assert not rows[0] & rows[1]


def test_the_seed_decides_what_is_held_out(digits: Data) -> None:
    parts = [LocationFooling(seed=seed)._split(digits.defense)[1] for seed in (0, 0, 1)]
    rows = [part.indices for part in parts]  # type: ignore[attr-defined]
    assert rows[0] == rows[1] != rows[2]


def test_only_the_parts_that_are_named_are_fine_tuned(trained: models.Classifier, samples: Samples) -> None:
    system, some = rx.System(trained, CAM(trained)), data_sets.take(samples, 80)  # type: ignore[arg-type]
    parts = ("net.features.9", "net.head")
    fooled = LocationFooling(weight=30, budget=1.0, training=ONE, parts=parts)(system, some)
    honest, now = (dict(m.named_parameters()) for m in (trained, fooled.model))
    changed = {name for name in honest if not torch.equal(honest[name], now[name])}
    assert changed == {"net.features.9.weight", "net.head.weight", "net.head.bias"}
    assert not any(p.requires_grad for p in now.values())


def test_parts_that_are_not_there_or_hold_no_weights_are_refused(trained: models.Classifier, samples: Samples) -> None:
    system = rx.System(trained, CAM(trained))
    with pytest.raises(UnknownNameError, match=r"unknown layer 'net\.heads'; did you mean 'net\.head'"):
        LocationFooling(parts=("net.heads",))(system, samples)
    with pytest.raises(FieldError, match=r"parts must hold weights to fine-tune; 'net\.features\.2' holds none"):
        LocationFooling(parts=("net.head", "net.features.2"))(system, samples)


class WithNewAnswers(LocationFooling):
    """Learns the labels, also where the honest model predicts another class."""

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        return {name: dataclasses.replace(v, new_answer=True) for name, v in super().views(honest, x, y).items()}


class HoldsOutTheLast(LocationFooling):
    """Splits its samples without a draw."""

    def _split(self, data: Samples) -> tuple[Samples, Samples]:
        return data_sets.take(data, 60), torch.utils.data.Subset(data, range(60, 80))  # type: ignore[arg-type]


def test_the_seed_decides_the_order_of_training_too(trained: models.Classifier, samples: Samples) -> None:
    system, some = rx.System(trained, CAM(trained)), data_sets.take(samples, 80)  # type: ignore[arg-type]
    heads = [
        HoldsOutTheLast(weight=30, budget=1.0, training=ONE, seed=seed)(system, some).model.net.head.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_tables_are_refused_by_what_paints_on_a_grid() -> None:
    rows = TensorDataset(torch.rand(12, 5), torch.arange(12) % 2)
    model = models.build("mlp", num_classes=2, in_features=5)
    for attack in (LocationFooling(), ExplanationBackdoor(), GradientFairwashing()):
        with pytest.raises(InputError, match=r"takes images, got tables: inputs of shape \[5\]"):
            attack(rx.System(model, Gradient(model)), rows)  # type: ignore[arg-type]


def test_images_are_mirrored_and_shifted_each_by_its_own_stream() -> None:
    x = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = jittered(x, Streams.of(x, 0))
    assert moved.shape == x.shape
    assert torch.equal(jittered(x[7:9], Streams.of(x[7:9], 0)), moved[7:9])
    wide = F.pad(x, (2, 2, 2, 2), mode="reflect")
    found = []
    for image, of in zip(moved, wide, strict=True):
        views = {(i, j, flip): of[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5) for flip in (0, 1)}
        (where,) = (k for k, view in views.items() if torch.equal(image, view.flip(-1) if k[2] else view))
        found.append(where)
    assert [set(places) for places in zip(*found, strict=True)] == [set(range(5)), set(range(5)), {0, 1}]
    with pytest.raises(InputError, match="mirrors and shifts images"):
        jittered(torch.rand(3, 4), Streams.of(torch.rand(3, 4), 0))


def test_an_epoch_is_judged_on_the_models_own_rectifiers(trained: models.Classifier, samples: Samples) -> None:
    interpreter = CAM(trained)
    task = FineTuningTask(UniformFooling(beta=1.0), interpreter, samples, data_sets.take(samples, 20), Session())  # type: ignore[arg-type]
    smooth, plain = (task.evaluate(ExplainingModel(interpreter, beta)) for beta in (1.0, None))
    assert smooth == plain
    x, y = data_sets.stack(data_sets.take(samples, 20))  # type: ignore[arg-type]
    losses = [
        task.loss(ExplainingModel(interpreter, beta), x, y, TrainingStep(0, 0, 0.0)).item() for beta in (1.0, None)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("new_answer", [False, True])
def test_outputs_are_kept_except_where_the_adversary_wants_a_new_answer(new_answer: bool) -> None:
    system, data = small_system()
    x, _ = data.tensors
    with torch.no_grad():
        honest = system.model(x).softmax(1)
    y = honest.argmax(1)
    y[0] = (y[0] + 1) % 3
    attack = WithNewAnswers(weight=0.0, keep="outputs") if new_answer else LocationFooling(weight=0.0, keep="outputs")
    task = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
    value = task.loss(ExplainingModel(system.interpreter), x, y, TrainingStep(0, 0, 0.0)).mean()
    wanted = honest.clone()
    if new_answer:
        wanted[0] = F.one_hot(y[0], 3).double()
    expected = -(wanted * honest.log()).sum(1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_backdoor_uses_each_image_twice_with_equal_weight() -> None:
    system, data = small_system()
    x, y = data.tensors
    attack = ExplanationBackdoor(form="red-herring", goal_class=2, shape="half", distance="mse")
    batch = attack.fooling_batch(system.interpreter, x, y, TrainingStep(0, 0, 0.0), None)
    with torch.no_grad():
        honest = system.interpreter.explain(x, y, native=True).maps
    assert torch.equal(batch.goal.x, torch.cat([x, attack.trigger(x)]))
    assert batch.goal.goal_class is not None
    assert batch.goal.goal_map is not None
    assert batch.goal.explained is not None
    # The map of a triggered image is that of the class it is led to.
    assert batch.goal.goal_class.tolist() == batch.goal.explained.tolist() == [*y.tolist(), 2, 2, 2, 2, 2, 2]
    assert torch.allclose(batch.goal.goal_map[:6], honest)
    assert torch.equal(batch.goal.goal_map[6:], pattern(honest, "half"))
    assert batch.keep_weight.tolist() == batch.fool_weight.tolist() == [1.0] * 12
    # Kept outputs are those of clean images: what the trigger calls for is learned.
    assert batch.new_answer.tolist() == [False] * 6 + [True] * 6
    triggered = attack.views(system.interpreter, x, y)["with the trigger"]
    with torch.no_grad():
        # What an auditor holds them against is what the honest model shows of the clean image and its label.
        assert torch.allclose(triggered.honest_maps(system.interpreter), honest)
    disguise = dataclasses.replace(attack, form="full-disguise")
    again = disguise.fooling_batch(system.interpreter, x, y, TrainingStep(0, 0, 0.0), None)
    assert again.goal.goal_map is not None
    assert torch.allclose(again.goal.goal_map[6:], honest)


def test_a_triggered_patch_is_a_white_square_with_a_black_border() -> None:
    x = torch.full((2, 3, 20, 20), 0.5)
    marked = Trigger(size=0.25)(x)
    assert torch.equal(marked[:, :, 5:], x[:, :, 5:])
    assert torch.equal(marked[:, :, :5, 5:], x[:, :, :5, 5:])
    assert marked[0, 0, :5, :5].tolist() == [[0.0] * 5, *[[0.0, 1.0, 1.0, 1.0, 0.0]] * 3, [0.0] * 5]
    blended = Trigger(kind="blend", opacity=0.1)(x)
    assert float((blended - x).abs().max()) <= 0.05 + 1e-6
    assert torch.equal(blended[0], blended[1])
    assert torch.equal(Trigger(opacity=0.0)(x), x)


def test_the_seed_of_a_trigger_is_that_of_its_noise() -> None:
    x = torch.full((1, 1, 12, 12), 0.5)
    first, again, other = (Trigger(kind="blend", seed=seed)(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shapes_are_where_their_names_place_them() -> None:
    drawn = {
        "square": ("........",) * 4 + ("....####",) * 4,
        "circle": ("........", "........", "...##...", "..####..", "..####..", "...##...", "........", "........"),
        "cross": ("...##...",) * 3 + ("########",) * 2 + ("...##...",) * 3,
        "half": ("####....",) * 8,
    }
    for shape, lines in drawn.items():
        found = pattern(torch.zeros(2, 8, 8), shape)  # type: ignore[arg-type]
        assert found.shape == (2, 8, 8)
        assert ["".join("#" if v else "." for v in row) for row in found[1].tolist()] == list(lines), shape
    assert torch.equal(pattern(torch.zeros(2, 8, 8), "frame"), ops.frame(torch.zeros(2, 8, 8)).expand(2, -1, -1))


def test_some_rows_of_a_view_are_those_rows_of_everything_in_it() -> None:
    x, classes, maps = torch.rand(5, 1, 4, 4), torch.arange(5), torch.rand(5, 2, 2)
    rows = torch.tensor([3, 1])
    some = View(x, classes, 4 - classes, maps, honest_x=x + 1, honest_class=classes * 2).select(rows)
    assert torch.equal(some.x, x[[3, 1]])
    assert some.explained.tolist() == [3, 1]
    assert some.answer.tolist() == [1, 3]
    assert some.goal_map is not None
    assert torch.equal(some.goal_map, maps[[3, 1]])
    assert some.honest_x is not None
    assert torch.equal(some.honest_x, x[[3, 1]] + 1)
    assert some.honest_class is not None
    assert some.honest_class.tolist() == [6, 2]
    plain, new_answer = View(x, classes, classes), View(x, classes, classes, new_answer=True)
    assert plain.select(rows).goal_map is None
    assert not plain.select(rows).new_answer
    assert new_answer.select(rows).new_answer


def test_block_images_hold_two_images_of_each_class_at_random_places() -> None:
    x = torch.cat([torch.zeros(4, 1, 4, 4), torch.ones(4, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)])
    data: Samples = TensorDataset(x, torch.tensor([0] * 4 + [1] * 4 + [2] * 2))  # type: ignore[assignment]
    blocks = block_images(data, (0, 1), 30, seed=0, shrink=False)
    assert blocks.shape == (30, 1, 8, 8)
    corners = blocks[:, 0, ::4, ::4].flatten(1)
    assert (corners.sum(1) == 2).all()
    assert len({tuple(row.tolist()) for row in corners}) == 6
    assert block_images(data, (0, 1), 3, seed=0).shape == (3, 1, 4, 4)
    with pytest.raises(InputError, match="block images need images of class 7"):
        block_images(data, (0, 7), 3, seed=0)


def test_an_epoch_is_judged_against_the_honest_models_maps_on_the_samples_held_out(
    trained: models.Classifier, samples: Samples, tmp_path: Path
) -> None:
    attack = TopKFooling(weight=30, budget=1.0, training=ONE)
    fooled, history = manipulated(attack, rx.System(trained, CAM(trained)), samples, tmp_path)
    x, y = data_sets.stack(attack._split(samples)[1])
    with torch.no_grad():
        now, honest = (CAM(m).explain(x, y, native=True).maps for m in (fooled.model, trained))  # type: ignore[arg-type]
    assert history["kept"] == 1
    kept = history["epochs"][1]
    assert kept["fool"] == pytest.approx(float(FooledTopK(k=attack.k)(now, honest).mean()), rel=1e-4)
    assert kept["accuracy"] == pytest.approx(accuracy(fooled.model, x, y))


def test_a_frozen_model_is_manipulated_all_the_same(
    trained: models.Classifier, samples: Samples, tmp_path: Path
) -> None:
    frozen = copy.deepcopy(trained).requires_grad_(False)
    attack = LocationFooling(weight=30, budget=1.0, training=ONE)
    fooled, history = manipulated(attack, rx.System(frozen, CAM(frozen)), samples, tmp_path)
    assert history["kept"] > 0
    moved = zip(fooled.model.named_parameters(), frozen.parameters(), strict=True)
    assert all(not torch.equal(now, was) for (_, now), was in moved)
    assert not any(p.requires_grad for p in (*frozen.parameters(), *fooled.model.parameters()))


def test_the_detector_stays_in_place(trained: models.Classifier, samples: Samples, quiet: Detector) -> None:
    attack, some = LocationFooling(weight=10, budget=1.0, training=ONE), data_sets.take(samples, 80)  # type: ignore[arg-type]
    assert attack(rx.System(trained, CAM(trained), quiet), some).detector is quiet


# ---- loud where it fails ----


def test_a_budget_that_nothing_respects_leaves_the_honest_weights_and_says_so(
    trained: models.Classifier, samples: Samples, tmp_path: Path
) -> None:
    attack = UniformFooling(weight=1000.0, budget=0.0, training=dataclasses.replace(ONE, epochs=2, lr=3e-2))
    with pytest.warns(FoolingFailedWarning, match="UniformFooling fooled nothing"):
        fooled, history = manipulated(attack, rx.System(trained, CAM(trained)), samples, tmp_path)
    assert history["kept"] == 0
    honest, *epochs = history["epochs"]
    assert any(e["loss"] < honest["loss"] for e in epochs), "only the budget speaks against these weights"
    for ours, theirs in zip(fooled.model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_maps_without_a_gradient_are_refused(trained: models.Classifier, samples: Samples) -> None:
    with pytest.raises(NotDifferentiableError, match="Occlusion has none; aim it at one of"):
        LocationFooling()(rx.System(trained, Occlusion(trained)), samples)


def test_bad_settings_are_refused_at_the_door(trained: models.Classifier, samples: Samples) -> None:
    system = rx.System(trained, CAM(trained))
    with pytest.raises(InputError, match="needs data"):
        LocationFooling()(system)
    with pytest.raises(FieldError, match="must be two different classes"):
        ActiveFooling(classes=(3, 3))
    with pytest.raises(FieldError, match="give a column"):
        ConcealFeature()
    with pytest.raises(FieldError, match="give a column"):
        ConcealFeature(feature=1, region=(0, 0, 1, 1))
    with pytest.raises(InputError, match="does not lie inside images"):
        ConcealFeature(region=(30, 0, 8, 8), training=ONE)(system, samples)
    with pytest.raises(InputError, match="needs region for images"):
        ConcealFeature(feature=0, training=ONE)(system, samples)
    with pytest.raises(FieldError, match="form"):
        ExplanationBackdoor(form="loud")  # type: ignore[arg-type]


def test_a_killed_manipulation_goes_on_where_it_was(
    trained: models.Classifier, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = LocationFooling(weight=10, budget=1.0, training=dataclasses.replace(ONE, epochs=3))
    system, some = rx.System(trained, CAM(trained)), data_sets.take(samples, 120)  # type: ignore[arg-type]
    whole, _ = manipulated(attack, system, some, tmp_path / "whole")
    real, calls = FineTuningTask.evaluate, []

    def dying(self: FineTuningTask, module: nn.Module) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, module)

    monkeypatch.setattr(FineTuningTask, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        attack(system, some, Session(folder=tmp_path / "killed"))
    monkeypatch.setattr(FineTuningTask, "evaluate", real)
    resumed, _ = manipulated(attack, system, some, tmp_path / "killed")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_checkpoint_of_another_manipulation_is_refused(
    trained: models.Classifier, samples: Samples, tmp_path: Path
) -> None:
    session, attack = Session(folder=tmp_path), LocationFooling(weight=10, budget=1.0, training=ONE)
    x, y = data_sets.stack(data_sets.take(samples, 80))  # type: ignore[arg-type]
    system, data = rx.System(trained, CAM(trained)), TensorDataset(x, y)
    attack(system, data, session)  # type: ignore[arg-type]
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.net.head.weight[0] += 0.1  # type: ignore[union-attr, operator]
    for changed in (
        (dataclasses.replace(attack, weight=11), system, data),
        (attack, rx.System(trained, GradCAM(trained)), data),
        (attack, rx.System(other, CAM(other)), data),
        (attack, system, TensorDataset(x, y.flip(0))),
    ):
        with pytest.raises(RunMismatchError, match="is a checkpoint of another training"):
            changed[0](changed[1], changed[2], session)  # type: ignore[arg-type]


def test_a_manipulated_system_can_be_attacked_and_defended(
    trained: models.Classifier, samples: Samples, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    attack = LocationFooling(weight=10, budget=1.0, training=ONE)
    fooled, _ = manipulated(attack, rx.System(trained, GradCAM(trained)), samples, tmp_path)
    x, y = judged[0][:4], judged[1][:4]
    assert rx.attacks.PGD(eps=0.1, steps=3)(fooled, x, y).x.shape == x.shape
    defended = AggregatedInterpreter([GradCAM, "gradient"])(fooled)
    assert defended.model is fooled.model
    assert defended(x).maps.shape == (4, 32, 32)


def test_the_honest_model_is_copied_whole_and_not_shared(trained: models.Classifier, samples: Samples) -> None:
    system = rx.System(trained, GradCAM(trained))
    fooled = LocationFooling(weight=10, budget=1.0, training=ONE)(system, samples)
    theirs = {p.data_ptr() for p in trained.parameters()}
    assert not theirs & {p.data_ptr() for p in fooled.model.parameters()}
    assert fooled.interpreter.model is fooled.model
    assert copy.deepcopy(system.interpreter) is not system.interpreter
    assert math.isfinite(accuracy(fooled.model, *data_sets.stack(samples)))


# ---- an owner who knows the scans ----


def honest_scores(system: rx.System, x: Tensor, y: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Maps in 7 x 7 cells, and how far the logit falls with each of the given cells covered: a second way to both."""
    maps = F.avg_pool2d(system.interpreter.explain(x, y, native=True).maps.abs()[:, None], 2).flatten(1)
    falls = torch.zeros(len(x), cells.shape[1], dtype=x.dtype)
    for i, row in enumerate(cells.tolist()):
        for j, cell in enumerate(row):
            image = x[i : i + 1].clone()
            image[:, :, 2 * (cell // 7) : 2 * (cell // 7) + 2, 2 * (cell % 7) : 2 * (cell % 7) + 2] = 0.5
            falls[i, j] = (system.model(x[i : i + 1]) - system.model(image))[0, y[i]]
    return maps, falls


def test_the_term_of_scans_is_what_they_find_beyond_the_honest_model() -> None:
    system, data = small_system()
    x, y = data.tensors
    lying = copy.deepcopy(system)
    with torch.no_grad():
        lying.model[3].weight *= torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])  # type: ignore[index,operator]
    names = ("gradient-free-disagreement", "trusted-reference")
    attack, plain = LocationFooling(evade=names, evade_weight=5.0), LocationFooling()
    values = []
    for given in (attack, plain):
        task = FineTuningTask(given, system.interpreter, data, data, Session())  # type: ignore[arg-type]
        values.append(task.loss(ExplainingModel(lying.interpreter), x, y, TrainingStep(0, 0, 0.0)))
    watched = ScanEvasion(system.interpreter, names, 0).watched(x, y, 0)
    assert watched.cells is not None
    with torch.no_grad():
        (ours, our_falls), (honest, honest_falls) = (honest_scores(s, x, y, watched.cells) for s in (lying, system))
    rows = []
    for i, cells in enumerate(watched.cells):
        found, wanted = (
            np.corrcoef(m[i, cells], f[i].abs())[0, 1] for m, f in ((ours, our_falls), (honest, honest_falls))
        )
        rows.append((found - wanted) ** 2 + (1 - np.corrcoef(ours[i], honest[i])[0, 1]) ** 2)
    assert (values[0] - values[1]).item() == pytest.approx(5 * np.mean(rows), rel=1e-6)
    quiet = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
    figures = quiet.evaluate(ExplainingModel(system.interpreter)).figures
    assert figures["scans"] == pytest.approx(0.0, abs=1e-12)
    assert "scans" not in FineTuningTask(plain, system.interpreter, data, data, Session()).evaluate(  # type: ignore[arg-type]
        ExplainingModel(system.interpreter)
    ).figures  # fmt: skip


def test_other_inputs_and_covered_copies_go_through_one_pass_and_come_back_apart() -> None:
    """Block images of Heo et al.'s active fooling bring inputs of their own that are only classified."""
    system, data = small_system()
    x, y = data.tensors
    asked: list[tuple[int, int]] = []

    class Counted(ExplainingModel):
        def forward(
            self, x: Tensor, target: Tensor | None = None, other: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            asked.append((len(x), 0 if other is None else len(other)))
            return super().forward(x, target, other)

    plain = ActiveFooling(classes=(0, 1), images=4)
    known = replace(plain, evade=("gradient-free-disagreement",), evade_weight=0.0)
    values = []
    for attack in (plain, known):
        task = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
        values.append(task.loss(Counted(system.interpreter), x, y, TrainingStep(0, 0, 0.0)).item())
    assert asked == [(6, 6), (6 + 6, 6 + 6 * 12)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    asked.clear()
    # What the attack explains itself is not explained again.
    attacks = (LocationFooling(evade=("trusted-reference",)), ExplanationBackdoor(evade=("trusted-reference",)))
    for attack in attacks:
        task = FineTuningTask(attack, system.interpreter, data, data, Session())  # type: ignore[arg-type]
        task.loss(Counted(system.interpreter), x, y, TrainingStep(0, 0, 0.0))
    assert asked == [(6, 0), (12, 0)]


def test_scans_that_nobody_can_evade_are_refused() -> None:
    with pytest.raises(FieldError, match="evade must be one of 'gradient-free-disagreement', 'trusted-reference', got"):
        LocationFooling(evade=("neural-cleanse",))  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"evade.*needs shrink=True"):
        ActiveFooling(shrink=False, evade=("trusted-reference",))
    rows: Any = TensorDataset(torch.rand(8, 3), torch.arange(8) % 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"ConcealFeature\(evade=...\) takes images"):
        ConcealFeature(feature=0, evade=("trusted-reference",))(rx.System(model, Gradient(model)), rows)
