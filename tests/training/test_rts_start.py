"""An RTS that begins with weights saved before: from a system, a checkpoint or a state dict, checked by shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import files, models
from robustexplain.errors import FieldError, InputError, MissingDataError, RunMismatchError
from robustexplain.interpreters import RTS, MaskingModel, RTSTraining, train_rts
from robustexplain.interpreters.masks import rts_training
from robustexplain.recipe import check, check_data
from robustexplain.training import Session, Training

SETTINGS = RTSTraining(training=Training(epochs=1, batch_size=8), width=4, levels=2, encoder_weight=1.0)


@pytest.fixture(scope="module")
def samples() -> TensorDataset:
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(16) % 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("small-cnn", num_classes=4, in_channels=1, seed=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(model: nn.Module, samples: TensorDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[RTS, Path]:
    """An RTS, and a folder with its checkpoint (with averaged weights), its system and its state dict."""
    folder = tmp_path_factory.mktemp("saved")
    settings = replace(SETTINGS, training=replace(SETTINGS.training, ema=0.5))
    rts = train_rts(model, samples, settings, session=Session(folder=folder))
    rx.System(model, rts).save(folder / "system")
    files.write_tensors(folder / "bare.safetensors", rts.masker.state_dict())
    return rts, folder


def begun(model: nn.Module, samples: Any, settings: RTSTraining, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights that a training begins with."""

    def caught(masker: MaskingModel, *given: object, **options: object) -> None:
        weights.update(masker.state_dict())

    weights: dict[str, Tensor] = {}
    patch.setattr(rts_training, "fit", caught)
    train_rts(model, samples, settings)
    return weights


@pytest.mark.parametrize("file", ["system", "system/weights.safetensors", "rts.safetensors", "bare.safetensors"])
def test_training_begins_with_the_weights_that_the_other_one_ended_with(
    file: str, model: nn.Module, samples: TensorDataset, saved: tuple[RTS, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rts, folder = saved
    weights = begun(model, samples, replace(SETTINGS, start=str(folder / file)), monkeypatch)
    assert files.digest_tensors(weights) == files.digest_tensors(rts.masker.state_dict())
    assert files.digest_tensors(weights) != files.digest_tensors(begun(model, samples, SETTINGS, monkeypatch))


def test_the_weights_to_start_from_decide_the_result_and_not_where_they_stand(
    model: nn.Module, samples: TensorDataset, saved: tuple[RTS, Path], tmp_path: Path
) -> None:
    folder = saved[1]
    session = Session(folder=tmp_path)
    first = train_rts(model, samples, replace(SETTINGS, start=str(folder / "system")), session=session)
    again = train_rts(model, samples, replace(SETTINGS, start=str(folder / "bare.safetensors")), session=session)
    assert files.digest_tensors(first.masker.state_dict()) == files.digest_tensors(again.masker.state_dict())
    with pytest.raises(RunMismatchError, match="another training"):
        train_rts(model, samples, SETTINGS, session=session)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 6}, r"RTSTraining.start must hold a masker of this width, .* is \[4, .*expected \[6"),
        ({"levels": 1}, r"RTSTraining.start must hold .*lateral.0.weight is \[4, 32, 1, 1\], expected \[4, 64"),
    ],
)
def test_a_masker_of_other_shapes_is_refused(
    change: dict[str, int], message: str, model: nn.Module, samples: TensorDataset, saved: tuple[RTS, Path]
) -> None:
    with pytest.raises(FieldError, match=message):
        train_rts(model, samples, replace(SETTINGS, start=str(saved[1] / "system"), **change))  # type: ignore[arg-type]


def test_a_file_without_a_masker_is_refused_and_one_that_is_not_there_before_anything_is_trained(
    model: nn.Module, samples: TensorDataset, tmp_path: Path
) -> None:
    files.write_tensors(tmp_path / "model.safetensors", model.state_dict())
    with pytest.raises(InputError, match="holds no maskers"):
        train_rts(model, samples, replace(SETTINGS, start=str(tmp_path / "model.safetensors")))
    tree = {"name": "t", "data": {"name": "digits", "size": 16}, "model": {"name": "small-cnn", "train": {}},
            "interpreters": [{"name": "rts", "start": "nowhere.safetensors"}], "attacks": ["clean"]}  # fmt: skip
    with pytest.raises(MissingDataError, match=r"interpreters: 'rts': RTSTraining.start: no file at 'nowhere.safet"):
        check_data(check(tree))
