"""LIME and KernelSHAP: a linear model of what the classifier says when patches are switched off.

Both are written here and not taken from captum, which asks for one image at a time and draws from the global random
state. The regressions are solved in float64 on the CPU: the same numbers on every device.
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
from ...errors import InputError
from ...fields import Count, NonNegative, Positive
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class
from .removal import Fill, Score, ask_all, score
from .segments import Segments, counts, padded, painted, switched


@INTERPRETERS.register("lime", paper="Ribeiro et al. 2016, section 3.4")
@dataclass(frozen=True, eq=False)
class LIME(Interpreter):
    """Weights of a ridge regression on patches switched on and off at random, nearby images counting more.

    ``z`` switches each patch on with chance 1/2; the first ``z`` is the image itself. Weights are
    ``exp(-D^2 / width^2)`` with the cosine distance ``D`` of ``z`` from the whole image (section 3.3; the authors' code
    takes the square root of it). All patches stay in the regression, where the paper keeps the K best. Not
    differentiable: the graphs of all those passes would have to be kept.

    Args:
        samples: coalitions asked for, each sample's own.
        segments: the patches.
        fill: what stands in for a patch that is off.
        width: of the kernel, in cosine distance.
        ridge: of the regression's penalty on squared weights.
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
        logits = self.model(x)
        classes, given = explained_class(logits, target), x.detach()
        patches = self.segments(given)
        streams = Streams.of(given, self.seed, "lime")
        drawn = [self._coalitions(n, g) for n, g in zip(counts(patches), streams.generators, strict=True)]
        together = padded(drawn, given)

        def keep(part: slice) -> Tensor:
            return switched(patches, together[:, part])

        fill = self.fill(given, self.seed)
        found = ask_all(self.model, given, fill, keep, self.samples, classes, self.of, self.batch_size).double().cpu()
        values = [ridge(z.double(), y, self._weights(z), self.ridge) for z, y in zip(drawn, found, strict=True)]
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

    If there are few patches every coalition is asked and the values are exact (theorem 2 of Lundberg and Lee); else
    coalitions are drawn with chances in proportion to the Shapley kernel, each together with its complement (Covert and
    Lee 2021, section 4.1). A pixel shows the value of its whole patch. Not differentiable: the graphs of all those
    passes would have to be kept.

    Args:
        samples: coalitions asked for, each sample's own; all ``2^S - 2`` where that is no more.
        segments: the patches.
        fill: what stands in for a patch that is off.
        of: the score that is shared out.
        batch_size: images a forward pass, at most (or the batch, if that is larger).
        seed: of the coalitions.

    Raises:
        InputError: when an image has more patches than ``samples`` can tell apart.
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
        logits = self.model(x)
        classes, given = explained_class(logits, target), x.detach()
        patches = self.segments(given)
        streams = Streams.of(given, self.seed, "kernel-shap")
        drawn = [self._coalitions(n, g) for n, g in zip(counts(patches), streams.generators, strict=True)]
        longest = max(len(z) for z, _ in drawn)
        # Row 0 switches everything off; the lists of images with few patches are filled up with copies of it.
        together = padded([F.pad(z, (0, 0, 1, longest - len(z))) for z, _ in drawn], given)

        def keep(part: slice) -> Tensor:
            return switched(patches, together[:, part])

        fill = self.fill(given, self.seed)
        found = ask_all(self.model, given, fill, keep, longest + 1, classes, self.of, self.batch_size).double().cpu()
        whole = score(logits.detach(), classes, self.of).double().cpu()
        values = [
            shapley(z.double(), w, y[1 : len(z) + 1] - y[0], float(full - y[0]))
            for (z, w), y, full in zip(drawn, found, whole, strict=True)
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
                f"KernelSHAP cannot tell {patches} patches apart by samples={self.samples}; ask for {2 * patches} or "
                "more, or take fewer patches with Segments(number=...)"
            )
        return self._drawn(patches, source)

    def _drawn(self, patches: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        pairs = math.ceil(self.samples / 2)
        sizes = torch.arange(1, patches, dtype=torch.float64)
        # The kernel times the number of coalitions of that size.
        chances = 1 / (sizes * (patches - sizes))
        size = torch.multinomial(chances, pairs, replacement=True, generator=source) + 1
        order = torch.rand(pairs, patches, generator=source, dtype=torch.float64).argsort(1).argsort(1)
        z = (order < size[:, None]).long()
        z = torch.stack([z, 1 - z], 1).flatten(0, 1)[: self.samples]
        return z, torch.ones(len(z), dtype=torch.float64)


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
    # The driver that finds the shortest solution where a column is missing, as in an image with one patch.
    found: Tensor = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return found
