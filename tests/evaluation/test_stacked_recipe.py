"""The packaged recipe of stacked defenses: trained once, resumed after a kill, the same in two processes."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from robustexplain.evaluation import RunFolder
from robustexplain.recipe import read
from robustexplain.system import System

ROOT = Path(__file__).parents[2]
SMALL = [
    *("data.fractions=[0.12, 0.12, 0.76]", "model.train.epochs=2", "evaluation.images=8", "evaluation.batch_size=4"),
    *("evaluation.bootstrap=50", "evaluation.calibration=40", "evaluation.harmless=[brightness]"),
    *("defenses[0].training.epochs=1", "defenses[0].attack.steps=2"),
    *("defenses[4].training.epochs=1", "defenses[4].attack.steps=2"),
    *("attacks[2].steps=2", "attacks[3].steps=4", "evaluation.pictures=1"),
]
WORDS = [word for change in SMALL for word in ("--set", change)]
DECISIONS = ("joint", "success", "plausible", "alarm", "correct", "success_correct", "joint_correct")
LAYERS = {
    "hardened (gradient)": ("pgd-at",),
    "hardened (gradcam)": ("pgd-at",),
    "hardened (cam)": ("pgd-at",),
    "jpeg": ("pgd-at", "input-transform"),
    "two maps": ("pgd-at", "input-transform", "aggregated"),
    "squeezing": ("pgd-at", "input-transform", "aggregated", "feature-squeezing"),
    "two alarms": ("pgd-at", "input-transform", "aggregated", "feature-squeezing", "x-ensemble"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="kills a group of processes, as on Linux"),
]


def start(processes: int, out: Path) -> subprocess.Popen[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]
    recipe = ["-m", "robustexplain", "run", "recipes/stacked.yaml", "--device", "cpu", "--out", out, *WORDS]
    words = [sys.executable, *map(str, (launcher if processes > 1 else []) + recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    assert process.wait(timeout=400) == 0, out.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A run in one process, killed once a few cells are there and started again; and those cells, with times."""
    out = tmp_path_factory.mktemp("stacked") / "killed"
    process = start(1, out)
    while process.poll() is None and len(list(out.glob("cells/*.json"))) < 5:
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    arrays = [path.with_suffix(".safetensors") for path in out.glob("cells/*.json")]
    before = {path.name: path.stat().st_mtime_ns for path in arrays}
    finish(start(1, out), out)
    return out, before


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe, undisturbed, in two processes."""
    out = tmp_path_factory.mktemp("stacked") / "two"
    finish(start(2, out), out)
    return out


def table(root: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (root / "matrix.csv").open() as file:
        return {(line["row"], line["column"], line["measure"]): line for line in csv.DictReader(file)}


def test_classifier_and_hardened_classifier_are_trained_once_for_all_rows(killed: tuple[Path, dict[str, int]]) -> None:
    names = [path.relative_to(killed[0] / "training") for path in killed[0].rglob("training/**/*.safetensors")]
    stems = [path.stem for path in names]
    assert stems.count("classifier") == 1
    assert stems.count("pgd-at") == 1
    assert stems.count("classifier of the attacker") == 1
    assert len([stem for stem in stems if stem.startswith("x-ensemble")]) == 2
    assert len(names) == 5


def test_every_row_keeps_the_layers_below_it(killed: tuple[Path, dict[str, int]]) -> None:
    folder = RunFolder(killed[0])
    models = {}
    for label, layers in LAYERS.items():
        system = System.load(folder.system(label))
        assert system.defenses == layers
        models[label] = {k.removeprefix("model."): v for k, v in system.model.state_dict().items()}
    first = models["hardened (gradient)"]
    for label, weights in models.items():
        assert all(bool((weights[key] == value).all()) for key, value in first.items()), f"{label} has other weights"
    last = System.load(folder.system("two alarms"))
    assert len(last.detector.detectors) == 2  # type: ignore[union-attr]


def test_all_three_attackers_meet_every_row(killed: tuple[Path, dict[str, int]]) -> None:
    recipe = read(ROOT / "recipes" / "stacked.yaml", SMALL)
    folder = RunFolder(killed[0])
    knowledge = set()
    for row in recipe.rows:
        for column in recipe.columns:
            cell = folder.read_cell(row.label, column.label)
            assert cell is not None
            assert cell["status"] == "done", cell.get("traceback")
            knowledge.add(cell["knowledge"])
    assert knowledge == {"oblivious", "transfer", "adaptive"}


def test_nothing_finished_is_done_again_after_a_kill(killed: tuple[Path, dict[str, int]]) -> None:
    out, before = killed
    assert before
    # A cell's JSON is written again once its undefended cell is there, and with what the audit says of it.
    assert all((out / "cells" / name).stat().st_mtime_ns == written for name, written in before.items())


def test_two_processes_give_what_a_killed_and_resumed_one_gives(killed: tuple[Path, dict[str, int]], two: Path) -> None:
    one, other = table(killed[0]), table(two)
    assert list(one) == list(other)
    for where, line in one.items():
        for key in ("value", "low", "high"):
            mine, theirs = line[key], other[where][key]
            exact = where[2] in DECISIONS or not mine
            assert mine == theirs if exact else float(mine) == pytest.approx(float(theirs), abs=1e-4), (where, key)


def test_two_processes_train_what_one_trains(killed: tuple[Path, dict[str, int]], two: Path) -> None:
    checkpoints = sorted(path.relative_to(two) for path in two.rglob("training/**/*.safetensors"))
    for name in checkpoints:
        mine, theirs = load_file(killed[0] / name), load_file(two / name)
        away = [float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine if k.startswith("module.")]
        assert max(away) <= 1e-4, f"{name} differs by {max(away):.2g}"
