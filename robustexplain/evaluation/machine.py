"""What a run is made with: libraries, and the kind of machine; last digits of figures depend on both."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def libraries() -> dict[str, str]:
    """Versions of what computes."""
    return {name: version(name) for name in ("torch", "torchvision", "accelerate", "timm", "numpy", "scikit-learn")}


def machine(device: str) -> str:
    """This kind of machine in words: processor, its vector instructions as torch uses them, threads, device, torch."""
    vectors = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    cpu = f"{platform.machine()} {vectors}" + (f" (oneDNN: {limit})" if limit else "")
    threads = torch.get_num_threads()
    name = f", {torch.cuda.get_device_name()}" if device == "cuda" and torch.cuda.is_available() else ""
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}{name}, torch {torch.__version__}"
