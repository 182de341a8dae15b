"""A system is what is deployed and attacked: a classifier, its interpreter, perhaps a detector."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

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

    Examples:
        >>> import torch
        >>> import robustexplain as rx
        >>> from robustexplain import interpreters, models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> system = rx.System(model, interpreters.GradCAM(model))
        >>> seen = system(torch.rand(2, 1, 32, 32))
        >>> seen.logits.shape, seen.maps.shape
        (torch.Size([2, 10]), torch.Size([2, 32, 32]))
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
        """Whether the interpreter draws (SmoothGrad's noise, RISE's masks), so that :meth:`redrawn` differs."""
        return _has_seed(self.interpreter)

    def redrawn(self, seed: int) -> System:
        """The same with other draws: what an adversary who does not know the seed averages over."""
        return replace(self, interpreter=_reseeded(self.interpreter, seed)) if self.random else self

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
    parts = {
        name: tuple(on_model(part, model) for part in value) if isinstance(getattr(interpreter, name), tuple)
        else on_model(value[0], model)
        for name, value in _members(interpreter).items()
    }  # fmt: skip
    return replace(interpreter, model=model, **parts)


def described(interpreter: Interpreter) -> list[object]:
    """What an interpreter is but for its networks and tensors: class, settings, and the same of those it is made of."""
    settings = {f.name: getattr(interpreter, f.name) for f in fields(interpreter)}
    plain = {k: v for k, v in settings.items() if v is None or isinstance(v, (bool, int, float, str))}
    inner = [described(part) for parts in _members(interpreter).values() for part in parts]
    return [type(interpreter).__name__, plain, inner]


def _members(interpreter: Interpreter) -> dict[str, tuple[Interpreter, ...]]:
    """The interpreters that an interpreter is made of, by field."""
    found = {f.name: getattr(interpreter, f.name) for f in fields(interpreter)}
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in found.items()}
    return {n: p for n, p in parts.items() if p and all(isinstance(part, Interpreter) for part in p)}


def _has_seed(interpreter: Interpreter) -> bool:
    inner = (part for parts in _members(interpreter).values() for part in parts)
    return any(f.name == "seed" for f in fields(interpreter)) or any(map(_has_seed, inner))


def _reseeded(interpreter: Interpreter, seed: int) -> Interpreter:
    # A copy keeps what was found out about the model (its feature layer), which making a new one would look for again;
    # but for what was drawn.
    made = copy.copy(interpreter)
    made.__dict__.pop("_drawn", None)
    if any(f.name == "seed" for f in fields(made)):
        object.__setattr__(made, "seed", seed)
    for name, parts in _members(interpreter).items():
        inner = tuple(_reseeded(part, seed) for part in parts)
        object.__setattr__(made, name, inner if isinstance(getattr(made, name), tuple) else inner[0])
    return made
