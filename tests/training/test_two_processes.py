"""Two real processes give what one gives: gradients of AID, weights of a training, double backward, a manipulation."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robustexplain.defenses import ModelDefense
from robustexplain.defenses.inputs.placed import TrainedInput
from robustexplain.registry import DEFENSES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("two_processes.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def started(out: Path, processes: int) -> list[subprocess.Popen[str]]:
    """The script in that many processes, each told who it is as ``accelerate launch`` tells it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"LOCAL_WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out)],
            env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What one process found, and what each of two did."""
    out = tmp_path_factory.mktemp("processes")
    running = started(out, 2) + started(out, 1)
    try:
        # Against a deadlock alone: processes that share their cores with others wait long for one another.
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    one, *two = (load_file(str(out / f"{name}.safetensors")) for name in ("1-0", "2-0", "2-1"))
    return one, two


@pytest.mark.parametrize(
    ("part", "relative"),
    [
        ("aid", 1e-6),
        ("fit", 0),
        ("maps", 0),
        ("fooled", 0),
        ("shifted", 0),
        ("unseen", 1e-6),
        ("told", 0),
        ("single", 0),
        ("hardened", 0),
        ("revealing", 1e-6),
        *((f"steady.{name}", 1e-6) for name in ("aga", "art", "input-gradient-penalty", "r2et", "rar")),
        *((f"steady.{name}", 1e-6) for name in ("attribution-regularisers", "smooth-curvature", "ssr")),
        *((f"network.{name}", 0) for name in ("adv2", "asgt", "atex", "infodrop", "saliency-guided", "senn", "woods")),
        ("retrained", 1e-6),
        ("denoised", 1e-6),
        ("trades", 1e-6),
        ("ensemble", 1e-6),
        ("distilled", 1e-6),
        ("cure", 1e-6),
        ("int", 1e-6),
        ("reformed.hgd", 0),
        ("reformed.magnet-reformer", 0),
    ],
)
def test_two_processes_find_what_one_finds(
    results: tuple[dict[str, Tensor], list[dict[str, Tensor]]], part: str, relative: float
) -> None:
    one, two = results
    assert int(one["processes"]) == 1
    assert [int(found["processes"]) for found in two] == [2, 2]
    names = [name for name in one if name.startswith(part)]
    assert len(names) > 5
    assert any(float(one[name].abs().max()) > 1e-3 for name in names)
    for found in two:
        for name in names:
            scale = float(one[name].abs().max())
            torch.testing.assert_close(found[name], one[name], rtol=0, atol=relative * scale or 1e-6, msg=name)


def test_every_registered_training_of_a_classifier_or_of_what_stands_in_front_is_among_them() -> None:
    named = set(re.findall(r"\w+", SCRIPT.read_text()))
    kinds = (ModelDefense, TrainedInput)
    trainings = {e.build.__name__ for e in DEFENSES if issubclass(e.build, kinds)}  # type: ignore[attr-defined, arg-type]
    assert trainings <= named


def test_a_process_waits_for_hours_where_another_attacks_a_longer_chunk(
    results: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    assert all(float(found["hours"]) >= 24 for found in results[1])
