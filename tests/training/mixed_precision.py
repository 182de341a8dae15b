"""What ``test_precision.py`` launches in bfloat16: a short training, and what its module computes in afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from robustexplain.training import Session, Training, accelerator_for, cross_entropy, fit


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def watched(module: nn.Module) -> dict[bool, set[str]]:
    """In which precision the first layer gives its output: in train mode, and in eval mode."""
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    module[0].register_forward_hook(lambda part, x, out: seen[part.training].add(str(out.dtype)))  # type: ignore[index]
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    session = Session(accelerator_for(cpu=True), out)
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    data, settings = TensorDataset(x, y), Training(epochs=2, batch_size=16, validation=0.25)
    module = net()
    first = watched(module)
    fit(module, cross_entropy, data, settings, name="net", session=session)
    logits = module(x)
    plain = net()
    saved = load_file(str(out / "net.safetensors"))
    plain.load_state_dict({k[5:]: v for k, v in saved.items() if k.startswith("best.")})
    second = watched(module)
    fit(module, cross_entropy, data, settings, name="again", session=session)
    found = {
        "precision": session.accelerator.mixed_precision,
        "training": sorted(first[True]),
        "validation": sorted(first[False]),
        "again": sorted(second[True]),
        "logits": str(logits.dtype),
        "equal": bool(torch.equal(logits, plain(x))),
        "forward": "forward" in vars(module),
        "held": len(session.accelerator._models) + len(session.accelerator._optimizers),
    }
    fit(net(), cross_entropy, data, Training(epochs=1), name="short", session=session)
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
