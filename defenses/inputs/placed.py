"""What all defenses of the input do to a system: another model in its place, and which image is explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import nn

from robustexplain.interpreters import Interpreter, OfTransformed
from robustexplain.models import Reformed, Reformer
from robustexplain.random_streams import derive
from robustexplain.system import System

from ..base import TrainedDefense, refuse


def placed(
    system: System, model: nn.Module, wrap: Callable[[nn.Module, Interpreter], Interpreter] | None = None
) -> System:
    """The system with a model that changes its images first.

    Args:
        system: as it was.
        model: its model, behind what the defense does.
        wrap: makes the interpreter of the explained image from the system's own on ``model``; default: that one.

    Raises:
        UnsupportedModelError: a system with a detector, which was calibrated on the images as they came.
    """
    refuse(
        system.detector is not None,
        "the system's detector watches the classifier without transforms: apply them before it",
    )
    interpreter = system.interpreter.on_model(model)
    return replace(system, model=model, interpreter=wrap(model, interpreter) if wrap else interpreter)


@dataclass(frozen=True)
class TrainedInput(TrainedDefense):
    """Puts a trained network in front of the classifier; a subclass implements ``_reformer``."""

    explained: Literal["raw", "transformed"] = field(default="raw", kw_only=True)

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "input"
    part: ClassVar[Literal["train", "defense"]] = "train"

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system that an oblivious attacker assumes: without the network in front."""
        return root

    def _placed(self, system: System, network: Reformer) -> System:
        model = Reformed(system.model, network.requires_grad_(False).eval())
        return placed(system, model, OfTransformed if self.explained == "transformed" else None)


Drawn = TypeVar("Drawn", bound=nn.Module)


def drawn_anew(make: Callable[[], Drawn], seed: int, device: torch.device) -> Drawn:
    """A network with random weights of a seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "reformer") % 2**32)
        return make().to(device)
