"""What stands in front of the classifier: whose map is shown, where it lies, and how each defense falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain.attacks import PGD, random_classes
from robustexplain.attacks.adaptive import DRAWS, draws_for
from robustexplain.data import Data, stack, take
from robustexplain.defenses import Defense, GuidedDenoiser, InputTransform, MagNetReformer, RandomResizing, RegionVoting
from robustexplain.defenses.inputs.denoiser import GuidedLoss
from robustexplain.defenses.inputs.magnet import ReconstructionLoss
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM, Gradient, OfDraws, OfTransformed
from robustexplain.models import AutoEncoder, Classifier, DenoisingUNet, Reformed, Transformed, Voted, with_transforms
from robustexplain.training import Session, Training
from robustexplain.transforms import ResizePad


def brought_back(maps: Tensor, model: Voted, x: Tensor) -> Tensor:
    return torch.stack([model.taken_back(m, x, i) for i, m in enumerate(maps)]).mean(0)


# --- which image is explained, and where the map lies ---


def test_the_map_of_many_draws_is_the_mean_of_their_maps_each_taken_back(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    root = rx.System(trained, GradCAM(trained))
    system = RandomResizing(6, 4)(root)
    model = system.model
    assert isinstance(model, Voted)
    seen = system(x)
    versions = [model.version(x, i) for i in range(4)]
    torch.testing.assert_close(seen.logits, torch.stack([trained(v) for v in versions]).mean(0))
    classes = seen.logits.argmax(1)
    maps = torch.stack([root.interpreter(v, classes) for v in versions])
    torch.testing.assert_close(seen.maps, brought_back(maps, model, x))
    assert not torch.allclose(seen.maps, maps.mean(0)), "taking back changes nothing"
    plain = RandomResizing(6, 4, explained="raw")(root)(x)
    torch.testing.assert_close(plain.maps, root.interpreter(x, classes))
    assert torch.equal(plain.logits, seen.logits)
    assert not torch.equal(system.redrawn(3)(x).logits, seen.logits)


@pytest.mark.parametrize("make", [CAM, GradCAM, lambda m: Gradient(m, layer="net.features.3")])
def test_a_layers_map_behind_resizing_lies_where_the_input_does(
    make: Any, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    change = ResizePad(9, seed=5)
    model = with_transforms(trained, [change.name])
    plain = make(trained)
    expected = change.taken_back(plain(change(x), model(x).argmax(1)), x)
    for found in (make(model)(x), OfTransformed(model, make(model))(x)):
        torch.testing.assert_close(found.detach(), expected.detach())
    assert not torch.allclose(expected, plain(change(x), model(x).argmax(1)))


def test_two_defenses_of_the_input_explain_what_the_inner_one_made(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:3]
    base = rx.System(trained, Gradient(trained))
    network = untrained(AutoEncoder(1))
    model = Reformed(trained, network)
    system = rx.System(model, OfTransformed(model, base.interpreter.on_model(model)))
    both = InputTransform(["median-3"], "transformed")(system)
    assert isinstance(both.model, Transformed)
    made = network(both.model.transformed(x))
    torch.testing.assert_close(both(x).maps, base.interpreter(made, both(x).logits.argmax(1)))
    drawn = RandomResizing(4, 2)(both)
    assert isinstance(drawn.model, Voted)
    versions = [drawn.model.version(x, i) for i in range(2)]
    torch.testing.assert_close(drawn(x).logits, torch.stack([both.model(v) for v in versions]).mean(0))
    assert drawn(x).maps.abs().amax() > 0


def untrained(network: nn.Module) -> nn.Module:
    """With weights that do not depend on what was drawn before, and none of them zero."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return network.requires_grad_(False).eval()


# --- the parts ---


