"""Interpreters that integrate the gradient along paths from baselines to the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...door import answer
from ...errors import InputError
from ...fields import Count, Natural, check_fields
from ...maps import expand
from ...random_streams import generator
from ...registry import INTERPRETERS
from ...training import Samples, Session
from ..base import Channels, Explanation, Interpreter, explained_class, reduce_channels, requiring_grad
from ..reference import Reference
from .baselines import Baseline, baseline_like, checked_baseline
from .gradient import Of, class_gradient

Place = Callable[[Tensor, slice], Tensor]
"""``place(rows, points)``: some points of each row, ``[b, ...]`` to ``[k, b, ...]``."""


@INTERPRETERS.register("integrated-gradients", paper="Sundararajan et al. 2017, eq. 1 and 3")
@dataclass(frozen=True, eq=False)
class IntegratedGradients(Interpreter):
    """Integrated gradients: ``m = (x - x') * mean of d f_c / d x`` on the line from ``x'`` (Sundararajan et al. eq. 1).

    Complete: a map under ``channels="sum"`` adds up to ``f_c(x) - f_c(x')``, up to the error of
    the quadrature. Costs ``steps`` forward and backward passes and one more forward pass for the logits. The explained
    class is the prediction on ``x`` at every point of the path.

    Args:
        steps: points on the path.
        rule: their positions and weights: ``gauss-legendre``, ``midpoint``, or ``right`` (eq. 3: ``k / m`` for
            ``k = 1..m``).
        baseline: ``x'``: one number for every channel or column, in ``[0, 1]`` (0 is black); ``mean``, what the model's
            own normalisation maps to zero (the mean colour or row of its training data: "0" in papers that standardise
            first); or a number for each channel or column, in the data's own units. For tables whose columns are far
            from 0 use one of the last two: a row of zeros is far from the data.
        of: what is integrated: ``logit``, ``probability`` (Ghorbani et al., Dombrowski et al.) or ``log_probability``.
        channels: how the channels' attributions become one map.
        batch_size: largest number of points in one pass of the model; memory grows with it, results do not change.
    """

    steps: Count = 50
    rule: Literal["gauss-legendre", "midpoint", "right"] = "gauss-legendre"
    baseline: Baseline = 0.0
    of: Of = "logit"
    channels: Channels = "sum"
    batch_size: Count = 64

    is_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "baseline", checked_baseline(self, self.baseline))

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)
        alphas, weights = (value.to(x) for value in quadrature(self.rule, self.steps))
        alphas = expand(alphas, x[None])
        start = baseline_like(self.baseline, self.model, x.detach())

        def place(rows: Tensor, points: slice) -> Tensor:
            # One operation instead of three: on a small network each operation on a whole batch is measurable.
            return torch.addcmul(start, alphas[points], rows - start)

        def integral(rows: Tensor, classes: Tensor) -> Tensor:
            gradients = point_gradients(self.model, rows, classes, place, self.steps, self.batch_size, self.of, graph)
            return total(torch.tensordot(weights[points], gradient, 1) for points, gradient in gradients)

        attributions = (x - start) * by_rows(x, classes, self.batch_size, integral)
        return Explanation(logits, reduce_channels(attributions, self.channels))


@dataclass(frozen=True, eq=False)
class ExpectedGradients(Interpreter):
    """Expected gradients: integrated gradients averaged over a background of images or rows (Erion et al. 2021, eq. 3).

    ``m = E[(x - x') * d f_c(x' + a (x - x')) / d x]`` over ``x'`` of the background and ``a`` in ``[0, 1]``. The draws
    are fixed by ``seed`` and shared by all samples, so that a map is a function of its input alone. Departure: ``a`` is
    stratified, and the images of the background are used in turn, in random order (with weights, the draws are
    stratified by weight). This does not change the expectation and lowers the variance.

    Args:
        background: the images or rows ``x'``, of the size of the inputs, perhaps with weights.
        samples: draws; the number of forward and backward passes, besides one forward pass for the logits.
        of: what is differentiated.
        channels: how the channels' attributions become one map.
        seed: of the draws.
        batch_size: largest number of points in one pass of the model.
    """

    background: Reference = field()
    samples: Count = 50
    of: Of = "logit"
    channels: Channels = "sum"
    seed: Natural = 0
    batch_size: Count = 64

    is_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.background, Reference):
            raise InputError(f"background must be a Reference of images or rows, got {type(self.background).__name__}")

    def draws(self) -> tuple[Tensor, Tensor]:
        """The index of a background image and the ``a`` of each draw: int64 and float32, ``[samples]``."""
        rng = generator(self.seed, "expected-gradients")
        if self.background.weights is not None:
            cuts = self.background.shares().cumsum(0)
            chosen = torch.searchsorted(cuts, stratified(self.samples, rng).double()).clamp(max=len(cuts) - 1)
            return chosen, stratified(self.samples, rng)
        size = len(self.background.x)
        rounds = [torch.randperm(size, generator=rng) for _ in range(-(-self.samples // size))]
        return torch.cat(rounds)[: self.samples], stratified(self.samples, rng)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)
        background = self.background.like(x)
        images, shares = self.draws()
        images, alphas = images.to(x.device), expand(shares.to(x), x[None])

        def place(rows: Tensor, points: slice) -> Tensor:
            start = background[images[points], None]
            return start + alphas[points] * (rows - start)

        def expectation(rows: Tensor, classes: Tensor) -> Tensor:
            gradients = point_gradients(self.model, rows, classes, place, self.samples, self.batch_size, self.of, graph)
            terms = (((rows - background[images[points], None]) * gradient).sum(0) for points, gradient in gradients)
            return total(terms) / self.samples

        return Explanation(logits, reduce_channels(by_rows(x, classes, self.batch_size, expectation), self.channels))


@dataclass(frozen=True)
class ExpectedGradientsTraining:
    """The settings of expected gradients in a recipe; the background is drawn from the training data.

    Args:
        images: how many images or rows the background holds; all of them if there are fewer.
        samples: draws for each explanation.
        of: what is differentiated.
        channels: how the channels' attributions become one map.
        batch_size: largest number of points in one pass of the model.
    """

    images: Count = 64
    samples: Count = 50
    of: Of = "logit"
    channels: Channels = "sum"
    batch_size: Count = 64

    def __post_init__(self) -> None:
        check_fields(self)


def draw_background(
    model: nn.Module,
    data: Samples,
    settings: ExpectedGradientsTraining | None = None,
    *,
    seed: int = 0,
    session: Session | None = None,
    identity: object = None,
) -> ExpectedGradients:
    """Expected gradients with a background drawn from ``data``; nothing is fitted.

    Args:
        model: the classifier.
        data: map-style, gives ``(x, label)``.
        settings: size of the background, draws.
        seed: of the background and of the draws.
        session: not used; the signature is that of every trained interpreter.
        identity: not used.
    """
    settings, size = settings or ExpectedGradientsTraining(), len(data)
    if size == 0:
        raise InputError("there is no background to draw from: the data set is empty")
    chosen = torch.randperm(size, generator=generator(seed, "background"))[: settings.images].sort().values
    images = torch.stack([torch.as_tensor(data[i][0]) for i in chosen.tolist()])
    return ExpectedGradients(model, Reference(images), settings.samples, settings.of, settings.channels, seed,
                             settings.batch_size)  # fmt: skip


INTERPRETERS.register(
    "expected-gradients",
    paper="Erion et al. 2021, eq. 3",
    needs=("background",),
    settings=ExpectedGradientsTraining,
    train=draw_background,
)(ExpectedGradients)


def stratified(count: int, rng: torch.Generator) -> Tensor:
    """``count`` draws of ``[0, 1]``, one from each of as many equal parts, in a random order: float32 ``[count]``."""
    strata = torch.randperm(count, generator=rng)
    return (strata + torch.rand(count, generator=rng, dtype=torch.float32)) / count


def quadrature(rule: str, count: int) -> tuple[Tensor, Tensor]:
    """Nodes in ``[0, 1]`` and their weights, which add up to one: float64 ``[count]`` each."""
    if rule == "gauss-legendre":
        nodes, weights = _gauss_legendre(count)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    shift = 0.5 if rule == "midpoint" else 1.0
    alphas = (torch.arange(count, dtype=torch.float64) + shift) / count
    return alphas, torch.full((count,), 1 / count, dtype=torch.float64)


@lru_cache(maxsize=64)
def _gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    # Cached: solving its eigenvalue problem costs a few percent of a map of a small network.
    return np.polynomial.legendre.leggauss(count)


def predicted(model: nn.Module, x: Tensor, target: Tensor | None, graph: bool) -> tuple[Tensor, Tensor]:
    """Logits of ``x`` and the classes to explain; autograd records the pass only if ``graph``."""
    with torch.set_grad_enabled(graph):
        logits = answer(model, x)
    return logits, explained_class(logits, target)


def by_rows(x: Tensor, classes: Tensor, batch_size: int, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``work`` on at most ``batch_size`` samples at a time, its results concatenated."""
    parts = zip(x.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([work(rows, targets) for rows, targets in parts])


def point_gradients(
    model: nn.Module, rows: Tensor, classes: Tensor, place: Place, count: int, batch_size: int, of: Of, graph: bool
) -> Iterator[tuple[slice, Tensor]]:
    """The class gradient at ``count`` points of each row, with at most ``batch_size`` samples in a pass if possible.

    Without ``graph``, the graph of a pass is freed before the next one.

    Args:
        model: the classifier.
        rows: ``[b, C, H, W]`` or ``[b, D]``.
        classes: ``[b]``, differentiated at every point.
        place: computes the points.
        count: the number of points.
        batch_size: samples in a pass.
        of: what is differentiated.
        graph: whether the gradients are differentiated again.

    Yields:
        A slice of the points, and their gradients ``[k, b, ...]``.
    """
    at_once = max(1, batch_size // len(rows))
    for start in range(0, count, at_once):
        span = slice(start, min(start + at_once, count))
        points = place(rows, span).flatten(0, 1)
        points = points if graph else points.detach().requires_grad_()
        targets = classes.repeat(span.stop - span.start)
        gradient = class_gradient(answer(model, points), targets, points, of, graph)
        yield span, gradient.unflatten(0, (-1, len(rows)))


def total(terms: Iterator[Tensor]) -> Tensor:
    """The sum, without a list of the terms."""
    result = next(terms)
    for term in terms:
        result = result + term
    return result
