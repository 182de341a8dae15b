"""A run goes on on another kind of machine, or with another number of threads; the report says so."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from robustexplain.errors import RunMismatchError
from robustexplain.evaluation import Results, RunFolder, run
from robustexplain.recipe import read
from robustexplain.training import Session, loop

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.yaml"
FEW = [
    *("interpreters=[cam]", "model.train.epochs=2", "evaluation.bootstrap=50", "evaluation.images=8"),
    *("attacks=[clean]", "data.fractions=[0.1, 0.1, 0.8]", "evaluation.only_correct=false"),
    "defenses=[{name: x-ensemble, of: cam, members: [cam, gradient], trees: 10, attack: {eps: 0.2, steps: 2}, "
    "training: {epochs: 1}}]",
]
OLDER = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads that wait do not compute."""


def killed(root: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """A run that ends after so many epochs: the classifier takes two, then each network of x-ensemble one."""

    def interrupted(self: loop._Loop, path: Path | None) -> None:
        save(self, path)
        left.pop()
        if not left:
            raise KeyboardInterrupt

    save, left = loop._Loop.save, [None] * epoch
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(loop._Loop, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(read(TINY, FEW), root)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_was_killed_goes_on_on_an_older_processor_with_other_threads(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path / "run", monkeypatch, epoch)
    words = [sys.executable, "-m", "robustexplain", "run", str(TINY), "--out", str(tmp_path / "run")]
    words += [word for change in FEW for word in ("--set", change)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **OLDER, **PATIENT}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "trained anew" not in done.stderr
    results = Results.read(RunFolder(tmp_path / "run"))
    assert all(cell is not None and cell["status"] == "done" for cell in results.cells.values())
    machines = results.run["machines"]
    assert len(machines) == 2
    assert "DEFAULT (oneDNN: SSE41), 2 threads" in machines[1]
    assert f"made on 2 kinds of machine, on which figures differ in last digits: {machines[0]}" in (
        tmp_path / "run/report.html"
    ).read_text().replace("&#39;", "'")


def test_another_precision_is_refused_with_the_true_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path / "run", monkeypatch, 1)
    session = Session()
    monkeypatch.setattr(type(session.accelerator), "mixed_precision", property(lambda _: "bf16"))
    with pytest.raises(RunMismatchError, match="was made with mixed precision 'no', and this process has 'bf16'"):
        run(read(TINY, FEW), tmp_path / "run", session)
