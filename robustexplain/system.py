"""A system, which is deployed and attacked: a classifier, its interpreter, perhaps a detector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import checks
from .data.inputs import InputSpec
from .door import suited
from .errors import InputError
from .interpreters.base import Interpreter, finite
from .interpreters.certificate import Certificate
from .interpreters.scalar import Target
from .parts import modules_of, moved
from .registry import PARTS
from .transforms import HarmlessChange, harmless_for

if TYPE_CHECKING:
    from PIL import Image

    from .storage import Weights


@dataclass(frozen=True)
class Explained:
    """The outputs of a system for a batch.

    Args:
        logits: ``[B, K]``.
        maps: ``[B, H, W]``, raw and signed as the method defines them.
        score: ``[B]``, the detector's score, higher is more suspicious; ``None`` without a detector.
        alarm: ``[B]`` bool, whether the score passes the detector's threshold; ``None`` without a detector.
        interpreter: the interpreter that computed the maps.
        certificate: what is proved of the maps; ``None`` unless the interpreter proves something.
    """

    logits: Tensor
    maps: Tensor
    score: Tensor | None = None
    alarm: Tensor | None = None
    interpreter: Interpreter | None = field(default=None, repr=False, compare=False)
    certificate: Certificate | None = field(default=None, repr=False, compare=False)

    @property
    def prediction(self) -> Tensor:
        """``[B]``: the class with the largest logit."""
        return self.logits.argmax(1)


@runtime_checkable
class Detector(Protocol):
    """Scores how suspicious an input is; an alarm is a score above ``threshold``.

    If ``score`` has a second parameter ``seen``, the system passes its outputs for the same inputs (:class:`Explained`,
    of the predicted classes), so that they need not be computed again. The classifiers that a detector watches are its
    ``models``, or its ``model``, if it has such an attribute. With a method ``following(model, copy)`` it can watch a
    copy of the model with other random draws.
    """

    @property
    def threshold(self) -> float:
        """The score above which an input raises the alarm, calibrated on clean inputs."""
        ...

    @property
    def soft_threshold(self) -> float:
        """The threshold of ``soft_score`` with the same rate of false alarms as ``threshold``."""
        ...

    def score(self, x: Tensor) -> Tensor:
        """``[B]``, higher is more suspicious; not necessarily differentiable."""
        ...

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``, a differentiable surrogate of ``score`` for adaptive attacks."""
        ...


