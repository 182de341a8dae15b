"""GD-UAP: a universal perturbation computed without data, from the network's activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustexplain.door import answer
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Count, Fraction, Positive, check_fields
from robustexplain.objectives import Goal, Objective, Observation
from robustexplain.random_streams import Streams, generator
from robustexplain.registry import ATTACKS, OBJECTIVES
from robustexplain.rounding import wide
from robustexplain.system import System

from ..base import Attack
from ..search.loop import Plan, SearchResult
from ..search.universal import Fitted, FixedPerturbation, fitting_goal, mini_batches, unfitted
from ..search.updates import Adam
from .uap import Universal

Prior = Literal["none", "range", "data"]
"""Background of the perturbation while it is computed: grey, noise in the range of images, or images."""
_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d}


class _ConvolutionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in _CONVOLUTIONS:
            return output
        self.outputs.append(output)
        # A following in-place activation would overwrite the recorded output.
        return output.clone()


@contextmanager
def _convolutions() -> Iterator[list[Tensor]]:
    """The outputs of all convolutions that run in this block."""
    with _ConvolutionRecorder() as recorder:
        yield recorder.outputs


def activation_loss(model: nn.Module, x: Tensor) -> Tensor:
    """``-sum_l log(||a_l||^2 / 2)`` over the outputs ``a_l`` of the model's convolutions, ``[B]``.

    Raises:
        UnsupportedModelError: the model runs no convolution.
    """
    with _convolutions() as outputs:
        answer(model, x, finite=False)
    if not outputs:
        raise UnsupportedModelError(
            f"GD-UAP maximises the activations of convolutions, and {type(model).__name__} runs none in a forward pass"
        )
    energies = torch.stack([a.flatten(1).square().sum(1) / 2 for a in outputs])
    return -energies.clamp(min=torch.finfo(energies.dtype).tiny).log().sum(0)


@OBJECTIVES.register("large-activations", paper="Mopuri et al. 2018, eq. 5", needs=("gradients",))
@dataclass(frozen=True)
class LargeActivations(Objective):
    """Minus the log of the product of all convolutions' activation norms; it needs another forward pass."""

    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -torch.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``[B]``: see :func:`activation_loss`."""
        if seen.system is None:
            raise InputError("LargeActivations needs an observation with its system")
        return activation_loss(seen.system.model, seen.x)


@dataclass(frozen=True)
class ActivationSearch(Plan):
    """Adam on the activation norms, with halving at saturation; keeps the best checked result (Mopuri et al. 2018).

    Args:
        threat: the L-infinity ball of universal perturbations.
        steps: largest number of steps.
        lr: of Adam.
        prior: the background that the perturbation is added to.
        batch_size: images per step, with a prior.
        check_every: steps after which the fooling rate is measured.
        patience: this many checks without an improvement end the search.
    """

    threat: Universal
    steps: Count
    lr: Positive
    prior: Prior
    batch_size: Count
    check_every: Count
    patience: Count

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def aim(self) -> Objective:
        """The activation norms."""
        return LargeActivations()

    @property
    def summary(self) -> str:
        """Adam, and the prior."""
        return f"Adam, {'no' if self.prior == 'none' else self.prior} prior"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Always an error: the perturbation must be fitted first, by :meth:`fit`.

        Raises:
            InputError: always.
        """
        raise unfitted(self.threat)

    def fit(self, model: nn.Module, x: Tensor, seed: int) -> FixedPerturbation:
        """Compute the perturbation; ``x`` ``[N, C, H, W]`` is used for the fooling rate and the data prior."""
        threat, update = self.threat, Adam(self.lr)
        draws = generator(seed, "gd-uap")
        variable = (torch.rand((1, *x.shape[1:]), generator=draws, dtype=torch.float32) * 2 - 1).to(
            wide(x)
        ) * threat.eps
        backgrounds, memory = self._backgrounds(x, seed), update.begin(variable)
        clean, limit = _predictions(model, x, self.batch_size), variable.new_tensor(threat.eps)
        best, rate, first, lowest = variable, -1.0, torch.inf, torch.inf
        checked, unimproved, before = 0, 0, torch.tensor(0.0)
        for now in range(self.steps):
            leaf = variable.clone().requires_grad_()
            loss = activation_loss(model, threat.apply(next(backgrounds), leaf)).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            value = float(loss.detach())
            first, lowest = value if now == 0 else first, min(lowest, value)
            moved, memory = update(variable, gradient, now / self.steps, memory)
            variable = threat.project(x[:1], moved).detach()
            share = (variable.abs() == limit).double().mean()
            saturated = bool(share > 0.5) and float((share - before).abs()) < 1e-5
            before = share
            if now - checked == self.check_every or (saturated and now - checked > self.check_every // 2):
                checked = now
                found = self._rate(model, x, clean, variable)
                unimproved = 0 if found > rate else unimproved + 1
                best, rate = (variable, found) if found > rate else (best, rate)
                if unimproved == self.patience:
                    break
            if saturated:
                # At the corners of the box no pixel can move; at half the size, with the same pattern, they can again.
                variable, checked = variable / 2, now
        best = variable if self._rate(model, x, clean, variable) > rate else best
        return FixedPerturbation(threat, self.aim, self.summary, best, stalled=not lowest < first)

    def _backgrounds(self, x: Tensor, seed: int) -> Iterator[Tensor]:
        draws, order = generator(seed, "range"), mini_batches(len(x), self.batch_size, seed)
        while True:
            if self.prior == "none":
                yield torch.full_like(x[:1], 0.5)
            elif self.prior == "range":
                noise = torch.randn((self.batch_size, *x.shape[1:]), generator=draws, dtype=torch.float32)
                yield (0.5 + 0.22 * noise).clamp(0, 1).to(x)
            else:
                yield x[next(order)]

    def _rate(self, model: nn.Module, x: Tensor, clean: Tensor, variable: Tensor) -> float:
        return float((_predictions(model, self.threat.apply(x, variable), self.batch_size) != clean).double().mean())


@torch.no_grad()
def _predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([answer(model, part).argmax(1) for part in x.split(batch_size)])


@ATTACKS.register("gd-uap", paper="Mopuri et al. 2018 (GD-UAP)", needs=("gradients", "data"))
@dataclass(frozen=True)
class GDUAP(Attack):
    """Data-free universal perturbation: maximises the product of activation norms over all convolutions.

    The perturbation, on a grey image, maximises the activations of every layer within the L-infinity ball (Mopuri et
    al. 2018, "Generalizable data-free objective"). When more than half of its pixels are at the bound and their share
    changes by less than 1e-5, it is halved. The fooling rate is measured from time to time on the images given to
    :meth:`fitted` (the paper's substitute images; their labels are never used) and the best perturbation is kept. It
    has no target class.

    Departures: activations are the convolutions' outputs before batch norm and rectifier, found in any model (the code
    chooses VGG's after the rectifier and ResNet's at the ends of blocks, by hand); grey is 0.5 where the code has the
    data set's mean colour; the range prior is new Gaussian noise of mean 0.5 and deviation 0.22, clipped, at
    every step (the code crops and flips one noise image); no augmentation of the data prior; images with the
    perturbation on them are clipped to ``[0, 1]``.

    The attack is computed by :meth:`fitted`; the perturbation is ``fitted.applied.variable``, ``[1, C, H, W]``.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels (10/255).
        steps: largest number of steps (the code: 40000; it stops after some thousands).
        step_size: Adam's learning rate (the code: 0.1 of 255).
        prior: ``none``, ``range`` or ``data``: the background of the perturbation.
        batch_size: images per step with a prior (25).
        check_every: steps between two measurements of the fooling rate (400; at saturation half of it is enough).
        patience: this many measurements without an improvement end the search (10).
    """

    eps: Fraction = 10 / 255
    steps: Count = 10_000
    step_size: Positive = 0.1 / 255
    prior: Prior = "none"
    batch_size: Count = 25
    check_every: Count = 400
    patience: Count = 10

    needs_data: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Adam on the activation norms."""
        return self._search()

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Fitted:
        """The attack with its perturbation computed; ``x`` ``[N, C, H, W]`` is used to measure the fooling rate.

        Raises:
            InputError: bad tensors.
            UnsupportedModelError: a model without convolutions.
        """
        goal = fitting_goal(self, system, x, y, None)
        with torch.enable_grad():
            return Fitted(self, self._search().fit(system.model, goal.x, self.seed), seed=self.seed)

    def _search(self) -> ActivationSearch:
        ball, size = Universal(self.eps), self.step_size
        return ActivationSearch(ball, self.steps, size, self.prior, self.batch_size, self.check_every, self.patience)
