"""Attacks of other libraries: torchattacks, foolbox, the Adversarial Robustness Toolbox, or any function.

They attack the prediction only. Their result is detached, clipped to ``[0, 1]`` and evaluated by a new forward pass of
the real model. The model and all global random states are restored afterwards.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError, UnknownNameError
from robustexplain.fields import Radius
from robustexplain.objectives import Goal, Misclassify, Objective, Observation
from robustexplain.objectives.confident import bounded
from robustexplain.random_streams import Streams, global_state, seed_global_state
from robustexplain.registry import ATTACKS
from robustexplain.rounding import is_half, toward, wide
from robustexplain.system import System
from robustexplain.training import frozen

from ..base import Attack
from ..search.loop import Plan, SearchResult
from ..threat import Threat

Call = Callable[[nn.Module, Tensor, Tensor, "Tensor | None"], Tensor]
"""``(model, x, y, goal_class) -> attacked x``; ``goal_class`` is ``None`` for an untargeted attack."""
Settings = dict[str, bool | int | float | str | None]
_LEAD = 14.0
"""Keyword arguments of an attack of another library, as data."""


class GuardedModel(nn.Module):
    """Wrapper that gives other libraries logits in the inputs' dtype and protects the model from changes.

    Args:
        model: the attacked classifier.
        like: an input, for device and dtype.
        most: by how much the first class may lead in logits; beyond, they are divided, as a cross-entropy would give no
            gradient.
    """

    def __init__(self, model: nn.Module, like: Tensor, most: float = _LEAD) -> None:
        super().__init__()
        self.most = most
        # In a list, so that it is no submodule: libraries change modes, move modules and clear gradients.
        self._model, self.like, self.count = [model], like, 0
        # Some libraries take the device from the first parameter.
        self.place = nn.Parameter(like.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K]``."""
        self.count += len(x)
        logits = answer(self._model[0], x.to(self.like), finite=False)
        return bounded(logits.to(x.dtype), self.most)


