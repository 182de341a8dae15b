"""LIME and KernelSHAP: a linear model of the class score as patches of the image are switched off.

Both are implemented here instead of using captum, which evaluates one image at a time and draws from the global random
state. The regressions are solved in float64 on the CPU, which gives the same numbers on every device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...fields import Count, NonNegative, Positive
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class
from .removal import Fill, Score, all_perturbed_scores, score
from .segments import Segments, counts, padded, painted, switched

REDRAWS = 20
"""How often KernelSHAP draws its coalitions again before it gives up."""
SURE = 8
"""Coalitions a patch from which on they separate the patches, as far as chance goes."""


@INTERPRETERS.register("lime", paper="Ribeiro et al. 2016, section 3.4")
@dataclass(frozen=True, eq=False)
class LIME(Interpreter):
    """Coefficients of a ridge regression on patches switched on and off at random, weighted by similarity to the image.

    ``z`` switches each patch on with probability 1/2; the first ``z`` is the image itself. Weights are
    ``exp(-D^2 / width^2)`` with the cosine distance ``D`` of ``z`` from the whole image (section 3.3; the authors' code
    takes the square root of it). All patches stay in the regression; the paper keeps the K best. Not differentiable:
    the graphs of all passes would have to be kept.

    Args:
        samples: random coalitions evaluated for each image.
        segments: the patches.
        fill: what replaces a patch that is off.
        width: of the kernel, in cosine distance.
        ridge: weight of the penalty on squared coefficients.
        of: the score that is explained.
        batch_size: images a forward pass, at most (or the batch, if that is larger).
        seed: of the coalitions.
    """

    samples: Count = 1000
    segments: Segments = field(default_factory=Segments)
    fill: Fill = field(default_factory=Fill)
    width: Positive = 0.25
    ridge: NonNegative = 1.0
    of: Score = "probability"
    batch_size: Count = 256
    seed: int = 0

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, images = explained_class(logits, target), x.detach()
        patches = self.segments(images)
        streams = Streams.of(images, self.seed, "lime")
        drawn = [self._coalitions(n, g) for n, g in zip(counts(patches), streams.generators, strict=True)]
        stacked = padded(drawn, images)

        def keep(part: slice) -> Tensor:
            return switched(patches, stacked[:, part])

        fill = self.fill(images, self.seed)
        scores = all_perturbed_scores(self.model, images, fill, keep, self.samples, classes, self.of, self.batch_size)
        pairs = zip(drawn, scores.double().cpu(), strict=True)
        values = [ridge(z.double(), y, self._weights(z), self.ridge) for z, y in pairs]
        return Explanation(logits, painted(patches, values).to(x.dtype))

    def _coalitions(self, patches: int, source: torch.Generator) -> Tensor:
        z = torch.randint(2, (self.samples, patches), generator=source)
        z[0] = 1
        return z

    def _weights(self, z: Tensor) -> Tensor:
        distance = 1 - z.double().mean(1).sqrt()
        return torch.exp(-((distance / self.width) ** 2))


@INTERPRETERS.register("kernel-shap", paper="Lundberg and Lee 2017, theorem 2; Covert and Lee 2021")
@dataclass(frozen=True, eq=False)
class KernelSHAP(Interpreter):
    """Shapley values of patches by weighted regression; they sum to ``f(x) - f(all patches off)``, exactly.

    With few patches all coalitions are evaluated and the values are exact (theorem 2 of Lundberg and Lee); otherwise
    coalitions are drawn with probabilities in proportion to the Shapley kernel, each together with its complement
    (Covert and Lee 2021, section 4.1). A pixel gets the value of its whole patch. Not differentiable: the graphs of all
    passes would have to be kept.

    Args:
        samples: random coalitions evaluated for each image; all ``2^S - 2`` if there are no more.
        segments: the patches.
        fill: what replaces a patch that is off.
        of: the score that is distributed.
        batch_size: images a forward pass, at most (or the batch, if that is larger).
        seed: of the coalitions.

    Raises:
        InputError: an image has more patches than ``samples`` coalitions can separate.
    """

    samples: Count = 1000
    segments: Segments = field(default_factory=Segments)
    fill: Fill = field(default_factory=Fill)
    of: Score = "probability"
    batch_size: Count = 256
    seed: int = 0

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, images = explained_class(logits, target), x.detach()
        patches = self.segments(images)
        streams = Streams.of(images, self.seed, "kernel-shap")
        drawn = [self._coalitions(n, g) for n, g in zip(counts(patches), streams.generators, strict=True)]
        longest = max(len(z) for z, _ in drawn)
        # Row 0 switches every patch off; shorter lists of coalitions are padded with copies of it.
        stacked = padded([F.pad(z, (0, 0, 1, longest - len(z))) for z, _ in drawn], images)

        def keep(part: slice) -> Tensor:
            return switched(patches, stacked[:, part])

        fill = self.fill(images, self.seed)
        scores = all_perturbed_scores(self.model, images, fill, keep, longest + 1, classes, self.of, self.batch_size)
        whole = score(logits.detach(), classes, self.of).double().cpu()
        values = [
            shapley(z.double(), w, y[1 : len(z) + 1] - y[0], float(full - y[0]))
            for (z, w), y, full in zip(drawn, scores.double().cpu(), whole, strict=True)
        ]
        return Explanation(logits, painted(patches, values).to(x.dtype))

    def _coalitions(self, patches: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Coalitions ``[n, S]`` without the empty and the full one, and their weights ``[n]``."""
        if 2**patches - 2 <= self.samples:
            z = torch.tensor(list(itertools.product((0, 1), repeat=patches))[1:-1]).reshape(-1, patches)
            sizes = z.sum(1).tolist()
            return z, torch.tensor([kernel(patches, size) for size in sizes], dtype=torch.float64)
        if self.samples < 2 * patches:
            raise InputError(
                f"KernelSHAP cannot separate {patches} patches with samples={self.samples}; set {2 * patches} or "
                "more, or take fewer patches with Segments(number=...)"
            )
        return self._drawn(patches, source)

    def _drawn(self, patches: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pairs of a coalition and its complement, drawn again where they leave some patches inseparable."""
        for _ in range(REDRAWS):
            z = self._pairs(patches, source)
            # With many coalitions that does not happen.
            if len(z) >= SURE * patches or separates(z):
                return z, torch.ones(len(z), dtype=torch.float64)
        raise InputError(
            f"KernelSHAP drew {REDRAWS} times {self.samples} coalitions that do not separate all {patches} patches; "
            f"set samples to {SURE * patches} or more"
        )

    def _pairs(self, patches: int, source: torch.Generator) -> Tensor:
        pairs = math.ceil(self.samples / 2)
        sizes = torch.arange(1, patches, dtype=torch.float64)
        # The kernel times the number of coalitions of that size.
        probabilities = 1 / (sizes * (patches - sizes))
        size = torch.multinomial(probabilities, pairs, replacement=True, generator=source) + 1
        order = torch.rand(pairs, patches, generator=source, dtype=torch.float64).argsort(1).argsort(1)
        z = (order < size[:, None]).long()
        return torch.stack([z, 1 - z], 1).flatten(0, 1)[: self.samples]


def separates(z: Tensor) -> bool:
    """Whether the values of all patches follow from the scores of coalitions ``[n, S]`` and from their sum."""
    free = (z[:, :-1] - z[:, -1:]).double()
    return int(torch.linalg.matrix_rank(free)) == z.shape[1] - 1


def kernel(patches: int, size: int) -> float:
    """The Shapley kernel ``(S - 1) / (C(S, |z|) |z| (S - |z|))`` (Lundberg and Lee 2017, theorem 2)."""
    return (patches - 1) / (math.comb(patches, size) * size * (patches - size))


def ridge(z: Tensor, y: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """``argmin_w sum_i weights_i (y_i - a - w z_i)^2 + penalty |w|^2`` with a free intercept ``a``: ``[S]``."""
    share = weights / weights.sum()
    z, y = z - share @ z, y - share @ y
    gram = (z * weights[:, None]).T @ z + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    return _least_squares(gram, z.T @ (weights * y))


def shapley(z: Tensor, weights: Tensor, y: Tensor, total: float) -> Tensor:
    """``argmin_phi sum_i weights_i (y_i - phi z_i)^2`` under ``sum(phi) = total``: ``[S]``.

    The last value is eliminated, so that the sum is exact however few coalitions there are.
    """
    if z.shape[1] == 1:
        return z.new_full((1,), total)
    last = z[:, -1]
    root = weights.sqrt()
    left, right = (z[:, :-1] - last[:, None]) * root[:, None], (y - last * total) * root
    free = _least_squares(left, right)
    return torch.cat([free, total - free.sum(0, keepdim=True)])


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    # This driver gives the minimum-norm solution for a rank-deficient matrix, as of an image with one patch.
    solution: Tensor = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return solution
