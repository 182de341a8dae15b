"""What a training can be told: optimiser, schedule, augmentation, averaged weights, validation; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain.errors import FieldError, InputError
from robustexplain.random_streams import generator
from robustexplain.training import Loss, Session, Training, TrainingStep, cross_entropy, fit, histories
from robustexplain.training.augmentation import Augmented, operation


def points(size: int = 96, spread: float = 0.5) -> TensorDataset:
    """Points in the plane, three classes, each around its own corner of a triangle."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(size) % 3
    corners = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return TensorDataset(corners[y] + spread * torch.randn(size, 2, generator=rng), y)


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


FOUR = Training(epochs=4, batch_size=32, lr=1e-2)


def trained(settings: Training = FOUR, loss: Loss = cross_entropy, **options: object) -> nn.Module:
    return fit(net(), loss, points(), settings, name="net", **options)  # type: ignore[arg-type]


def state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def dying_in(epoch: int) -> Loss:
    """A classifier's loss in a process that is killed in that epoch."""

    class Dying(type(cross_entropy)):  # type: ignore[misc]
        def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
            if step.epoch == epoch:
                raise KeyboardInterrupt
            return super().__call__(module, x, y, step)

    return Dying()


# --- optimiser and schedule ---


def test_sgd_takes_torchs_steps() -> None:
    settings = Training(epochs=2, batch_size=96, lr=0.1, optimizer="sgd", momentum=0.8, nesterov=True,
                        weight_decay=1e-2, schedule="steps", milestones=(0.5,), decay=0.3, clip=0)  # fmt: skip
    plain = nn.Sequential(nn.Linear(2, 3)).double()
    data = points()
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    w, b = (p.detach().clone() for p in plain.parameters())
    fit(plain, cross_entropy, data, settings, name="net")
    velocity = [torch.zeros_like(w), torch.zeros_like(b)]
    x, y = data.tensors
    for rate in (0.1, 0.03):
        error = ((x @ w.T + b).softmax(1) - nn.functional.one_hot(y, 3)) / len(x)
        gradients = [error.T @ x + 1e-2 * w, error.sum(0) + 1e-2 * b]
        velocity = [0.8 * v + g for v, g in zip(velocity, gradients, strict=True)]
        w, b = (p - rate * (g + 0.8 * v) for p, g, v in zip((w, b), gradients, velocity, strict=True))
    torch.testing.assert_close(plain[0].weight.detach(), w, rtol=0, atol=1e-12)  # type: ignore[arg-type]
    torch.testing.assert_close(plain[0].bias.detach(), b, rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_cosine_falls_from_the_peak_to_zero_and_steps_fall_at_milestones() -> None:
    cosine = Training(lr=0.5, schedule="cosine")
    assert [cosine.rate(p) for p in (0, 0.5, 1)] == pytest.approx([0.5, 0.25, 0], abs=1e-12)
    steps = Training(lr=1.0, schedule="steps", milestones=(0.3, 0.8), decay=0.1)
    assert [steps.rate(p) for p in (0, 0.29, 0.3, 0.79, 0.8, 1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_sgd_resumes_with_its_momentum(tmp_path: Path) -> None:
    settings = replace(FOUR, optimizer="sgd", ema=0.9, validation=0.25)
    with pytest.raises(KeyboardInterrupt):
        trained(settings, dying_in(2), session=Session(folder=tmp_path), identity="points")
    assert same(trained(settings, session=Session(folder=tmp_path), identity="points"), trained(settings))


# --- augmentation ---


def image(side: int = 12, channels: int = 3) -> Tensor:
    return torch.rand(channels, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["flip", "crop-2", "rotate-30", "colour-0.4"])
def test_augmentation_stays_an_image_draws_anew_each_epoch_and_for_each_sample(name: str) -> None:
    data = TensorDataset(image()[None].repeat(12, 1, 1, 1), torch.zeros(12).long())
    first, again, later = (Augmented(data, (name,), 5, epoch) for epoch in (0, 0, 1))
    x = torch.stack([first[i][0] for i in range(12)])
    assert x.shape == (12, 3, 12, 12)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.equal(x, torch.stack([again[i][0] for i in range(12)]))
    assert not torch.equal(x, torch.stack([later[i][0] for i in range(12)]))
    assert len({tuple(row.flatten().tolist()) for row in x}) > 1


def test_augmentation_does_what_its_names_say() -> None:
    x = image(channels=1)
    flipped = [operation("flip")(x, generator(0, i)) for i in range(200)]
    assert {torch.equal(f, x) or torch.equal(f, x.flip(-1)) for f in flipped} == {True}
    assert 70 < sum(torch.equal(f, x) for f in flipped) < 130
    shifts = {(i, j): TF.pad(x, [2])[:, i : i + 12, j : j + 12] for i in range(5) for j in range(5)}
    cropped = [operation("crop-2")(x, generator(1, i)) for i in range(300)]
    assert {key for c in cropped for key, value in shifts.items() if torch.equal(c, value)} == set(shifts)


def test_an_image_is_turned_as_torchvision_turns_it() -> None:
    wide = torch.rand(1, 20, 32, generator=torch.Generator().manual_seed(1))
    angle = -25 + 50 * float(torch.rand((), generator=generator(0, "turn"), dtype=torch.float64))
    turned = operation("rotate-25")(wide, generator(0, "turn"))
    theirs = TF.rotate(wide, angle, TF.InterpolationMode.BILINEAR)
    assert abs(angle) > 5
    torch.testing.assert_close(turned, theirs, rtol=0, atol=1e-4)


def test_colours_change_as_torchvision_changes_them() -> None:
    x = image()
    rng = generator(2, "c")
    b, c, s = (0.6 + 0.8 * torch.rand((), generator=rng, dtype=torch.float64) for _ in range(3))
    theirs = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, float(b)), float(c)), float(s))
    torch.testing.assert_close(operation("colour-0.4")(x, generator(2, "c")), theirs, rtol=0, atol=1e-3)


