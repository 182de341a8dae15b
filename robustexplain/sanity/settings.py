"""What a recipe may say about its sanity checks."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import Count, NonNegative, check_fields


@dataclass(frozen=True)
class Sanity:
    """How interpreters are checked (``robustexplain sanity``).

    Args:
        images: how many of the judge part are explained.
        stages: in how many steps the network is randomised from the logits down; deep layers share a step.
        shift: constant that the input shift check adds to every pixel.
        label_epochs: epochs on random labels; they are harder to learn than true ones. 0 takes four times the recipe's.
        pictures: how many images have their maps drawn.
    """

    images: Count = 32
    stages: Count = 12
    shift: NonNegative = 0.3
    label_epochs: int = 0
    pictures: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)