def test_a_vote_counts_predictions_and_its_gradient_is_that_of_the_expected_share(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:5]
    model = Voted(trained, "uniform-noise-0.6", 8, "majority", seed=2)
    each = torch.stack([trained(model.version(x, i)) for i in range(8)])
    shares = torch.stack([torch.bincount(c, minlength=10) for c in each.argmax(2).T]) / 8
    assert float(shares.amax(1).min()) < 1, "all draws agree: the test shows nothing"
    torch.testing.assert_close(model(x).softmax(1), (8 * shares + 0.1) / 9)
    leaf = x.clone().requires_grad_()
    assert not torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)[0].any()
    with rx.autograd.straight_through.straight_through():
        votes = model(leaf).exp()
    (slope,) = torch.autograd.grad(votes[:, 3].sum(), leaf)
    expected = torch.stack([trained(model.version(leaf, i)).softmax(1) for i in range(8)]).sum(0) / 9
    torch.testing.assert_close(slope, torch.autograd.grad(expected[:, 3].sum(), leaf)[0])


def test_the_radius_of_the_vote_is_the_last_that_costs_no_accuracy(trained: Classifier, digits: Data) -> None:
    some = take(digits.defense, 60)
    x, y = stack(some)
    found = RegionVoting(6, step=0.1, most=0.9, loss=0.05)(rx.System(trained, Gradient(trained)), some).model
    assert isinstance(found, Voted)
    radius = float(found.transform_name.split("-")[-1])

    def right(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).double().mean())

    assert right(found) >= right(trained) - 0.05
    assert radius < 0.85
    beyond = Voted(trained, f"uniform-noise-{radius + 0.1:g}", 6, "majority")
    assert right(beyond) < right(trained) - 0.05


