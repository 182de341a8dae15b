"""What a training shows: loss and learning rate beside its bar, and one line at its end."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from robustexplain.progress import Advance, Bars, Labelled
from robustexplain.training import Session, Training, cross_entropy, fit, histories
from robustexplain.training.shown import Notes


class Heard:
    """A progress display that remembers notes and lines."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        def advance(steps: int, /, *, note: str = "") -> None:
            self.notes.append(note)

        yield advance

    def say(self, text: str) -> None:
        self.lines.append(text)


def trained(session: Session, **settings: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Linear(2, 3)
    y = torch.arange(48) % 3
    data = TensorDataset(torch.randn(48, 2, generator=torch.Generator().manual_seed(0)) + y[:, None], y)
    how = Training(epochs=3, batch_size=12, lr=0.1, schedule="constant", **settings)  # type: ignore[arg-type]
    fit(module, cross_entropy, data, how, name="net", session=session)


def test_loss_and_rate_stand_beside_the_bar_and_a_line_says_how_it_ended(tmp_path: Path) -> None:
    heard = Heard()
    trained(Session(folder=tmp_path, progress=Labelled(heard, "row")))
    losses = [record["loss"] for record in histories(tmp_path)["net"]]
    assert len(heard.notes) == 12
    assert heard.notes[3::4] == [f"loss {loss:.4g}, lr 0.1" for loss in losses]
    assert heard.lines == [f"row: net: 3 epochs, loss {losses[-1]:.4g}"]
    trained(Session(folder=tmp_path, progress=heard))
    assert len(heard.lines) == 1, "nothing was trained"


def test_the_line_names_the_figure_of_the_weights_that_are_kept(tmp_path: Path) -> None:
    heard = Heard()
    trained(Session(folder=tmp_path, progress=heard), validation=0.25)
    best = max(record["figures"]["accuracy"] or 0 for record in histories(tmp_path)["net"])
    found = re.fullmatch(
        r"net: 3 epochs, loss [\d.]+, accuracy ([\d.]+), (weights of epoch [123]|untrained .*)", heard.lines[0]
    )
    assert found is not None
    assert float(found[1]) >= float(f"{best:.4g}")


def test_a_loss_is_read_from_the_device_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    notes, shown = Notes(), []
    for now in (0.0, 0.1, 0.2, 0.3, 0.31):
        shown.append(notes.of(torch.tensor(3.0), 2, 0.01, last=now == 0.31))
    assert [bool(note) for note in shown] == [True, False, False, True, True]
    assert shown[0] == "loss 1.5, lr 0.01"


def test_bars_show_notes_and_keep_the_last_one() -> None:
    bars, out = Bars(), io.StringIO()
    bars.console = Console(file=out, width=120, markup=False)
    with bars.task("net", 3) as advance:
        advance(1, note="loss [b]0.312[/b]")
        advance(2)
    assert "3/3" in out.getvalue()
    assert "loss [b]0.312[/b]" in out.getvalue()
