"""LIME and RISE with a gradient to the weights, so that a model can be fine-tuned against them (Hegde et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain.checks import Kind
from robustexplain.door import answer
from robustexplain.interpreters import LIME, RISE, Explanation, Interpreter
from robustexplain.interpreters.base import explained_class
from robustexplain.interpreters.perturbation.removal import Score, score
from robustexplain.interpreters.perturbation.segments import counts, padded, painted, switched
from robustexplain.random_streams import Streams


def with_gradient(interpreter: Interpreter, draws: int) -> Interpreter:
    """LIME or RISE as a map with a gradient to the weights, from ``draws`` perturbed copies; others as they are."""
    if isinstance(interpreter, LIME):
        return DifferentiableLIME(interpreter.model, replace(interpreter, samples=min(draws, interpreter.samples)))
    if isinstance(interpreter, RISE):
        return DifferentiableRISE(interpreter.model, replace(interpreter, samples=min(draws, interpreter.samples)))
    return interpreter


@dataclass(frozen=True, eq=False)
class DifferentiableLIME(Interpreter):
    """The coefficients of LIME's regression, which are linear in the scores of the perturbed images.

    Args:
        method: gives patches, coalitions, weights.
    """

    method: LIME

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, method = answer(self.model, x), self.method
        classes, images = explained_class(logits, target), x.detach()
        patches = method.segments(images)
        streams = Streams.of(images, method.seed, "lime")
        drawn = [method._coalitions(n, g) for n, g in zip(counts(patches), streams.generators, strict=True)]
        keep = switched(patches, padded(drawn, images))
        scores = self._scores(images, keep, classes)
        values = [self._solver(z).to(y) @ y for z, y in zip(drawn, scores, strict=True)]
        return Explanation(logits, painted(patches, values).to(x.dtype))

    def _scores(self, x: Tensor, keep: Tensor, classes: Tensor) -> Tensor:
        return graphed_scores(self, x, self.method.fill(x, self.method.seed), keep, classes, self.method.of)

    def _solver(self, z: Tensor) -> Tensor:
        """``[S, n]``: from scores to the coefficients of the ridge regression with a free intercept."""
        weights = self.method._weights(z)
        z = z.double() - (weights / weights.sum()) @ z.double()
        gram = (z * weights[:, None]).T @ z + self.method.ridge * torch.eye(z.shape[1], dtype=z.dtype)
        solver: Tensor = torch.linalg.lstsq(gram, (z * weights[:, None]).T, driver="gelsd").solution
        return solver


@dataclass(frozen=True, eq=False)
class DifferentiableRISE(Interpreter):
    """RISE's sum of masks by the scores of the masked images less their mean, with masks drawn anew for every batch.

    The mean adds a constant to the map and, with few masks, most of its noise. With the masks of the seed alone, a
    model would learn those masks, and tell the truth to an auditor with others.

    Args:
        method: gives the masks.
    """

    method: RISE

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, images = answer(self.model, x), x.detach()
        classes = explained_class(logits, target)
        seed = int(Streams.of(images[:1], self.method.seed, "rise in training").integers(1 << 31))
        method = replace(self.method, seed=seed)
        masks = method._enlarged(*method._draws(), images).to(x.dtype)
        keep = masks[None].expand(len(x), -1, -1, -1)
        scores = graphed_scores(self, images, method.fill(images, seed), keep, classes, method.of)
        centred = (scores - scores.mean(1, keepdim=True)).to(x.dtype)
        maps = torch.einsum("bn,nhw->bhw", centred, masks) / (method.keep * method.samples)
        return Explanation(logits, maps)


def graphed_scores(
    interpreter: Interpreter, x: Tensor, fill: Tensor, keep: Tensor, classes: Tensor, of: Score
) -> Tensor:
    """Scores ``[B, n]`` of images perturbed by ``keep`` ``[B, n, H, W]``, in one pass that autograd can follow."""
    shares = keep[:, :, None].to(x.dtype)
    perturbed = x[:, None] * shares + fill[:, None] * (1 - shares)
    number = perturbed.shape[1]
    found = score(answer(interpreter.model, perturbed.flatten(0, 1)), classes.repeat_interleave(number), of)
    return found.reshape(-1, number)
