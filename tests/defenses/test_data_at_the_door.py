"""Data that are none for a classifier are refused before anything is trained on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import robustexplain as rx
from robustexplain import interpreters, models
from robustexplain.data import Data, stack, take
from robustexplain.defenses import AVA, Defense, RegionVoting, Retrained, SafetyNet, TangentSpace
from robustexplain.errors import InputError
from robustexplain.training import Training

BRIEF = Training(epochs=1, batch_size=32)
DEFENSES = [Retrained(training=BRIEF), RegionVoting(samples=30), SafetyNet(), TangentSpace(), AVA(neighbours=4)]


class Ragged(Dataset[tuple[Tensor, int]]):
    """Images of two sizes."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 32 + i % 2, 32), 0


@pytest.fixture(scope="module")
def system() -> rx.System:
    model = models.build("small-cnn", num_classes=10, in_channels=1, seed=0).eval().requires_grad_(False)
    return rx.System(model, interpreters.Gradient(model))


@pytest.fixture(scope="module")
def samples(digits: Data) -> tuple[Tensor, Tensor]:
    return stack(take(digits.train, 64))


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.name)
def test_it_refuses_pixels_labels_and_shapes_that_are_none(
    defense: Defense, system: rx.System, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    with pytest.raises(InputError, match=r"x must lie in \[0, 1\], got values from 0 to 255"):
        defense(system, TensorDataset(x * 255, y))
    with pytest.raises(InputError, match=r"x must be floating point, got torch.uint8"):
        defense(system, TensorDataset((x * 255).byte(), y))
    with pytest.raises(InputError, match=r"x holds NaN"):
        defense(system, TensorDataset(x / 0, y))
    for wrong in (10, -1):
        with pytest.raises(InputError, match=rf"a label of the data holds class {wrong}, but the model has"):
            defense(system, TensorDataset(x, torch.full_like(y, wrong)))
    with pytest.raises(InputError, match=r"samples must be of one shape, got \[1, 3[23], 32\] and \[1, 3"):
        defense(system, Ragged())


def test_one_wrong_label_among_known_ones_is_found(system: rx.System, digits: Data) -> None:
    class Mislabelled(Dataset[tuple[Tensor, int]]):
        labels = tuple(99 if i == 7 else 0 for i in range(200))

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return digits.train[0][0], self.labels[i]

    held = torch.zeros(4000, dtype=torch.int64).index_fill(0, torch.tensor(7), 99)
    for samples in (Mislabelled(), TensorDataset(torch.rand(4000, 1, 8, 8), held)):
        with pytest.raises(InputError, match="holds class 99"):
            Retrained(training=BRIEF).hardened(system.model, samples)
