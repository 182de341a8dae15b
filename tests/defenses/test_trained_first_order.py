"""ATEX, InfoDrop, saliency-guided training, ASGT and Woods: their formulas, and what each training moves."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain.attacks import PGD
from robustexplain.autograd.rectifiers import HalfHuber
from robustexplain.data import Data, Samples, stack, take
from robustexplain.defenses import ATEX, AdversarialSaliencyGuided, BetaSmoothing, InfoDrop, SaliencyGuided, Woods
from robustexplain.defenses.models.atex import ATEXLoss, component
from robustexplain.defenses.models.fine_tuned import FineTuned
from robustexplain.defenses.models.infodrop import InfoDropLoss
from robustexplain.defenses.models.input_gradients import classified, gradient, score
from robustexplain.defenses.models.loss_module import LossModule
from robustexplain.defenses.models.saliency_guided import SaliencyGuidedLoss, divergence, masked
from robustexplain.defenses.models.self_information import Patches, Repetition, droppable, dropping
from robustexplain.defenses.models.woods import Controller, WoodsLoss
from robustexplain.errors import FieldError, UnsupportedModelError
from robustexplain.interpreters import Gradient
from robustexplain.interpreters.base import pick
from robustexplain.models import Classifier
from robustexplain.random_streams import Streams
from robustexplain.training import Training, TrainingStep, cross_entropy, fit

NOW = TrainingStep(3, 1, 0.5)
SETTINGS = Training(epochs=2, batch_size=32, lr=2e-3, weight_decay=0.0)
REPETITION = Repetition(rate=1.5, temperature=0.1, bandwidth=1.0, radius=2, neighbours=4)


@pytest.fixture(scope="module")
def data(digits: Data) -> Samples:
    """Samples to fine-tune on."""
    return take(digits.train, 160)


@pytest.fixture(scope="module")
def control(trained: Classifier, data: Samples) -> nn.Module:
    """Plain fine-tuning of the same length."""
    return fit(copy.deepcopy(trained), cross_entropy, data, SETTINGS, name="control", evaluating=True)


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def slopes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    given, logits = classified(model, x)
    return gradient(score(logits, y, "label"), given, graph=False).detach()


# --- InfoDrop ---


def oracle(x: Tensor, offsets: list[Tensor], patches: Patches, repetition: Repetition) -> Tensor:
    """The chances by loops, for a kernel of 3, stride 2, padding 1."""
    _, height, width = x.shape
    radius, found = repetition.radius, []

    def at(row: int, column: int) -> Tensor:
        return x[:, row, column] if 0 <= row < height and 0 <= column < width else torch.zeros_like(x[:, 0, 0])

    for i in range(0, height, 2):
        for j in range(0, width, 2):
            for offset in offsets:
                down, right = (int(v) - radius for v in offset)
                window = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
                found.append(sum((at(r, c) - at(r + down, c + right)).square().sum() for r, c in window))
    distances = torch.stack(found).reshape(-1, len(offsets))  # type: ignore[arg-type]
    density = (-distances / (2 * repetition.bandwidth**2 * distances.mean())).exp().mean(1)
    p = density ** (1 / repetition.temperature)
    return 1 - (1 - p / p.sum()) ** int(repetition.rate * len(p))


def test_the_chance_of_a_patch_is_that_of_the_paper_and_its_own_samples_alone() -> None:
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    patches = Patches((3, 3), (2, 2), (1, 1), (1, 1))
    found = REPETITION.chances(x, patches, Streams.of(x, 5))
    offsets = REPETITION._offsets(x, Streams.of(x, 5))
    for i in range(3):
        expected = oracle(x[i], [offset[:, i] for offset in offsets], patches, REPETITION)
        torch.testing.assert_close(found[i].flatten(), expected)
    torch.testing.assert_close(REPETITION.chances(x[1:2], patches, Streams.of(x[1:2], 5)), found[1:2])


def test_texture_is_dropped_where_an_edge_is_not() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[..., 8:] = 1.0
    chances = REPETITION.chances(x, Patches((3, 3), (1, 1), (1, 1), (1, 1)), Streams.of(x, 0))[0]
    assert float(chances[4:12, 6:10].max()) < 0.5 * float(chances[4:12, 3:5].min())


def test_what_is_dropped_lies_on_the_rectifier_behind_the_convolution(grey: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.first(x))
            if self.in_place:
                F.relu_(z)
            else:
                z = torch.relu(z)
            seen.append(z)
            return self.second(z).mean((2, 3))

    net, seen = Net(False).eval(), list[Tensor]()
    other = Net(True).eval()
    other.load_state_dict(net.state_dict())
    for model in (net, other):
        with dropping(1, REPETITION, Streams.of(grey, 0)) as dropped:
            model(grey).sum().backward()
        model(grey)
    (share,) = dropped.shares
    assert 0.05 < share < 0.95
    torch.testing.assert_close(seen[0], seen[2])
    torch.testing.assert_close(seen[1], seen[3])
    gone = (seen[0] == 0) & (seen[1] > 0)
    assert bool(gone.any())
    assert bool((seen[0][~gone] == seen[1][~gone]).all())
    torch.testing.assert_close(net.first.weight.grad, other.first.weight.grad)
    assert droppable(net, grey, 3, REPETITION) == 1, "no rectifier stands behind the second"


def test_infodrop_makes_the_network_right_without_texture_and_deploys_the_plain_one(
    trained: Classifier, control: nn.Module, digits: Data, data: Samples
) -> None:
    x, y = stack(take(digits.test, 100))
    defense = InfoDrop(layers=2, training=replace(SETTINGS, lr=5e-3), after=replace(SETTINGS, epochs=1, lr=1e-4))
    model = defense.hardened(trained, data)
    lost = []
    for network in (control, model):
        loss = InfoDropLoss(network, 2, Repetition(1.5, 0.03, 1.0, 3, 9))
        with torch.no_grad():
            lost.append(float(loss(LossModule(network, network), x, y, NOW).mean()))
    print(f"cross-entropy under dropout {lost} (plain fine-tuning, InfoDrop)")
    assert lost[1] < 0.8 * lost[0]
    assert type(model) is type(trained)
    assert right(model, x, y) > right(control, x, y) - 0.1


# --- ATEX ---


def test_atex_asks_the_teacher_along_the_explanation_and_moves_across_it(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = 0.2 + 0.6 * judged[0][:4].double(), judged[1][:4]
    model = copy.deepcopy(trained).double().eval()
    settings = ATEX(draws=3, samples=4)
    loss = ATEXLoss(model, settings, copy.deepcopy(model))
    points, known = loss.others(x, y, NOW)
    direction = loss.explanation(x, y, Streams.of(x, NOW.seed, "atex", NOW.epoch))
    unit = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    most = direction.flatten(1).abs().amax(1)
    for i in range(4):
        for point, target in zip(points.unflatten(0, (4, 3))[i], known.unflatten(0, (4, 3))[i], strict=True):
            along = (point - x[i]).mul(unit[i]).sum() * unit[i]
            place = float((along / direction[i]).flatten()[direction[i].abs().argmax()] * most[i] / 0.08)
            assert 10 * place == pytest.approx(round(10 * place), abs=1e-6)
            assert abs(place) < 0.5 + 1e-9
            assert float((point - x[i] - along).abs().max()) < 0.16
            torch.testing.assert_close(target.softmax(0), (model(x[i : i + 1] + along)[0] / 4).softmax(0))
    expected = (
        F.kl_div(model(points).log_softmax(1), known.softmax(1), reduction="none").sum(1).unflatten(0, (4, 3)).mean(1)
    )
    torch.testing.assert_close(loss(LossModule(model, model), x, y, NOW), expected)


def test_atex_moves_answers_less_across_the_explanation_than_plain_fine_tuning(
    trained: Classifier, control: nn.Module, digits: Data, data: Samples
) -> None:
    x, y = stack(take(digits.test, 60))
    # A temperature near one: at the paper's, the answers must first become flat.
    defense = ATEX(draws=3, samples=2, temperature=2.0, training=replace(SETTINGS, epochs=5))
    model, shares = defense.hardened(trained, data), []
    for network in (control, model):
        direction = ATEXLoss(network, ATEX(), network).explanation(x, y, Streams.of(x, 1))
        noise = Streams.of(x, 2).uniform(x, -0.08, 0.08)
        across = noise - component(noise, direction)
        sizes = [v.flatten(1).norm(dim=1)[:, None, None, None] for v in (across, direction)]
        moves = [
            (pick(network(x + v), y) - pick(network(x), y)).abs().mean()
            for v in (across, direction * sizes[0] / sizes[1])
        ]
        shares.append(float((moves[0] / moves[1]).detach()))
    print(f"change across over change along {shares}, accuracy {right(model, x, y)} (plain fine-tuning, ATEX)")
    assert shares[1] < 0.85 * shares[0]
    assert right(model, x, y) > 0.7


# --- saliency-guided training ---


def test_the_smallest_gradients_are_masked_within_the_inputs_own_range(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = 0.1 + 0.5 * judged[0][:5], judged[1][:5]
    found = masked(trained, x, y, 0.3, Streams.of(x, 0))
    changed = (found != x)[:, 0]
    size = slopes(trained, x, y).abs()[:, 0]
    count = int(0.3 * 1024)
    for i in range(5):
        least = size[i].flatten().sort().values
        assert int(changed[i].sum()) == pytest.approx(count, abs=5)
        assert float(size[i][changed[i]].max()) <= float(least[count - 1])
        assert float(x[i].min()) <= float(found[i].min()) <= float(found[i].max()) <= float(x[i].max())
    alone = masked(trained, x[2:3], y[2:3], 0.3, Streams.of(x[2:3], 0))
    assert float((alone != found[2:3]).double().mean()) < 0.01
    # With an attack the mask lies on its input, and both are classified.
    attack = PGD(0.06, 2, 0.03)
    for given, parts in ((None, 1), (attack, 2)):
        loss = SaliencyGuidedLoss(trained, 0.3, 2.0, given)
        others = loss.others(x, y, NOW)
        expected = 2.0 * divergence(trained(x), trained(others[-1]))
        for v in (x, *others[:-1]):
            expected = expected + F.cross_entropy(trained(v), y, reduction="none")
        assert len(others) == parts
        torch.testing.assert_close(loss(LossModule(trained, trained), x, y, NOW), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["saliency-guided", "asgt"])
def test_answers_depend_less_on_the_pixels_of_the_smallest_gradients(
    name: str, trained: Classifier, control: nn.Module, digits: Data, data: Samples
) -> None:
    x, y = stack(take(digits.test, 60))
    once = replace(SETTINGS, lr=5e-3)
    defense: FineTuned = SaliencyGuided(training=once)
    if name == "asgt":
        defense = AdversarialSaliencyGuided(attack=PGD(0.03, 2, 0.02), share=0.5, training=once)
    model = defense.hardened(trained, data)
    moved = []
    for network in (control, model):
        rest = masked(network, x, y, 0.5, Streams.of(x, 9))
        moved.append(float(divergence(network(x), network(rest)).detach().mean()))
    print(f"divergence without half of the pixels {moved} (plain fine-tuning, {name})")
    assert moved[1] < 0.6 * moved[0]


# --- Woods ---


def test_the_half_huber_loss_is_smooth_and_stays_in_the_model(
    trained: Classifier, few: Dataset[Any], tmp_path: Path
) -> None:
    z = torch.linspace(-1, 1.5, 26, dtype=torch.float64, requires_grad=True)
    value = HalfHuber(0.5)(z)
    expected = torch.where(z < 0, 0 * z, torch.where(z < 0.5, z.square(), z - 0.25))
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(slope, (z / 0.5).clamp(0, 1).detach(), atol=1e-9, rtol=0)
    hardened = Woods(attack=None, training=Training(epochs=1, batch_size=20, lr=1e-3))(
        rx.System(trained, Gradient(trained)), few
    )
    inner = hardened.model.model
    x = stack(few, range(3))[0]
    assert isinstance(inner, Classifier)
    assert not torch.allclose(hardened.model(x), inner(x))
    assert torch.equal(rx.System.load(hardened.save(tmp_path)).model(x), hardened.model(x))
    with pytest.raises(UnsupportedModelError, match="this HalfHuberNetwork calls none"):
        BetaSmoothing()(hardened, few)
    assert Woods(attack=None, delta=None, training=Training(epochs=1)).hardened(trained, few).state_dict().keys() == (
        trained.state_dict().keys()
    )


def test_a_step_shows_the_network_its_batch_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    loss = Woods(attack=None, delta=None)._loss(net.eval(), torch.rand(1, 1, 4, 4))
    net.train()
    loss.others(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), NOW)
    assert int(net[2].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_the_weight_follows_the_cross_entropy_and_the_slope_falls(
    trained: Classifier, control: nn.Module, digits: Data, data: Samples, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:8], judged[1][:8]
    settings = Woods(psi=3.0, target=1.5, attack=None, tandem=0.5)
    loss = WoodsLoss(trained, settings, Controller(), 10)
    module = LossModule(trained, trained)
    found = loss(module, x, y, NOW)
    _, classes, tandem = loss.others(x, y, NOW)
    assert len(set(tandem.tolist())) == 2
    given, logits = classified(trained, x)
    task = F.cross_entropy(logits, y, reduction="none")
    for i in range(8):
        others = [logits[i, k] for k in range(10) if k != int(y[i])]
        wanted = logits[i, y[i]] - torch.stack(others).max() if tandem[i] else logits[i, classes[i]]
        (slope,) = torch.autograd.grad(wanted, given, retain_graph=True)
        torch.testing.assert_close(found[i], task[i] + 3.0 * slope[i].square().mean(), rtol=1e-4, atol=1e-5)
    rise = min(max(math.log(1.5 / float(task.mean().detach())), -0.01), 1.0)
    assert float(loss.controller.integral) == pytest.approx(rise)
    assert float(loss.psi) == pytest.approx(3.0 * math.exp(0.02 * rise))
    # A network that is wrong lowers it, slowly.
    loss(module, x, (y + 1) % 10, NOW)
    assert float(loss.controller.integral) == pytest.approx(rise - 0.01)

    x, y = stack(take(digits.test, 60))
    defense = Woods(psi=30.0, attack=PGD(0.5, 1, 0.5, norm="l2"), training=replace(SETTINGS, lr=5e-3))
    model = defense.hardened(trained, data)
    steep = [float(slopes(network, x, y).flatten(1).norm(dim=1).mean()) for network in (control, model)]
    print(f"norm of the label's gradient {steep} (plain fine-tuning, Woods)")
    assert steep[1] < 0.6 * steep[0]
    assert right(model, x, y) > 0.7


# --- what is refused ---


def test_what_cannot_be_trained_is_refused_at_the_door(few: Dataset[Any]) -> None:
    for make, words in (
        (lambda: ATEX(eps=0.0), r"ATEX\.eps must be above 0"),
        (lambda: ATEX(reach=0.0), r"ATEX\.reach must be above 0"),
        (lambda: SaliencyGuided(share=0.0), r"share must be above 0 and below 1"),
        (lambda: AdversarialSaliencyGuided(attack=PGD(0.0)), r"attack\.eps must be above 0"),
        (lambda: AdversarialSaliencyGuided(share=1.0), r"share must be above 0 and below 1"),
        (lambda: Woods(attack=PGD(0.0)), r"attack\.eps must be above 0"),
        (lambda: InfoDrop(radius=0), r"radius must be above 0"),
        (lambda: InfoDrop(softplus=3.0), r"softplus must be none"),
    ):
        with pytest.raises(FieldError, match=words):
            make()  # type: ignore[no-untyped-call]
    side = stack(few, range(1))[0][0].numel()
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(side, 8), nn.GELU(), nn.Linear(8, 10)).eval()
    with pytest.raises(UnsupportedModelError, match="half Huber loss of woods replaces rectifiers"):
        Woods().hardened(smooth, few)
    with pytest.raises(UnsupportedModelError, match="this Sequential has 0; set layers to at most that"):
        InfoDrop().hardened(smooth, few)