@PARTS.register("system")
@dataclass(frozen=True, eq=False)
class System:
    """A classifier, the interpreter that explains it, and perhaps a detector that watches both.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
        interpreter: explains ``model``.
        detector: raises the alarm on suspicious inputs.
        inputs: the images that it takes and the names of its classes; ``None`` if unknown.
        defenses: registered names of the defenses that were applied, in order.
        stale_detector: whether the detector may watch another model than the deployed one, as after a manipulation of
            the model.

    Raises:
        InputError: if the interpreter explains, or the detector watches, another model than the one deployed, or a
            threshold is NaN.

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
    inputs: InputSpec | None = None
    defenses: tuple[str, ...] = ()
    stale_detector: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.interpreter, Interpreter):
            raise InputError(f"interpreter must be an Interpreter, got {self.interpreter!r}; make one with (model)")
        if self.interpreter.model is not self.model:
            raise InputError("the interpreter explains another model object than the system deploys")
        if self.detector is not None and not isinstance(self.detector, Detector):
            raise InputError(f"detector must have threshold, score and soft_score, got {type(self.detector).__name__}")
        for name in ("threshold", "soft_threshold") if self.detector is not None else ():
            value = getattr(self.detector, name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise InputError(f"the detector's {name} must be a number, got {value!r}: no score could exceed it")
        if self.inputs is not None and not isinstance(self.inputs, InputSpec):
            raise InputError(f"inputs must be an InputSpec, got {type(self.inputs).__name__}")
        if self.inputs is not None:
            self.inputs.check_model(self.model)
        if not self.stale_detector and any(model is not self.model for model in watched(self.detector)):
            raise InputError(
                "the detector watches another model object than the system deploys: calibrate one on the deployed "
                "model (or say stale_detector=True, as manipulations do)"
            )

    def __repr__(self) -> str:
        # Each part's own would print the network again.
        parts = [type(part).__name__ for part in (self.model, self.interpreter, self.detector) if part is not None]
        return f"System({', '.join(parts)}; inputs={self.inputs!r}, defenses={self.defenses!r})"

    def __call__(self, x: Tensor, target: Target | None = None) -> Explained:
        """Classify, explain and, where there is a detector, score ``x`` ``[B, C, H, W]`` in ``[0, 1]``.

        Args:
            x: the batch.
            target: ``[B]`` classes to explain; default the prediction. Or a function of the model's answer that gives
                one number an input, ``[B]`` (:meth:`Interpreter.explain`).

        Raises:
            InputError: bad ``x`` or ``target``, images of another size or classes of another number than ``inputs``
                says, a part in train mode.
        """
        checks.inputs(x)
        if self.inputs is not None:
            self.inputs.check(x)
        for what, module in self._modules:
            checks.evaluating(module, what)
        found = finite(self.interpreter, self.interpreter.explain(x, target))
        if self.inputs is not None:
            self.inputs.check_classes(found.logits.shape[1])
        seen = Explained(found.logits, found.maps, interpreter=self.interpreter, certificate=found.certificate)
        if self.detector is None:
            return seen
        with torch.no_grad(), checks.one_dtype(x, self):
            score = scored(self.detector, x, seen if target is None else None)
        # A score that is NaN raises the alarm: it compares as neither above nor below.
        return replace(seen, score=score, alarm=~(score <= self.detector.threshold))

    @cached_property
    def _modules(self) -> tuple[tuple[str, nn.Module], ...]:
        parts = (("the model", self.model), ("the interpreter", self.interpreter), ("the detector", self.detector))
        # The model is part of the interpreter, and is named as the model.
        named = {id(module): (what, module) for what, part in reversed(parts) for module in modules_of(part)}
        return tuple(named.values())

    def prepare(self, image: Image.Image | str | PathLike[str]) -> Tensor:
        """An image or an image file as an input of the system, ``[1, C, H, W]``, read as in its training.

        It is rotated upright, converted to grey or colour, cropped or resized to the size of ``inputs``; on the model's
        device, in its dtype.

        Raises:
            MissingDataError: no such file.
            InputError: ``inputs`` is ``None``; PIL cannot read the image, or it has more than 8 bits a pixel.
        """
        if self.inputs is None:
            raise InputError("the system's inputs are not specified: replace(system, inputs=InputSpec(...))")
        return suited(self.model, self.inputs.read(image))

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> System:
        """The system with all its parts on another device, or in another floating-point dtype.

        As in torch, modules are moved *in place* (the model, networks of the interpreter and of the detector), also for
        other systems that share them; tensors are copied. Thresholds do not change: recalibrate after a change to a
        less precise dtype.

        Args:
            device: as ``torch.device`` takes it; ``None`` leaves every part where it is. A dtype alone will do as well.
            dtype: such as ``torch.bfloat16``; integers keep theirs.

        Raises:
            InputError: no such device, or no floating-point dtype.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise InputError(f"to takes a device and a dtype, got the dtypes {device} and {dtype}")
            device, dtype = None, device
        return moved(self, device, dtype)

    def recalibrated(
        self,
        x: Tensor,
        false_alarms: float = 0.05,
        batch_size: int = 64,
        harmless: Sequence[HarmlessChange] | None = None,
    ) -> System:
        """The system with new thresholds of its detector: at most a share ``false_alarms`` of ``x`` raises the alarm.

        And at most that share of ``x`` after harmless changes, one drawn for each input.

        Args:
            x: clean inputs ``[N, C, H, W]`` from the system's deployment, some dozens at least.
            false_alarms: in ``[0, 1]``.
            batch_size: inputs scored at once.
            harmless: what may reach the system there (:mod:`robustexplain.transforms`); default the usual changes of
                the kind of input; ``()``: clean inputs alone.

        Raises:
            InputError: no detector, or one that cannot be calibrated anew; bad ``x``.
        """
        checks.inputs(x)
        if self.inputs is not None:
            self.inputs.check(x)
        calibrate = getattr(self.detector, "recalibrated", None)
        if calibrate is None:
            raise InputError(f"the system {self._detector_text}, which cannot be recalibrated")
        if "harmless" not in inspect.signature(calibrate).parameters:
            # A detector of somebody's own, calibrated on clean inputs alone.
            if harmless:
                raise InputError(f"the system {self._detector_text}, whose recalibrated knows no harmless changes")
            return replace(self, detector=calibrate(x, false_alarms, batch_size))
        changes = harmless_for((), x.shape[1:], x) if harmless is None else tuple(harmless)
        return replace(self, detector=calibrate(x, false_alarms, batch_size, changes))

    @torch.no_grad()
    def p_values(self, x: Tensor) -> Tensor:
        """``[B]``: the p-value of each input, from the detector's scores of clean inputs at calibration.

        Raises:
            InputError: no detector, or one that keeps no calibration scores; bad ``x``.
        """
        checks.inputs(x)
        p_values = getattr(self.detector, "p_values", None)
        if p_values is None:
            raise InputError(f"the system {self._detector_text}, which keeps no scores of clean inputs to compare with")
        values: Tensor = p_values(x)
        return values

    @property
    def _detector_text(self) -> str:
        return "has no detector" if self.detector is None else f"has a {type(self.detector).__name__}"

    def without_detector(self) -> System:
        """The system without its detector."""
        return replace(self, detector=None, stale_detector=False)

    @property
    def random(self) -> bool:
        """Whether model (its transforms), interpreter or detector use random draws."""
        return any(map(draws, (self.model, self.interpreter, self.detector)))

    @property
    def rounds(self) -> bool:
        """Whether model (its transforms), interpreter or detector round, so that their derivative is zero."""
        parts = (*self.model.modules(), self.interpreter, self.detector)
        return any(getattr(part, "rounds", False) is True for part in parts)

    def redrawn(self, seed: int) -> System:
        """The system with other random draws, over which an adversary who does not know the seed averages.

        A detector that watches the model watches the redrawn one (its ``following``); one without ``following`` keeps
        the deployed one with its draws, and ``stale_detector`` is true.
        """
        if not self.random:
            return self
        model, interpreter = redrawn(self.model, seed), redrawn(self.interpreter, seed)
        interpreter = interpreter if model is self.model else interpreter.with_shared_weights(model)
        detector = following(redrawn(self.detector, seed), self.model, model)
        stale = self.stale_detector or any(other is not model for other in watched(detector))
        return replace(self, model=model, interpreter=interpreter, detector=detector, stale_detector=stale)

    def save(self, folder: str | Path) -> Path:
        """Write ``system.json``, ``weights.safetensors`` and further parts' files into ``folder``.

        Files of a system saved there before are replaced once the new ones are written; other files are not touched. An
        error while they are written leaves the old system as it was. A classifier that no registered
        builder makes must be passed on loading.

        Raises:
            InputError: if a part could not be rebuilt without code, or holds a number that is not finite.
        """
        from .storage import save_component

        return save_component(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        model: nn.Module | None = None,
        weights: Weights = "same",
        sha256: str | None = None,
    ) -> System:
        """Read a saved system, with all weights frozen and in eval mode; nothing in the folder runs code.

        Every file is compared with its checksum first. That shows damage, not forgery: who can write the folder can
        write checksums. ``sha256`` from elsewhere (:func:`robustexplain.storage.checksum`) shows both.

        Args:
            folder: what :meth:`save` wrote.
            model: the classifier, if no registered builder makes it. It is not changed: weights, mode,
                ``requires_grad``. What a defense put around it (transforms, votes) is put around it again, unless it
                stands there.
            weights: of ``model``: ``same``: they must equal the saved ones; ``stored``: deploy a copy of it with the
                saved ones; ``own``: deploy it with other weights, with a warning.
            sha256: the checksum that the system must have.

        Raises:
            MissingDataError: if the folder holds no saved system, or a part of it is missing.
            InputError: damaged, changed, of a newer version, or another system than expected; a model that does not
                fit, has something else around it, or answers otherwise with the same weights (where ``inputs`` says
                the size of the images).
        """
        from .storage import load_component

        # Weights that are made in inference mode can never be differentiated through.
        with torch.inference_mode(False):
            system = load_component(Path(folder), model=model, weights=weights, sha256=sha256)
        if not isinstance(system, cls):
            raise InputError(f"{folder} holds a {type(system).__name__}, not a System")
        return system


