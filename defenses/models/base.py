"""Base class of the defenses that harden the classifier."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from robustexplain import models
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter
from robustexplain.random_streams import derive
from robustexplain.registry import PARTS
from robustexplain.system import System, on_model
from robustexplain.training import Samples, Session

from ..base import TrainedDefense, admit_samples, refuse


@dataclass(frozen=True)
class ModelDefense(TrainedDefense):
    """Trains the classifier so that it is harder to deceive; the interpreter then explains the hardened model.

    A subclass implements ``_harden``. In a stack it comes first: a detector is calibrated on the model that it watches,
    and a trained interpreter (RTS) was fitted to one model, so a system with either is refused. In that case harden the
    model alone with :meth:`hardened`, train the interpreter on it, and add the detector last.
    """

    layer = "model"
    part: ClassVar[Literal["train", "defense"]] = "train"

    def hardened(self, model: nn.Module, data: Samples, session: Session | None = None) -> nn.Module:
        """A hardened copy of ``model``, frozen and in eval mode; ``model`` stays as it is.

        Args:
            model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
            data: map-style, gives ``(x, label)``.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data, or data that are none for this classifier.
        """
        if len(data) == 0:
            raise InputError(f"{type(self).__name__} trains, and needs data: samples that the evaluation does not use")
        admit_samples(model, data)
        with torch.inference_mode(False):
            return self._hardened(model, data, session or Session())

    def _hardened(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        """:meth:`hardened` on samples that were looked at."""
        trainable = copy.deepcopy(model).to(session.device).requires_grad_(True)
        hardened = self._harden(trainable, data, session)
        if not isinstance(hardened, nn.Module):
            raise InputError(f"{type(self).__name__}._harden must give a model, got {type(hardened).__name__}")
        return hardened.requires_grad_(False).eval()

    @abstractmethod
    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        """The hardened model; ``model`` is a copy on the session's device that may be trained in place."""

    def _train(self, system: System, data: Samples, session: Session) -> System:
        name = type(self).__name__
        refuse(
            system.detector is not None,
            f"{name} changes the model, and the system's detector watches the model as it was; harden the model first, "
            "then add the detector to the hardened system",
        )
        trained = trained_parts(system.interpreter)
        refuse(
            bool(trained),
            f"{name} changes the model, and {' and '.join(trained)} was trained for the model as it was; train another "
            f"for {name}(...).hardened(model, data)",
        )
        model = self._hardened(system.model, data, session)
        return replace(system, model=model, interpreter=on_model(system.interpreter, model))


def trained_parts(interpreter: Interpreter) -> list[str]:
    """Class names of the interpreter and of its parts, as far as they have networks besides the model."""
    found: list[str] = []
    for field in fields(interpreter):
        value = getattr(interpreter, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Interpreter):
                found += trained_parts(part)
            elif isinstance(part, nn.Module) and part is not interpreter.model:
                found.append(type(interpreter).__name__)
    return list(dict.fromkeys(found))


def begun(model: nn.Module, fresh: bool, seed: int) -> str:
    """The digest of the weights as they are; then, if ``fresh``, random ones are put in their place.

    The last bits of random weights differ between kinds of machine, and their seed is known: what a training is made of
    is told by the weights before.

    Raises:
        UnsupportedModelError: fresh weights for a model that ``robustexplain.models`` does not build.
    """
    start = digest_tensors(model.state_dict())
    if fresh:
        _draw_fresh_weights(model, seed)
    return start


def _draw_fresh_weights(model: nn.Module, seed: int) -> None:
    """Put random weights in the place of the network's own.

    Raises:
        UnsupportedModelError: a model that ``robustexplain.models`` does not build.
    """
    model = models.innermost(model)
    spec = getattr(model, "spec", None)
    if not isinstance(spec, models.ModelSpec) or spec.name in PARTS:
        raise UnsupportedModelError(
            f"fresh weights need a model that robustexplain.models builds, and {type(model).__name__} is none: "
            "hand in an untrained one, and leave fresh off"
        )
    new = models.build(spec, seed=derive(seed, "fresh") % 2**32)
    model.load_state_dict(new.state_dict())