def test_the_radius_of_the_vote_is_found_on_samples_of_all_classes(
    trained: Classifier, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = stack(take(digits.defense, 60))
    order = y.argsort(stable=True)
    data = TensorDataset(x[order], y[order])
    seen: list[Tensor] = []
    monkeypatch.setattr(RegionVoting, "_accuracy", lambda self, model, x, y: seen.append(y) or 1.0)
    for seed in (0, 0, 1):
        RegionVoting(6, step=0.1, most=0.1, samples=30, seed=seed)(rx.System(trained, Gradient(trained)), data)
    first, again, other = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(len(labels) == 30 and len(labels.unique()) >= 8 for labels in seen)


def test_a_fresh_denoiser_changes_nothing_and_keeps_the_names_of_layers(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:3, :, :29, :31]
    model = Reformed(trained, DenoisingUNet(1, 8, 3).eval())
    assert torch.equal(model(x), trained(x))
    assert torch.equal(CAM(model)(x), CAM(trained)(x))
    torch.testing.assert_close(GradCAM(model, "net.features.3")(x), GradCAM(trained, "net.features.3")(x))
    busy = Reformed(trained, untrained(DenoisingUNet(1, 4)))
    assert not torch.equal(GradCAM(busy)(x), GradCAM(trained)(x))
    with pytest.raises(InputError, match="cannot be halved 2 times"):
        DenoisingUNet(1, 8, 3)(torch.rand(1, 1, 3, 8))


def test_draws_of_the_answer_are_not_averaged_twice(trained: Classifier) -> None:
    one, many = (RandomResizing(2, n)(rx.System(trained, Gradient(trained))) for n in (1, 30))
    assert (draws_for(one), draws_for(many)) == (DRAWS, 2)


def test_what_cannot_stand_in_front_is_refused(trained: Classifier, quiet: rx.system.Detector) -> None:
    root = rx.System(trained, Gradient(trained))
    with pytest.raises(UnsupportedModelError, match="answers by draws of 'resize-pad-2' already"):
        RandomResizing(3, 2)(RandomResizing(2, 2)(root))
    with pytest.raises(UnsupportedModelError, match="apply them before it"):
        RandomResizing()(replace(root, detector=quiet))
    with pytest.raises(InputError, match="a random transform without a seed is needed"):
        Voted(trained, "jpeg-75")
    with pytest.raises(InputError, match="does not answer by draws"):
        OfDraws(trained, Gradient(trained))
    with pytest.raises(InputError, match=r"eps.*must be above 0"):
        GuidedDenoiser(PGD(0.0))


# --- training ---


@pytest.mark.parametrize("loss", [GuidedLoss, ReconstructionLoss])
def test_an_interrupted_training_goes_on_to_the_same_network(
    loss: Any, trained: Classifier, few: Any, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    brief = Training(epochs=2, batch_size=20, lr=1e-3, schedule="constant")
    defense: Defense = MagNetReformer(training=brief)
    if loss is GuidedLoss:
        defense = GuidedDenoiser(PGD(0.1, 2, 0.05), 4, 2, brief)
    root, x = rx.System(trained, Gradient(trained)), judged[0][:4]
    whole = defense(root, few)
    calls: list[int] = []
    call = loss.__call__

    def killed(self: Any, *given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *given)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            defense(root, few, Session(folder=tmp_path))
    resumed = defense(root, few, Session(folder=tmp_path))
    assert torch.equal(resumed(x).logits, whole(x).logits)
    assert not torch.equal(whole(x).logits, root(x).logits)


# --- each falls to who knows it ---


def reached(defended: rx.System, x: Tensor, goal: Tensor) -> float:
    """Share that the goal class is predicted on, over draws that no adversary saw."""
    systems = [defended.redrawn(seed) for seed in range(70, 74)] if defended.random else [defended]
    return sum(float((s.model(x).argmax(1) == goal).float().mean()) for s in systems) / len(systems)


FALLS: dict[str, tuple[Defense, float]] = {
    "jpeg": (InputTransform(["jpeg-20"]), 0.1),
    "median": (InputTransform(["median-3"]), 0.1),
    "tv": (InputTransform(["tv-0.1"]), 0.15),
    "wavelet": (InputTransform(["wavelet-0.1"]), 0.15),
    "resizing": (RandomResizing(1, 3, mirrored=False), 0.08),
    "hgd": (GuidedDenoiser(PGD(0.15, 2, 0.1), 4, 2, Training(epochs=3, batch_size=20, lr=2e-2)), 0.15),
    "magnet": (MagNetReformer(8, pooled=False, training=Training(epochs=20, batch_size=10, lr=2e-2)), 0.15),
}


def attacked_twice(
    defense: Defense, eps: float, trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    """Accuracy, and the share that the goal class is reached by who does not know the defense, and by who does."""
    root = rx.System(trained, CAM(trained))
    defended = defense(root, take(digits.train, 200))
    right = defended.model(judged[0]).argmax(1) == judged[1]
    x, y = judged[0][right][:16], judged[1][right][:16]
    goal = random_classes(x, y, 10)
    attack = PGD(eps, 12, eps / 4)
    oblivious = attack(defense.oblivious_view(defended, root), x, y, goal).x
    known = attack.adapted(defended)(defended, x, y, goal).x
    found = float(right.float().mean()), reached(defended, oblivious, goal), reached(defended, known, goal)
    print(f"{defense.name}: clean {found[0]:.2f}, oblivious {found[1]:.2f}, adaptive {found[2]:.2f}")
    assert reached(root, oblivious, goal) == 1
    return found


@pytest.mark.parametrize("name", list(FALLS))
def test_what_stands_in_front_falls_to_who_knows_it(
    name: str, trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    accuracy, oblivious, adaptive = attacked_twice(*FALLS[name], trained, digits, judged)
    assert accuracy > 0.7
    assert adaptive > 0.8
    # What JPEG takes away an attack of that size has to spare: little is left to gain.
    assert adaptive > oblivious + (0.1 if name == "jpeg" else 0.2)


def test_the_vote_of_a_region_stops_nobody_who_goes_further_than_needed(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    accuracy, oblivious, adaptive = attacked_twice(RegionVoting(6, 0.15), 0.06, trained, digits, judged)
    assert accuracy > 0.7
    assert min(oblivious, adaptive) > 0.8
