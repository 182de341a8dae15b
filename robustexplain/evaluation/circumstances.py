"""What a report says of a run beside its figures: when and where it was made, of which data, with which classes."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from .. import seals
from ..data import Data
from .identity import RUN
from .store import RunFolder


def host() -> str:
    """The machine in words: processor, number of processors, operating system; not its name."""
    system = f"{platform.system()} {platform.release()}"
    return f"{_processor()}, {os.cpu_count()} processors, {system}, Python {platform.python_version()}"


def note_circumstances(folder: RunFolder, data: Data, device: str) -> None:
    """Remember, once, when a run began, on which host and device, its data's name, sizes and classes."""
    known = folder.run
    if "started" in known:
        return
    words = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": host(),
        "device": device,
        "data_name": data.name,
        "parts": {part: len(getattr(data, part)) for part in ("train", "defense", "test")},
        "classes": list(data.classes),
    }
    seals.write(folder.root / RUN, {**known, **words})


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
