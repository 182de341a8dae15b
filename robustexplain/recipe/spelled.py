"""Numbers as people write them."""

from __future__ import annotations

LEVELS = 64
"""Up to so many grey levels of 256 a radius is written as a share of 255."""


def spelled(value: float) -> str:
    """A radius or a count in its usual form: ``8/255`` for 0.0313725..., ``0.125``, ``50``."""
    if float(value).is_integer():
        return str(int(value))
    steps = value * 255
    levels = 0 < round(steps) <= LEVELS and abs(steps - round(steps)) < 1e-6
    return f"{round(steps)}/255" if levels and float(f"{value:.3g}") != value else f"{value:.4g}"
