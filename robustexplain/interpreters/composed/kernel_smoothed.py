"""The mean of an interpreter's maps over noisy copies of the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...fields import Positive
from ...registry import INTERPRETERS
from ..base import Explanation, requiring_grad
from ..gradients.baselines import Units, deviation
from ..gradients.integrated import by_rows, predicted, total
from ..gradients.smoothgrad import DRAWS, Noise
from .noisy_copies import OverCopies, copy_maps


@INTERPRETERS.register("kernel-smoothed", paper="Yeh et al. 2019 (smoothed explanations)")
@dataclass(frozen=True, eq=False)
class KernelSmoothed(OverCopies):
    """``int phi(f, z) k(x, z) dz``: the mean of ``base``'s maps of noisy copies, each for the class explained of ``x``.

    SmoothGrad is this of the gradient; here any interpreter is smoothed, and what is averaged is its map: of a gradient
    whose channels are reduced by magnitude, the mean of magnitudes. The noise is fixed by ``seed`` and the same for
    every sample, and copies may leave ``[0, 1]``, as with :class:`SmoothGrad`. Costs ``samples`` maps of ``base`` and
    one forward pass for the logits.

    Args:
        base: the interpreter to smooth; it must explain ``model``.
        width: of the kernel: the standard deviation of the noise, half its width if it is uniform; in ``units``.
        samples: copies.
        noise: the kernel.
        seed: of the noise.
        batch_size: largest number of copies in one pass.
        units: of ``width``, as in :class:`SmoothGrad`.
    """

    width: Positive = 0.1
    noise: Noise = "gaussian"
    units: Units = "input"

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)

        def mean(rows: Tensor, classes: Tensor) -> Tensor:
            scale = self.width * deviation(self.units, self.model, rows.detach())
            found = copy_maps(self, rows, classes, graph, scale, DRAWS[self.noise])
            return total(maps.sum(0) for maps in found) / self.samples

        return Explanation(logits, by_rows(x, classes, self.batch_size, mean))