@dataclass(frozen=True)
class LibraryThreat(Threat):
    """The threat model of the other library's own settings; results are clipped to ``[0, 1]``."""

    @property
    def summary(self) -> str:
        """A few words for tables."""
        return "as set"

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to ``[0, 1]``."""
        return variable.clamp(0, 1)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """The input itself: the other library draws its own start."""
        return x


@dataclass(frozen=True)
class FunctionPlan(Plan):
    """Runs a function, one sample at a time or the whole batch at once, and checks its result.

    Args:
        call: the function.
        name: for tables.
        batched: call it on the whole batch.
        most: by how much the first class leads in the logits that it gets (:class:`GuardedModel`).
    """

    call: Call
    name: str
    batched: bool = False
    most: float = _LEAD
    threat: Threat = field(default_factory=LibraryThreat)

    @property
    def aim(self) -> Objective:
        """The prediction."""
        return Misclassify()

    @property
    def summary(self) -> str:
        """Its name."""
        return self.name

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """The function's result with its queries; ``stalled`` where it did not lower the cross-entropy objective."""
        size = len(goal.x) if self.batched else 1
        seeds = streams.integers(2**31 - 1).tolist()
        found, counts = [], []
        for start in range(0, len(goal.x), size):
            rows = torch.arange(start, start + size, device=goal.x.device)
            with seeded(seeds[start], goal.x.device), frozen(system.model):
                x, count = self._once(system.model, goal.select(rows))
            found.append(x)
            counts += [-(-count // size)] * size
        x = self.threat.project(goal.x, torch.cat(found))
        queries = torch.tensor(counts, device=x.device)
        return SearchResult.of(x, queries, _stalled(system, goal, x))

    def _once(self, model: nn.Module, goal: Goal) -> tuple[Tensor, int]:
        guarded = GuardedModel(model, goal.x, self.most)
        wanted = None if goal.goal_class is None else goal.goal_class.clone()
        # The library works in float32 at least; its result is rounded towards the input, so that no ball is left.
        x = self.call(guarded, wide(goal.x).clone(), goal.label.clone(), wanted)
        if not isinstance(x, Tensor) or x.shape != goal.x.shape or not bool(torch.isfinite(x).all()):
            what = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{self.name} must return finite images of shape {list(goal.x.shape)}, got {what}")
        found = x.detach().to(goal.x.device)
        return toward(goal.x, found) if is_half(goal.x) else found.to(goal.x), guarded.count


@torch.no_grad()
def _stalled(system: System, goal: Goal, x: Tensor) -> Tensor:
    before, after = (Observation(image, answer(system.model, image)) for image in (goal.x, x))
    aim = Misclassify()
    return ~aim.met(after, goal) & (aim.loss(after, goal) >= aim.loss(before, goal))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds every global random state within the block and restores it afterwards."""
    with global_state(device):
        seed_global_state(seed, device)
        yield


@dataclass(frozen=True)
class Foreign(Attack):
    """Any function ``(model, x, y, goal_class) -> x'`` as an attack; in Python only, not in recipes.

    ``Foreign(lambda model, x, y, goal: torchattacks.PGD(model)(x, y))``.

    Args:
        call: takes a model that gives logits ``[B, K]``, images, labels and goal classes (``None``: untargeted). Logits
            whose first class leads by more than 14 are divided, so that it leads by 14.
        batched: call it on the whole batch at once; faster, but a sample's result may then depend on its batch.
    """

    call: Call
    batched: bool = False

    def plan(self, system: System) -> Plan:
        """Run the function."""
        return FunctionPlan(self.call, getattr(self.call, "__name__", type(self.call).__name__), self.batched)


@ATTACKS.register("torchattacks", paper="Kim 2020 (torchattacks)", needs=("gradients",))
@dataclass(frozen=True)
class Torchattacks(Attack):
    """An attack of torchattacks, with its own settings.

    Needs ``pip install 'robustexplain[attacks]'``.

    Args:
        attack: its class, such as ``PGD``, ``CW`` or ``APGDT``.
        settings: its keyword arguments, such as ``{"eps": 0.03, "alpha": 0.01, "steps": 10}``.
        batched: call it on the whole batch at once; faster, but a sample's result may then depend on its batch.
    """

    attack: str = "PGD"
    settings: Settings = field(default_factory=dict)
    batched: bool = False

    def ready(self) -> None:
        """Check that the library is installed and has the attack.

        Raises:
            InputError: the library is not installed, or has no such attack.
        """
        library = _library("torchattacks")
        _named(library, self.attack, library.attack.Attack)

    def plan(self, system: System) -> Plan:
        """Run it, towards the goal class if there is one."""
        call = partial(_torchattacks, self.attack, dict(self.settings))
        return FunctionPlan(call, f"torchattacks.{self.attack}", self.batched, _lead(self.settings))


@ATTACKS.register("foolbox", paper="Rauber et al. 2020 (foolbox)", needs=("gradients",))
@dataclass(frozen=True)
class Foolbox(Attack):
    """An attack of foolbox, with its own settings.

    Needs ``pip install 'robustexplain[attacks]'``.

    Args:
        attack: its class, such as ``LinfPGD`` or ``L2CarliniWagnerAttack``.
        settings: its keyword arguments, such as ``{"steps": 10, "rel_stepsize": 0.1}``.
        eps: radius in the attack's own norm, for ``[0, 1]`` pixels; ``None`` lets an attack that looks for the smallest
            change return it whatever its size.
        batched: call it on the whole batch at once; faster, but a sample's result may then depend on its batch.
    """

    attack: str = "LinfPGD"
    settings: Settings = field(default_factory=dict)
    eps: Radius | None = 8 / 255
    batched: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and not self.eps >= 0:
            raise FieldError("Foolbox", "eps", f"must be at least 0, got {self.eps!r}")

    def ready(self) -> None:
        """Check that the library is installed and has the attack.

        Raises:
            InputError: the library is not installed, or has no such attack.
        """
        library = _library("foolbox")
        _made(library.attacks, self.attack, library.attacks.Attack, **self.settings)

    def plan(self, system: System) -> Plan:
        """Run it, towards the goal class if there is one."""
        call = partial(_foolbox, self.attack, dict(self.settings), self.eps)
        return FunctionPlan(call, f"foolbox.{self.attack}", self.batched, _lead(self.settings))


@ATTACKS.register("art", paper="Nicolae et al. 2018 (Adversarial Robustness Toolbox)", needs=("gradients",))
@dataclass(frozen=True)
class ART(Attack):
    """An evasion attack of the Adversarial Robustness Toolbox, with its own settings; it computes in float32.

    Needs ``pip install 'robustexplain[attacks]'``.

    Args:
        attack: its class, such as ``ProjectedGradientDescent``, ``HopSkipJump`` or ``SquareAttack``.
        settings: its keyword arguments, such as ``{"eps": 0.03, "eps_step": 0.01, "max_iter": 10}``.
        batched: call it on the whole batch at once; faster, but a sample's result may then depend on its batch.
    """

    attack: str = "ProjectedGradientDescent"
    settings: Settings = field(default_factory=dict)
    batched: bool = False

    def ready(self) -> None:
        """Check that the library is installed and has the attack.

        Raises:
            InputError: the library is not installed, or has no such attack.
        """
        _named(_library("art.attacks.evasion"), self.attack, _library("art.attacks").EvasionAttack)

    def plan(self, system: System) -> Plan:
        """Run it, towards the goal class if there is one."""
        return FunctionPlan(
            partial(_art, self.attack, dict(self.settings)), f"art.{self.attack}", self.batched, _lead(self.settings)
        )


def _lead(settings: Settings) -> float:
    """The lead that logits keep: beyond a wanted one, which Carlini and Wagner's attack has as a setting."""
    wanted = [settings.get(name) for name in ("confidence", "kappa")]
    return _LEAD + max(float(value) if isinstance(value, int | float) else 0.0 for value in wanted)


def _torchattacks(
    name: str, settings: Settings, model: nn.Module, x: Tensor, y: Tensor, goal_class: Tensor | None
) -> Tensor:
    library = _library("torchattacks")
    attack = _made(library, name, library.attack.Attack, model, **settings)
    if goal_class is None:
        found: Tensor = attack(x, y)
        return found
    if "targeted" not in attack.supported_mode:
        raise InputError(f"torchattacks.{name} has no targeted form, and a goal_class was given")
    attack.set_mode_targeted_by_label(quiet=True)
    found = attack(x, goal_class)
    return found


def _foolbox(
    name: str,
    settings: Settings,
    eps: float | None,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    goal_class: Tensor | None,
) -> Tensor:
    library = _library("foolbox")
    attack = _made(library.attacks, name, library.attacks.Attack, **settings)
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
    aim = library.Misclassification(y) if goal_class is None else library.TargetedMisclassification(goal_class)
    try:
        found: Tensor = attack(wrapped, x, aim, epsilons=eps)[1]
    except ValueError as error:
        message = f"foolbox.{name}: {error}; this attack may have no targeted form, or need another eps"
        raise InputError(message) from error
    return found


def _art(name: str, settings: Settings, model: nn.Module, x: Tensor, y: Tensor, goal_class: Tensor | None) -> Tensor:
    _library("art")
    evasion, classification = _library("art.attacks.evasion"), _library("art.estimators.classification")
    with torch.no_grad():
        num_classes = answer(model, x[:1]).shape[1]
    classifier = classification.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), num_classes, clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )  # fmt: skip
    known = getattr(getattr(evasion, name, None), "attack_params", [])
    given = dict(settings) | ({"verbose": False} if "verbose" in known and "verbose" not in settings else {})
    if goal_class is not None:
        if "targeted" not in known and hasattr(evasion, name):
            raise InputError(f"art.{name} has no targeted form, and a goal_class was given")
        given["targeted"] = True
    attack = _made(evasion, name, _library("art.attacks").EvasionAttack, classifier, **given)
    wanted = y if goal_class is None else goal_class
    found = attack.generate(x=x.float().cpu().numpy(), y=wanted.cpu().numpy())
    return torch.from_numpy(np.asarray(found)).to(x)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this attack needs {name.split('.')[0]} ({error}): pip install 'robustexplain[attacks]'"
        ) from error


def _named(home: Any, name: str, kind: type) -> None:
    """Refuse a name that is no attack of the library."""
    known = [key for key, value in vars(home).items() if isinstance(value, type) and issubclass(value, kind)]
    if name not in known:
        raise UnknownNameError(f"attack of {home.__name__}", name, known)


def _made(home: Any, name: str, kind: type, *arguments: Any, **settings: Any) -> Any:
    """An attack of another library; unknown names and settings raise our errors."""
    _named(home, name, kind)
    try:
        return getattr(home, name)(*arguments, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{home.__name__}.{name} refuses its settings {settings}: {error}") from error
