"""Trainings for robust predictions: what each claims, the terms of its loss, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.attacks import FGSM, PGD
from robustexplain.attacks.inner import attacked, plain
from robustexplain.autograd.layers import pooled_head
from robustexplain.data import Data, stack, take
from robustexplain.defenses import (
    CURE,
    TRADES,
    AdversarialTraining,
    DefensiveDistillation,
    EnsembleAdversarialTraining,
    FeatureDenoising,
    InterpretabilityTraining,
    Retrained,
)
from robustexplain.defenses.models import ensemble, on_attacks
from robustexplain.defenses.models import fine_tuned as cure_frame
from robustexplain.defenses.models.cure import CurvatureChange
from robustexplain.defenses.models.distillation import Tempered
from robustexplain.defenses.models.ensemble import EnsembleLoss
from robustexplain.defenses.models.inner_attacks import Divergence, RandomFGSM
from robustexplain.defenses.models.interpretability import DiscrepancyLoss
from robustexplain.defenses.models.loss_module import LossModule
from robustexplain.defenses.models.trades import TradesLoss
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM, Gradient
from robustexplain.models import Classifier
from robustexplain.models.denoised import FILTERS
from robustexplain.training import Training, TrainingStep, cross_entropy, fit

EPS = 0.06
NOW = TrainingStep(3, 1, 0.5)
LONG = Training(epochs=4, batch_size=32, lr=1e-2)
SHORT = replace(LONG, epochs=2)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def robust(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy under PGD of 20 steps."""
    attack = PGD(EPS, steps=20, step_size=0.01, random_start=True, seed=1)
    return accuracy(model, attack(plain(model), x, y).x, y)


@pytest.fixture(scope="module")
def control(trained: Classifier, digits: Data) -> nn.Module:
    """The network trained again by cross-entropy alone, as long as the others."""
    return Retrained(LONG).hardened(trained, take(digits.train, 448))


# --- TRADES ---


def test_trades_keeps_more_answers_under_pgd_than_plain_fine_tuning_of_the_same_length(
    trained: Classifier, control: nn.Module, digits: Data
) -> None:
    x, y = stack(take(digits.test, 60))
    defense = TRADES(attack=Divergence(EPS, steps=4, step_size=0.025), training=LONG)
    model = defense.hardened(trained, take(digits.train, 448))
    found = [(accuracy(m, x, y), robust(m, x, y)) for m in (control, model)]
    print(f"accuracy, and under PGD: control {found[0]}, TRADES {found[1]}")
    assert found[1][1] > found[0][1] + 0.3
    assert found[1][0] > found[0][0] - 0.1


