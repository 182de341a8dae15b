"""A system is what is deployed and attacked: a classifier, its interpreter, perhaps a detector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import checks
from .errors import InputError
from .interpreters.base import Interpreter
from .registry import PARTS


@dataclass(frozen=True)
class Explained:
    """What a system says of a batch.

    Args:
        logits: ``[B, K]``.
        maps: ``[B, H, W]``, raw and signed as the method defines them.
        score: ``[B]``, the detector's score, higher is more suspicious; ``None`` without a detector.
        alarm: ``[B]`` bool, whether the score passes the detector's threshold; ``None`` without a detector.
    """

    logits: Tensor
    maps: Tensor
    score: Tensor | None = None
    alarm: Tensor | None = None

    @property
    def prediction(self) -> Tensor:
        """``[B]``: the class with the largest logit."""
        return self.logits.argmax(1)


@runtime_checkable
class Detector(Protocol):
    """Scores how suspicious an input is; an alarm is a score above ``threshold``."""

    @property
    def threshold(self) -> float:
        """The score above which an input raises the alarm, calibrated on clean inputs."""
        ...

    @property
    def soft_threshold(self) -> float:
        """The soft score above which clean inputs are as rare as above ``threshold``."""
        ...

    def score(self, x: Tensor) -> Tensor:
        """``[B]``, higher is more suspicious; no gradient is promised."""
        ...

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``, a differentiable stand-in for ``score`` that an adaptive attack follows."""
        ...


@PARTS.register("system")
@dataclass(frozen=True, eq=False)
class System:
    """A classifier, the interpreter that explains it, and perhaps a detector that watches both.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
        interpreter: explains ``model``.
        detector: raises the alarm on suspicious inputs.

    Raises:
        InputError: if the interpreter explains another model than the one deployed.
    """

    model: nn.Module
    interpreter: Interpreter
    detector: Detector | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.interpreter, Interpreter):
            raise InputError(f"interpreter must be an Interpreter, got {self.interpreter!r}; make one with (model)")
        if self.interpreter.model is not self.model:
            raise InputError("the interpreter explains another model object than the system deploys")
        if self.detector is not None and not isinstance(self.detector, Detector):
            raise InputError(f"detector must have threshold, score and soft_score, got {type(self.detector).__name__}")

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Explained:
        """Classify, explain and, where there is a detector, score ``x`` ``[B, C, H, W]`` in ``[0, 1]``.

        Args:
            x: the batch.
            target: ``[B]`` classes to explain; default the prediction.

        Raises:
            InputError: bad ``x`` or ``target``.
        """
        checks.inputs(x)
        found = self.interpreter.explain(x, target)
        if self.detector is None:
            return Explained(found.logits, found.maps)
        with torch.no_grad():
            score = self.detector.score(x)
        return Explained(found.logits, found.maps, score, score > self.detector.threshold)

    def without_detector(self) -> System:
        """The same without its detector."""
        return replace(self, detector=None)

    @property
    def random(self) -> bool:
        """Whether model (its transforms), interpreter or detector draw, so that :meth:`redrawn` differs."""
        return any(map(draws, (self.model, self.interpreter, self.detector)))

    @property
    def rounds(self) -> bool:
        """Whether model (its transforms), interpreter or detector round, so that their derivative is zero."""
        return any(getattr(part, "rounds", False) is True for part in (self.model, self.interpreter, self.detector))

    def redrawn(self, seed: int) -> System:
        """The same with other draws: what an adversary who does not know the seed averages over.

        A detector that looks at the model sees the one that is deployed, whatever it draws, unless it says ``random``.
        """
        if not self.random:
            return self
        model, interpreter = _again(self.model, seed), _again(self.interpreter, seed)
        interpreter = interpreter if model is self.model else interpreter.with_shared_weights(model)
        return replace(self, model=model, interpreter=interpreter, detector=_again(self.detector, seed))

    def save(self, folder: str | Path) -> Path:
        """Write ``system.json`` and ``weights.safetensors`` (and a detector's own files) into ``folder``.

        Raises:
            InputError: if a part was not made by a registered builder, so that it could not be rebuilt without code.
        """
        from .storage import save_component

        return save_component(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, model: nn.Module | None = None) -> System:
        """Read a saved system; nothing in the folder runs code.

        Args:
            folder: what :meth:`save` wrote.
            model: a classifier to put the rest around, for one that no registered builder makes.

        Raises:
            MissingDataError: if the folder holds no saved system.
        """
        from .storage import load_component

        system = load_component(Path(folder), model=model)
        if not isinstance(system, cls):
            raise InputError(f"{folder} holds a {type(system).__name__}, not a System")
        return system


def on_model(interpreter: Interpreter, model: nn.Module) -> Interpreter:
    """The same interpreter, and those that it is made of, explaining another model of the same architecture."""
    return interpreter.on_model(model)


def described(interpreter: Interpreter) -> list[object]:
    """What an interpreter is but for its networks and tensors: :meth:`Interpreter.described`."""
    return interpreter.described()


@runtime_checkable
class _Redrawn(Protocol):
    """What draws, and can draw anew."""

    @property
    def random(self) -> bool: ...

    def redrawn(self, seed: int) -> Any: ...


def draws(part: object) -> bool:
    """Whether a part of a system (model, interpreter, detector) says that it is random."""
    return isinstance(part, _Redrawn) and part.random is True


def _again(part: Any, seed: int) -> Any:
    return part.redrawn(seed) if draws(part) else part
