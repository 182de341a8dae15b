"""Each epoch's loss, learning rate and figures: in a history beside the checkpoint, and in Accelerate's trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from robustexplain import plots
from robustexplain.errors import InputError, RobustExplainWarning, UnknownNameError
from robustexplain.training import Selection, Session, Training, Verdict, cross_entropy, fit, histories

SETTINGS = Training(epochs=3, batch_size=16, lr=1e-2, validation=0.25)


def trained(session: Session, name: str = "net", **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.arange(64) % 3)
    return fit(module, cross_entropy, data, options.pop("settings", SETTINGS), name=name, session=session, **options)


def test_a_history_stands_beside_each_checkpoint_and_is_found(tmp_path: Path) -> None:
    session = Session(folder=tmp_path)
    trained(session)
    trained(session.inside("row"), "other", settings=Training(epochs=2, batch_size=16, lr=0.1, schedule="constant"))
    found = histories(tmp_path)
    assert list(found) == ["net", "row/other"]
    assert [record["epoch"] for record in found["net"]] == [1, 2, 3]
    assert all(record["loss"] > 0 and set(record["figures"]) == {"accuracy"} for record in found["net"])
    assert found["net"][-1]["lr"] == pytest.approx(0, abs=1e-12)
    assert [(record["lr"], record["figures"]) for record in found["row/other"]] == [(0.1, {})] * 2
    assert not list(tmp_path.glob("*.part"))
    drawn = plots.learning_curves(found)
    assert drawn.startswith(b"\x89PNG")
    assert drawn == plots.learning_curves(found)
    assert histories(tmp_path / "row" / "nothing") == {}
    (tmp_path / "net.history.json").write_text("[{")
    assert "net" in histories(tmp_path)  # from the checkpoint
    (tmp_path / "net.safetensors").unlink()
    with pytest.warns(RobustExplainWarning, match=r"left out: .*net\.history\.json is damaged"):
        assert "net" not in histories(tmp_path)


def test_a_figure_that_is_not_finite_is_a_hole(tmp_path: Path) -> None:
    selection = Selection(lambda module: Verdict({"fool": float("nan")}, 1.0, True))
    trained(Session(folder=tmp_path), settings=Training(epochs=2, batch_size=16), selection=selection)
    assert [record["figures"] for record in histories(tmp_path)["net"]] == [{"fool": None}] * 2
    assert plots.learning_curves(histories(tmp_path))


def test_tensorboard_is_told_of_each_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(Session(folder=tmp_path, trackers=("tensorboard",)))
    log = EventAccumulator(str(tmp_path / "tensorboard" / "net"))
    log.Reload()
    history = json.loads((tmp_path / "net.history.json").read_text())
    for key, values in {
        "loss": [record["loss"] for record in history],
        "lr": [record["lr"] for record in history],
        "accuracy": [record["figures"]["accuracy"] for record in history],
    }.items():
        assert [event.step for event in log.Scalars(key)] == [1, 2, 3]
        assert [event.value for event in log.Scalars(key)] == pytest.approx(values, abs=1e-6)


def test_a_tracker_that_cannot_work_is_refused_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        Session(trackers=("tensorbord",))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"'tensorboard' needs a package that is not installed: pip install 'robustex"):
        Session(trackers=("tensorboard",))
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match="'tensorboard' writes files: the session needs a folder"):
        trained(Session(trackers=("tensorboard",)))