def test_the_loss_of_trades_is_its_formula(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    model, attack = copy.deepcopy(trained).eval(), Divergence(EPS, steps=4, step_size=0.025)
    moved = attacked(attack, model, x, y, NOW)
    p, q = model(x).softmax(1), model(moved).softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    found = TradesLoss(attack=attack, model=model, beta=6.0)(model, x, y, NOW)
    torch.testing.assert_close(found, -p[torch.arange(8), y].log() + 6 * divergence, rtol=1e-3, atol=1e-4)
    assert bool(((moved - x).abs() <= EPS + 1e-6).all())
    noise = EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    there = model((x + noise).clamp(0, 1)).softmax(1)
    assert float(divergence.detach().mean()) > 3 * float((p * (p / there).log()).sum(1).detach().mean())


# --- ensemble adversarial training ---


def test_ensemble_training_stops_inputs_of_another_network_and_not_an_attack_on_itself(
    trained: Classifier, control: nn.Module, digits: Data
) -> None:
    x, y = stack(take(digits.test, 60))
    data = take(digits.train, 448)
    defense = EnsembleAdversarialTraining(
        ("small-cnn",), SHORT, networks=(trained,), attack=RandomFGSM(2 * EPS), training=SHORT
    )
    model = defense.hardened(trained, data)
    other = models.build("small-cnn", num_classes=10, in_channels=1, seed=9)
    fit(other, cross_entropy, data, SHORT, name="another")
    carried = FGSM(2 * EPS)(plain(other), x, y).x
    strong = PGD(2 * EPS, steps=20, step_size=0.02)
    own = [accuracy(m, strong(plain(m), x, y).x, y) for m in (control, model)]
    found = [accuracy(m, carried, y) for m in (control, model)]
    print(f"on carried-over inputs: control {found[0]}, ensemble {found[1]}; under PGD {own}")
    assert found[1] > found[0] + 0.2
    assert own[1] < 0.3


def test_networks_that_are_handed_in_keep_their_modes(trained: Classifier, digits: Data) -> None:
    other = copy.deepcopy(trained).train()
    next(iter(other.net.children())).eval()
    before = [part.training for part in other.modules()]
    defense = EnsembleAdversarialTraining((), networks=(other, other), training=replace(SHORT, epochs=1))
    weights = copy.deepcopy(other.state_dict())
    defense.hardened(trained, take(digits.train, 64))
    assert [part.training for part in other.modules()] == before
    assert all(torch.equal(found, weights[name]) for name, found in other.state_dict().items())


def test_every_sample_of_a_step_is_attacked_on_one_of_all_networks(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:8], judged[1][:8]
    model, other = copy.deepcopy(trained).train(), models.build("small-resnet", num_classes=10, in_channels=1)
    loss = EnsembleLoss(RandomFGSM(EPS), model, (other,))
    drawn = [loss.source(replace(NOW, number=number)) for number in range(20)]
    assert {id(network) for network in drawn} == {id(model), id(other)}
    at = next(i for i, network in enumerate(drawn) if network is other)
    step = replace(NOW, number=at)
    moved = loss.attacked(x, step)
    assert model.training
    size = (moved - x).abs()
    assert bool((size <= EPS + 1e-6).all())
    # A random corner of half the size, and a step of the other half: 0 or eps, where no pixel is clipped.
    inside = (x - EPS >= 0) & (x + EPS <= 1)
    assert bool(((size < 1e-6) | (size > EPS - 1e-6))[inside].all())
    with torch.no_grad():
        assert float(F.cross_entropy(other(moved), other(x).argmax(1))) > float(
            F.cross_entropy(other(x), other(x).argmax(1))
        )
    model.eval()
    expected = sum(F.cross_entropy(model(v), y, reduction="none") for v in (x, moved)) / 2
    torch.testing.assert_close(loss(model, x, y, step), expected, rtol=1e-4, atol=1e-5)


# --- distillation ---


def test_distillation_hides_gradients_of_the_cross_entropy_and_an_attack_on_logits_succeeds(
    trained: Classifier, control: nn.Module, digits: Data
) -> None:
    x, y = stack(take(digits.test, 60))
    model = DefensiveDistillation(training=LONG).hardened(trained, take(digits.train, 448))

    def by_hand(network: nn.Module, scale: float) -> tuple[float, float]:
        """The share of zero gradients, and accuracy under sign steps along the cross-entropy of scaled logits."""
        moved, zero = x.clone(), 0.0
        for _ in range(10):
            moved.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(scale * network(moved), y, reduction="sum"), moved)
            zero = zero or float((g == 0).flatten(1).all(1).double().mean())
            moved = (moved.detach() + 0.02 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        return zero, accuracy(network, moved, y)

    found = {scale: [by_hand(network, scale) for network in (control, model)] for scale in (1.0, 1 / 50)}
    hidden, steady = found[1.0][1]
    print(f"by scale of the logits, zero gradients and accuracy: control and distilled {found}")
    assert hidden > 0.5
    assert found[1.0][0][0] == 0.0
    assert found[1.0][0][1] < 0.1 < 0.5 < steady
    # Logits divided by the temperature have a gradient again, and so has this library's own PGD.
    assert found[1 / 50][1][1] < 0.1
    assert accuracy(model, PGD(0.1, steps=10, step_size=0.02)(plain(model), x, y).x, y) < 0.1
    assert accuracy(model, x, y) > 0.9


def test_the_losses_of_distillation_are_tempered_cross_entropies(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    student = copy.deepcopy(trained).eval()
    with torch.no_grad():
        student.net.head.weight.mul_(1.5)
    hard = Tempered(5.0)(student, x, y, NOW)
    torch.testing.assert_close(hard, F.cross_entropy(student(x) / 5, y, reduction="none"))
    wanted = (trained(x) / 5).softmax(1)
    soft = Tempered(5.0, trained).smoothed(0.1)(student, x, y, NOW)
    expected = F.cross_entropy(student(x) / 5, 0.9 * wanted + 0.01, reduction="none")
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-6)


# --- CURE ---


def test_cure_lowers_curvature(trained: Classifier, control: nn.Module, digits: Data) -> None:
    x, y = stack(take(digits.test, 60))
    defense = CURE(replace(SHORT, lr=3e-3), h=(0.3, 1.0))
    model = defense.hardened(trained, take(digits.train, 448))
    curvature = []
    for m in (control, model):
        loss = CurvatureChange(m, defense)
        moved = loss.others(x, y, NOW)
        curvature.append(float((loss.terms(m, x, y, NOW, moved) - loss.task(m(x), y)).detach().mean()))
    print(f"curvature {curvature}, accuracy {accuracy(model, x, y)}, under PGD {robust(model, x, y)}")
    assert curvature[1] < 0.1 * curvature[0]
    assert accuracy(model, x, y) > 0.9


def test_the_loss_of_cure_is_its_formula(smooth_net: nn.Module, grey: Tensor) -> None:
    net, x, y = copy.deepcopy(smooth_net).double(), grey.double(), torch.arange(5) % 4
    settings = CURE(weight=0.7, h=(0.1, 0.4))
    found = CurvatureChange(net, settings)(LossModule(net, net), x, y, NOW)
    for i in range(5):

        def slope(at: Tensor, i: int = i) -> Tensor:
            at = at.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(net(at), y[i : i + 1]), at)[0]

        own = slope(x[i : i + 1])
        z = own.sign() / own.sign().norm()
        change = (slope(x[i : i + 1] + 0.4 * z) - own).square().sum()
        expected = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) + 0.7 * change
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)
    (first,) = CurvatureChange(net, settings).others(x, y, replace(NOW, epoch=0))
    torch.testing.assert_close((first - x).flatten(1).norm(dim=1), x.new_full((5,), 0.1))


