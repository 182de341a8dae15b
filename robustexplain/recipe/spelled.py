"""Numbers as people write them."""

from __future__ import annotations


def spelled(value: float) -> str:
    """A radius or a count in its usual form: ``8/255`` for 0.0313725..., ``0.125``, ``50``."""
    if float(f"{value:.3g}") == value:
        return f"{value:.3g}"
    steps = value * 255
    if 0 < round(steps) <= 255 and abs(steps - round(steps)) < 1e-6:
        return f"{round(steps)}/255"
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"
