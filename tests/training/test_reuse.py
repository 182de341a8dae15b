"""Trainings that are taken from another run: only the same ones, and then to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import files
from robustexplain.errors import MissingDataError
from robustexplain.training import Session, Training, TrainingStep, cross_entropy, fit, histories
from robustexplain.training.intact import with_digest

TWO = Training(epochs=2, batch_size=16)


class Counted:
    """Trains a small network and counts the epochs that it takes."""

    def __init__(self) -> None:
        self.epochs: set[int] = set()

    def __call__(self, session: Session, *, dies_in: int = -1, **options: Any) -> nn.Module:
        self.epochs = set()

        def loss(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
            if step.epoch == dies_in:
                raise KeyboardInterrupt
            self.epochs.add(step.epoch)
            return cross_entropy(module, x, y, step)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = nn.Linear(2, 3)
        x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
        given = {"name": "net", "settings": TWO, "identity": "this data", **options}
        return fit(
            module, loss, TensorDataset(x, torch.arange(32) % 3), given.pop("settings"), session=session, **given
        )


train = Counted()


def test_the_same_training_is_copied_wherever_it_stands_and_no_epoch_is_trained(tmp_path: Path) -> None:
    first = train(Session(folder=tmp_path / "a/training/row"))
    session = Session(folder=tmp_path / "b", reuse=(tmp_path / "a",)).inside("other row")
    again = train(session)
    assert train.epochs == set()
    assert torch.equal(first.weight, again.weight)  # type: ignore[arg-type]
    assert histories(tmp_path / "b")["other row/net"] == histories(tmp_path / "a")["training/row/net"]
    train(Session(folder=tmp_path / "b/other row"))
    assert train.epochs == set(), "the copy stands for itself"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"identity": "other data"}, {"settings": Training(epochs=2, batch_size=8)}, {"name": "web"}]
)
def test_another_training_is_never_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    train(Session(folder=tmp_path / "a"))
    train(Session(folder=tmp_path / "b", reuse=(tmp_path / "a",)), **change)
    assert train.epochs == {0, 1}


def test_neither_one_without_an_identity_nor_one_of_another_precision_is_taken(tmp_path: Path) -> None:
    train(Session(folder=tmp_path / "a"), identity=None)
    train(Session(folder=tmp_path / "b", reuse=(tmp_path / "a",)), identity=None)
    assert train.epochs == {0, 1}
    train(Session(folder=tmp_path / "c"))
    tensors, meta = files.read_tensors(tmp_path / "c/net.safetensors")
    other = with_digest(tensors, {**meta, "precision": "bf16"})
    files.write_tensors(tmp_path / "c/net.safetensors", tensors, other)
    train(Session(folder=tmp_path / "d", reuse=(tmp_path / "c",)))
    assert train.epochs == {0, 1}


def test_a_checkpoint_whose_weights_were_changed_is_trained_again(tmp_path: Path) -> None:
    first = train(Session(folder=tmp_path / "a"))
    tensors, meta = files.read_tensors(tmp_path / "a/net.safetensors")
    files.write_tensors(tmp_path / "a/net.safetensors", {**tensors, "module.bias": tensors["module.bias"] + 1}, meta)
    again = train(Session(folder=tmp_path / "b", reuse=(tmp_path / "a",)))
    assert train.epochs == {0, 1}
    assert torch.equal(first.weight, again.weight)  # type: ignore[arg-type]


def test_a_training_that_was_stopped_is_gone_on_with_and_the_longest_counts(tmp_path: Path) -> None:
    whole = train(Session(folder=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(Session(folder=tmp_path / "a"), dies_in=1)
    session = Session(folder=tmp_path / "b", reuse=(tmp_path / "a",))
    found = train(session)
    assert train.epochs == {1}
    assert torch.equal(found.weight, whole.weight)  # type: ignore[arg-type]
    (tmp_path / "a/torn.safetensors").write_bytes(b"nothing")
    train(Session(folder=tmp_path / "c", reuse=(tmp_path / "a", tmp_path / "b")))
    assert train.epochs == set()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="nothing to reuse: no folder at"):
        Session(reuse=(tmp_path / "nothing",))