def test_augmentation_is_for_training_alone_and_for_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"changes images \[C, H, W\]; a sample has shape \[2\]"):
        trained(replace(FOUR, augment=("flip",)))
    for name in ("mirror", "crop", "crop-1.5", "rotate-200", "colour-2", "flip-1", 3):
        with pytest.raises(FieldError, match="augment must name flip, crop-N"):
            Training(augment=(name,))  # type: ignore[arg-type]


# --- averaged weights ---


def test_a_training_ends_with_the_average_of_its_weights(tmp_path: Path) -> None:
    settings = Training(epochs=2, batch_size=48, lr=1e-2, ema=0.2)
    seen: list[list[Tensor]] = []

    def watched(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        seen.append([p.detach().double().clone() for p in module.parameters()])
        return cross_entropy(module, x, y, step)

    averaged = trained(settings, watched)
    last = trained(replace(settings, ema=0.0))
    weights = [*seen, [p.detach().double() for p in last.parameters()]]
    expected = weights[0]
    for t, new in enumerate(weights[1:], 1):
        decay = min(0.2, (1 + t) / (10 + t))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, new, strict=True)]
    for a, b in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=1e-6)
    assert not same(averaged, last)


# --- labels and samples held out ---


def test_smoothed_labels_are_those_of_the_definition() -> None:
    x, y = points(6).tensors
    logits = net().eval()(x)
    spread = 0.7 * nn.functional.one_hot(y, 3) + 0.3 / 3
    found = cross_entropy.smoothed(0.3)(net().eval(), x, y, TrainingStep(0, 0, 0.0))
    torch.testing.assert_close(found, -(spread * logits.log_softmax(1)).sum(1))
    assert not same(trained(replace(FOUR, label_smoothing=0.3)), trained())


class Seen(TensorDataset):
    """Points that remember which of them were asked for."""

    def __init__(self) -> None:
        super().__init__(*points(90, 2.0).tensors)
        self.asked: set[int] = set()

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.asked.add(index)
        return super().__getitem__(index)


