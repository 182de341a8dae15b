"""How models are scanned for what their owner may have done to them (``robustexplain scan``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..fields import Count, Fraction, check_fields


@dataclass(frozen=True)
class Scanning:
    """How models are scanned.

    Args:
        scanners: by label.
        models: how many honest models are trained, each from another seed, and manipulated.
        probe: samples on which maps are compared with the honest ones.
        alarm: p-value up to which a model counts as detected; below ``1 / (models + 1)`` none can be.
    """

    scanners: dict[str, Any] = field(default_factory=dict)
    models: Count = 12
    probe: Count = 64
    alarm: Fraction = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
