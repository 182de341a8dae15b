"""Mixed precision is for training alone: what is trained in bfloat16 is used in its own precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

from robustexplain.errors import InputError, RunMismatchError
from robustexplain.training import Session, Training, accelerator_for, cross_entropy, fit

SCRIPT = Path(__file__).with_name("mixed_precision.py")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that ``accelerate launch`` ran in bfloat16."""
    out = tmp_path_factory.mktemp("bf16")
    paths = [str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    line += ["--mixed_precision", "bf16", "--dynamo_backend", "no", str(SCRIPT), str(out)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_precision_begins_and_ends_with_the_training(launched: Path) -> None:
    found = json.loads((launched / "found.json").read_text())
    assert found["precision"] == "bf16"
    assert found["training"] == ["torch.bfloat16"]
    assert found["again"] == ["torch.bfloat16"], "a second training of the same module is prepared again"
    assert found["validation"] == ["torch.float32"]
    assert found["logits"] == "torch.float32"
    assert found["equal"], "the trained module says what its saved weights say"
    assert not found["forward"], "the module's forward is its class's again"
    assert found["held"] == 0, "Accelerate keeps no module or optimiser"


def test_a_checkpoint_of_another_precision_is_refused(launched: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    data = TensorDataset(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)
    with pytest.raises(RunMismatchError, match=r"precision 'bf16', and this process has 'no'; launch it with --mixed"):
        fit(module, cross_entropy, data, Training(epochs=1), name="short", session=Session(folder=launched))


def test_half_precision_on_a_cpu_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    with pytest.raises(InputError, match=r"'fp16' needs a GPU, and this process has none; launch it with --mixed_pre"):
        accelerator_for(cpu=True)
    data = TensorDataset(torch.randn(8, 2), torch.arange(8) % 3)
    with pytest.raises(InputError, match="'fp16' needs a GPU"):
        fit(nn.Linear(2, 3), cross_entropy, data, Training(epochs=1), name="net", session=Session(own))
