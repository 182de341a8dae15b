"""Checkpoints as people have them: nested, prefixed, with averaged weights or a script's arguments beside them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robustexplain import models
from robustexplain.errors import InputError, RobustExplainWarning
from robustexplain.models.weights import load_state

SOURCE = models.load("small-cnn", seed=3)
STATE = SOURCE.net.state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


def compiled_within() -> dict[str, Tensor]:
    return {key.replace("features.", "features._orig_mod."): value for key, value in STATE.items()}


CHECKPOINTS: dict[str, Any] = {
    "model and epoch": {"model": STATE, "epoch": 4, "optimizer": {"lr": 0.1}},
    "state_dict": {"state_dict": STATE, "best": 0.9},
    "model_state_dict": {"model_state_dict": STATE, "loss": 0.1},
    "data parallel": {"model": prefixed("module.")},
    "compiled": prefixed("_orig_mod."),
    "compiled, data parallel": prefixed("module._orig_mod."),
    "data parallel, compiled": prefixed("_orig_mod.module."),
    "a part compiled": compiled_within(),
    "a framework's module around it": {"state_dict": prefixed("model."), "epoch": 1},
    "averaged by torch": {"n_averaged": torch.tensor(5), **prefixed("module.")},
    "a script's arguments beside it": {"model": STATE, "args": argparse.Namespace(lr=0.1, data="x")},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_weights_are_found(case: str, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[case], tmp_path / "w.pt")
    loaded = models.load("small-cnn", weights=tmp_path / "w.pt")
    assert all(torch.equal(value, STATE[key]) for key, value in loaded.net.state_dict().items())


def test_averaged_weights_are_taken_on_request_only_and_their_being_there_is_said(tmp_path: Path) -> None:
    averaged = {key: value + 1 for key, value in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": averaged}, tmp_path / "w.pt")
    weight = "features.0.weight"
    with pytest.warns(RobustExplainWarning, match="averaged weights too; .*say weights_key='state_dict_ema'"):
        plain = models.load("small-cnn", weights=tmp_path / "w.pt")
    assert torch.equal(plain.net.state_dict()[weight], STATE[weight])
    asked = models.load("small-cnn", weights=tmp_path / "w.pt", weights_key="state_dict_ema")
    assert torch.equal(asked.net.state_dict()[weight], averaged[weight])
    with pytest.raises(InputError, match="no state dict under 'ema'; it has state_dict, state_dict_ema"):
        models.load("small-cnn", weights=tmp_path / "w.pt", weights_key="ema")


def test_weights_under_another_name_are_asked_for(tmp_path: Path) -> None:
    torch.save({"student": STATE, "step": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="under student it has some: say which with weights_key"):
        models.load("small-cnn", weights=tmp_path / "w.pt")


def test_a_pickled_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(InputError) as error:
        models.load("small-cnn", weights=tmp_path / "w.pt")
    said = str(error.value)
    assert "it holds Python objects beside tensors (torch.nn.modules.linear.Linear)" in said
    assert "torch.save(model.state_dict(), PATH)" in said
    assert "weights_only" not in said


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "1 of"), (torch.inf, "1 of")])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, said: str, ending: str, tmp_path: Path) -> None:
    model = models.build("small-cnn", num_classes=3, in_channels=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["net.head.weight"][1, 2] = value
    path = tmp_path / f"own.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    with pytest.raises(InputError, match=rf"NaN or infinity: net.head.weight \({said}"):
        models.load("small-cnn", num_classes=3, in_channels=1, weights=path)


def test_a_mask_of_infinities_among_the_buffers_is_no_fault() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    load_state(Masked(), Masked().state_dict(), "here")