def best_of(settings: Training, folder: Path) -> tuple[nn.Module, list[float]]:
    module = fit(net(), cross_entropy, points(90, 2.0), settings, name="net", session=Session(folder=folder))
    return module, [record["figures"].get("accuracy", math.nan) for record in histories(folder)["net"]]  # type: ignore[misc]


def test_the_epoch_that_is_best_on_samples_held_out_is_kept_and_none_of_them_is_trained_on(tmp_path: Path) -> None:
    settings = Training(epochs=12, batch_size=20, lr=0.05, schedule="constant", validation=0.3)
    data = Seen()
    asked: list[set[int]] = []

    class Watched(type(cross_entropy)):  # type: ignore[misc]
        def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
            asked.append(set(data.asked))
            data.asked.clear()
            return super().figures(module, x, y, step)

    fit(net(), Watched(), data, replace(settings, batch_size=90), name="net")
    held, taught = asked[0], asked[2] - asked[0]
    assert len(held) == 27
    assert len(asked[1] | taught) == 90
    module, accuracies = best_of(settings, tmp_path)
    x, y = (torch.stack(list(part)) for part in zip(*(data[i] for i in sorted(held)), strict=True))
    assert float((module(x).argmax(1) == y).double().mean()) == pytest.approx(max(accuracies))
    assert len(set(accuracies)) > 1


def test_patience_ends_a_training_that_no_longer_gets_better_also_when_resumed(tmp_path: Path) -> None:
    settings = Training(epochs=40, batch_size=20, lr=0.05, schedule="constant", validation=0.3, patience=3)
    module, accuracies = best_of(settings, tmp_path / "a")
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 1 + 3 < 40
    again, same_again = best_of(settings, tmp_path / "a")
    assert same(module, again)
    assert same_again == accuracies


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(lr=math.inf), "lr must be finite, got inf"),
        (lambda: Training(weight_decay=math.inf), "weight_decay must be finite"),
        (lambda: Training(ema=1.0), r"ema must be below 1, got 1\.0"),
        (lambda: Training(validation=1.0), "validation must be below 1"),
        (lambda: Training(patience=2), "patience needs samples held out"),
        (lambda: Training(milestones=(0.8, 0.2)), "milestones must be rising"),
        (lambda: Training(milestones=(0.5, 1.5)), r"milestones must be at most 1, got 1\.5"),
        (lambda: Training(optimizer="lion"), "optimizer must be one of 'adamw', 'sgd'"),  # type: ignore[arg-type]
        (lambda: Training(optimizer="sgd", nesterov=True, momentum=0), "nesterov needs a momentum"),
        (lambda: Training(lr=1e7), "lr must be at most 1e6"),
        (
            lambda: fit(net(), cross_entropy, points(1), replace(FOUR, validation=0.2), name="net"),
            "validation = 0.2 of 1 samples leaves none to train on",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_the_door(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("field", ["validation", "label_smoothing"])
def test_what_is_for_classifiers_is_refused_elsewhere(field: str) -> None:
    def other(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        return module(x).square().mean(1)

    with pytest.raises(InputError, match=f"Training.{field} is for classifiers, and 'net' trains something else"):
        trained(replace(FOUR, **{field: 0.2}), other)  # type: ignore[arg-type]


class Steep(type(cross_entropy)):  # type: ignore[misc]
    """A classifier's loss with huge gradients."""

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        return 1e8 * super().__call__(module, x, y, step)


def steeper(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
    return 1e30 * module(x).square().mean(1)


@pytest.mark.parametrize(("loss", "message"), [(steeper, "weights are not finite"), (Steep(), "logits are not finite")])
def test_an_update_that_destroys_the_model_is_an_error_also_when_it_is_the_last(loss: Loss, message: str) -> None:
    deep = nn.Sequential(nn.Linear(2, 16), *(m for _ in range(4) for m in (nn.Softplus(), nn.Linear(16, 16))))
    settings = Training(epochs=1, batch_size=96, lr=1e6, schedule="constant", optimizer="sgd", clip=0)
    with pytest.raises(InputError, match=f"diverged: after .*{message}.*try a smaller lr"):
        fit(deep, loss, points(), settings, name="net")