def scored(detector: Detector, x: Tensor, seen: Explained | None = None) -> Tensor:
    """The detector's score of ``x``, ``[B]``; ``seen`` is passed to a detector that has such a parameter."""
    score: Callable[..., Tensor] = detector.score
    takes_seen = seen is not None and "seen" in inspect.signature(score).parameters
    return score(x, seen) if takes_seen else score(x)


def watched(detector: Detector | None) -> tuple[nn.Module, ...]:
    """The classifiers that a detector watches: its ``models``, or its ``model``; none without these attributes."""
    models: tuple[nn.Module, ...] | None = getattr(detector, "models", None)
    model = getattr(detector, "model", None)
    return models if models is not None else (model,) if isinstance(model, nn.Module) else ()


def knows(detector: Any, x: Tensor) -> Tensor:
    """``[B]`` bool: inputs that the detector was made with; none of a detector without a method ``knows``."""
    known: Tensor | None = detector.knows(x) if hasattr(detector, "knows") else None
    return torch.zeros(len(x), dtype=torch.bool, device=x.device) if known is None else known


def following(detector: Any, model: nn.Module, copy: nn.Module) -> Any:
    """The detector on ``copy``, which has the layers of ``model``, where it watches ``model``.

    Itself where the models are one, or where it has no method ``following``.
    """
    follow = getattr(detector, "following", None)
    return detector if follow is None or copy is model else follow(model, copy)


def redrawn(part: Any, seed: int) -> Any:
    """A part of a system with other random draws; itself where nothing is random."""
    return part.redrawn(seed) if draws(part) else part


def on_model(interpreter: Interpreter, model: nn.Module) -> Interpreter:
    """The interpreter and its parts, explaining another model of the same architecture."""
    return interpreter.on_model(model)


def described(interpreter: Interpreter) -> list[object]:
    """Class and settings of an interpreter: :meth:`Interpreter.described`."""
    return interpreter.described()


@runtime_checkable
class _Random(Protocol):
    """A part with random draws that can be drawn again."""

    @property
    def random(self) -> bool: ...

    def redrawn(self, seed: int) -> Any: ...


def draws(part: object) -> bool:
    """Whether a part of a system (model, interpreter, detector) is random by its own attribute."""
    return isinstance(part, _Random) and part.random is True
