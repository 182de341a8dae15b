"""Two processes give the rows of one: training splits batches, the matrix splits chunks, and neither shows."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.yaml"
DECISIONS = ("joint", "success", "plausible", "alarm")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(processes: int, out: Path) -> Path:
    # Not `accelerate launch --cpu --num_processes 2`: without MPI that is one process, and says nothing about it.
    logs = out.with_name(f"{out.name}-logs")
    words = [
        *("-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", free_port()),
        *("--redirects", 3, "--log_dir", logs, "-m", "robustexplain", "run", TINY, "--device", "cpu", "--out", out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [path.read_text(encoding="utf-8") for path in logs.rglob("stdout.log")]
    assert len(said) == processes
    assert (
        sum(text.count("joint success where clean inputs are right, 16 images") for text in said) == 1
    )  # one process speaks
    return out


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run directories of one process and of two."""
    root = tmp_path_factory.mktemp("processes")
    return launch(1, root / "one"), launch(2, root / "two")


def table(root: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (root / "matrix.csv").open() as file:
        return {(line["row"], line["column"], line["measure"]): line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_two_processes_train_the_same_networks_as_one(both: tuple[Path, Path]) -> None:
    one, two = both
    checkpoints = sorted(path.relative_to(one) for path in one.rglob("training/**/*.safetensors"))
    assert len(checkpoints) == 7
    for name in checkpoints:
        mine, theirs = load_file(one / name), load_file(two / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key.startswith("module."):
                away = float((value.double() - theirs[key].double()).abs().max())
                assert away <= 1e-5, f"{name}: {key} differs by {away:.2g}"


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(both: tuple[Path, Path]) -> None:
    one, two = (table(root) for root in both)
    assert list(one) == list(two)
    for where, line in one.items():
        for key in ("value", "low", "high"):
            mine, theirs = line[key], two[where][key]
            exact = where[2] in DECISIONS or not mine
            assert mine == theirs if exact else float(mine) == pytest.approx(float(theirs), abs=1e-5), (where, key)


@pytest.mark.slow
def test_two_processes_decide_alike_on_every_image(both: tuple[Path, Path]) -> None:
    one, two = both
    cells = sorted(path.name for path in (one / "cells").glob("*.safetensors"))
    assert len(cells) == 24
    for name in cells:
        mine, theirs = load_file(one / "cells" / name), load_file(two / "cells" / name)
        for key in ("sample", "label", "goal_class", "prediction", *DECISIONS):
            assert key == "alarm" or key in mine
            if key in mine:
                assert mine[key].tolist() == theirs[key].tolist(), (name, key)