# --- denoising blocks ---


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_is_what_it_says(name: str) -> None:
    x = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = models.DenoisingBlock(4, name).double().eval()  # type: ignore[arg-type]
    assert torch.equal(block(x), x), "a new block changes nothing"
    found = block.filtered(x)
    if name in ("mean", "median", "gaussian"):
        kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
        slow = {
            "mean": lambda v: ndimage.uniform_filter(v, 3, mode="nearest"),
            "median": lambda v: ndimage.median_filter(v, 3, mode="nearest"),
            "gaussian": lambda v: ndimage.correlate(v, kernel, mode="nearest"),
        }[name]
        expected = torch.tensor(np.array([[slow(channel.numpy()) for channel in image] for image in x]))
    else:
        embedded = name == "non-local"
        assert embedded == hasattr(block, "theta") == hasattr(block, "phi")
        expected, parts = torch.zeros_like(x), (block.theta(x), block.phi(x)) if embedded else (x, x)
        a, b = (part.flatten(2) for part in parts)
        for i in range(30):
            weights = torch.stack([(a[:, :, i] * b[:, :, j]).sum(1) for j in range(30)], 1)
            weights = (weights / 2**0.5).softmax(1) if embedded else weights / 30
            expected.flatten(2)[:, :, i] = (x.flatten(2) * weights[:, None]).sum(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(block, x[:1].requires_grad_(), atol=1e-6)


def stirred(model: nn.Module) -> nn.Module:
    """The model with blocks that change something."""
    for part in model.modules():
        if isinstance(part, models.DenoisingBlock):
            nn.init.ones_(part.bn.weight)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("way", ["plain", "transforms", "binary"])
def test_a_network_with_blocks_is_saved_and_loaded(
    way: str, trained: Classifier, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, model = judged[0][:4], copy.deepcopy(trained)
    if way == "transforms":
        model = model.with_transforms(["bit-depth-3"])
    ends = models.stage_ends(model, x)
    assert ends == {"net.features.5": 32, "net.features": 64}
    made = stirred(models.denoised(models.Output(model, 0) if way == "binary" else model, ends, "median"))
    if way == "binary":
        made = made.model
    if way == "plain":
        made = models.with_transforms(made, ["bit-depth-3"])
    assert float((made(x) - model(x)).abs().max()) > 1e-4
    system = rx.System(made, GradCAM(made))
    loaded = rx.System.load(system.save(tmp_path))
    assert torch.equal(loaded(x).maps, system(x).maps)
    assert torch.equal(loaded.model(x), made(x))


class Own(nn.Module):
    """A network of somebody's own, one of whose layers is called in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.conv2d(x, self.first.weight, self.first.bias, 2).relu()
        logits: Tensor = self.head(self.second(x).relu().mean((2, 3)))
        return logits


def test_a_model_of_ones_own_gets_blocks_or_is_refused(
    digits: Data, judged: tuple[Tensor, Tensor], tmp_path: Path, tiny_vit: nn.Module
) -> None:
    own, x = Own().requires_grad_(False).eval(), judged[0][:4]
    brief = Training(epochs=1, batch_size=20, lr=1e-2)
    defense = FeatureDenoising(("second",), attack=PGD(EPS, 1, 0.05), training=brief)
    system = defense(rx.System(own, Gradient(own)), take(digits.train, 40))
    system.save(tmp_path)
    with pytest.raises(InputError, match="do not fit"):
        rx.System.load(tmp_path, model=own, weights="stored")
    loaded = rx.System.load(tmp_path, model=models.denoised(own, {"second": 8}), weights="stored")
    assert torch.equal(loaded(x).maps, system(x).maps)
    for layers, words in (
        (("first",), "'first' of Own does not run"),
        (("head",), "'head' gives no feature map"),
        (("third",), "third"),
    ):
        with pytest.raises((UnsupportedModelError, UnknownNameError), match=words):
            replace(defense, layers=layers).hardened(own, digits.train)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    with pytest.raises(UnsupportedModelError, match="no feature maps"):
        replace(defense, layers=()).hardened(flat, digits.train)
    table = TensorDataset(torch.rand(8, 4), torch.arange(8) % 3)
    with pytest.raises(InputError, match=r"filters maps of images \[C, H, W\]"):
        defense.hardened(nn.Linear(4, 3).eval(), table)
    # Attention [B, heads, N, N] is no feature map.
    assert models.stage_ends(tiny_vit, torch.rand(1, 1, 16, 16)) == {"net.patch_embed.proj": 24}


def test_a_strided_block_is_not_cut_open() -> None:
    model = models.build("small-resnet", num_classes=3, in_channels=1)
    assert models.stage_ends(model, torch.rand(1, 1, 28, 28)) == {"net.stages.0": 24, "net.stages": 96}
    made = models.denoised(model, {"net.stages.0": 24})
    assert [name for name, _ in made.net.stages.named_children()] == ["0", "0_denoise", "1", "2"]
    assert set(dict(model.named_parameters())) < set(dict(made.named_parameters()))


# --- at the door ---


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdversarialTraining(PGD(0.0)), r"attack\.eps must be above 0"),
        (lambda: TRADES(attack=Divergence(0.0)), r"attack\.eps must be above 0"),
        (lambda: EnsembleAdversarialTraining(attack=RandomFGSM(0.0)), r"attack\.eps must be above 0"),
        (lambda: FeatureDenoising(attack=PGD(0.0)), r"attack\.eps must be above 0"),
        (lambda: EnsembleAdversarialTraining(()), "static must name one at least"),
        (lambda: EnsembleAdversarialTraining(("smal-cnn",)), "small-cnn"),
        (lambda: DefensiveDistillation(0.0), "temperature must be above 0"),
        (lambda: InterpretabilityTraining(attack=PGD(0.0, random_start=True)), r"attack\.eps must be above 0"),
        (lambda: InterpretabilityTraining(attack=PGD()), r"attack\.random_start must be on"),
        (lambda: CURE(h=()), "h must hold lengths above 0"),
        (lambda: FeatureDenoising(filter="mode"), "filter must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_networks_that_do_not_fit_are_refused_before_anything_is_trained(
    trained: Classifier, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cure_frame, ensemble, on_attacks):
        monkeypatch.setattr(module, "fit", lambda *a, **k: pytest.fail("something is trained"))
    other = models.build("small-cnn", num_classes=3, in_channels=1)
    with pytest.raises(InputError, match="answers with 3 classes, and the classifier with 10"):
        EnsembleAdversarialTraining(networks=(other,)).hardened(trained, digits.train)
    with pytest.raises(InputError, match=r"cure has nothing to train: training\.freeze names every part"):
        CURE(Training(freeze=("net",))).hardened(trained, digits.train)
    with pytest.raises(UnsupportedModelError, match="fresh weights need a model that robustexplain"):
        TRADES(fresh=True).hardened(models.denoised(trained, {"net.features": 64}), digits.train)


# --- INT ---


def int_loss(model: nn.Module, settings: InterpretabilityTraining, x: Tensor) -> DiscrepancyLoss:
    return DiscrepancyLoss(model, settings, pooled_head(model, x[:1]))


@pytest.mark.parametrize(("task", "classes"), [("clean", "all"), ("attacked", "all"), ("clean", "label")])
def test_the_loss_of_int_is_its_formula(
    task: Any, classes: Any, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:4], judged[1][:4]
    model = copy.deepcopy(trained).eval()
    attack = PGD(EPS, 4, 0.02, random_start=True)
    settings = InterpretabilityTraining(weight=0.3, task=task, classes=classes, attack=attack, ramp=(0, 0))
    loss = int_loss(model, settings, x)
    (moved,) = loss.others(x, y, NOW)
    found = loss(LossModule(model, model), x, y, NOW)
    cam, logits = CAM(model), model(moved)
    for i in range(4):
        change = [
            (cam.explain(moved[i : i + 1], c, native=True).maps - cam.explain(x[i : i + 1], c, native=True).maps)
            .abs()
            .sum()
            for c in (torch.tensor([k]) for k in range(10))
        ]
        label, rest = int(y[i]), [c for c in range(10) if c != int(y[i])]
        odds = logits[i, rest].softmax(0)
        total = change[label]
        if classes == "all":
            total = total + sum(p * change[c] for p, c in zip(odds, rest, strict=True))
        own = F.cross_entropy(model((x if task == "clean" else moved)[i : i + 1]), y[i : i + 1])
        torch.testing.assert_close(found[i], own + 0.3 * total, rtol=1e-3, atol=1e-4)
    # The inner attack raises what it is to raise, beyond noise of the same size.
    noise = (x + EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    at = [loss.terms(model, x, y, NOW, (v,)) - loss.task(model(x), y) for v in (moved, noise)]
    assert float(at[0].detach().mean()) > 1.3 * float(at[1].detach().mean())


def test_int_steadies_cams_and_some_predictions(trained: Classifier, control: nn.Module, digits: Data) -> None:
    x, y = stack(take(digits.test, 60))
    attack = PGD(EPS, 4, 0.025, random_start=True)
    training = replace(LONG, epochs=3, lr=3e-3)
    defense = InterpretabilityTraining(training, attack=attack, ramp=(0.0, 0.5))
    model = defense.hardened(trained, take(digits.train, 448))
    moves = []
    for m in (control, model):
        loss = int_loss(m, replace(defense, inner="prediction", ramp=(0, 0)), x)
        logits = (loss.terms(m, x, y, NOW, loss.others(x, y, NOW)) - loss.task(m(x), y)).detach() / 0.01
        moves.append(float(logits.mean()) / float(CAM(m)(x, y).abs().flatten(1).sum(1).mean().detach()))
    print(f"discrepancy by size of the map {moves}, accuracy {accuracy(model, x, y)}, under PGD {robust(model, x, y)}")
    assert moves[1] < 0.5 * moves[0]
    assert accuracy(model, x, y) > 0.85
    assert robust(model, x, y) > 0.15
    assert robust(control, x, y) < 0.05


def test_the_radius_of_int_rises() -> None:
    settings = InterpretabilityTraining(ramp=(0.2, 0.6))
    assert [settings.risen(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert InterpretabilityTraining(ramp=(0, 0)).risen(0.0) == 1.0
    with pytest.raises(InputError, match="ramp must be two rising shares"):
        InterpretabilityTraining(ramp=(0.6, 0.2))
