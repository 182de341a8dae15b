"""Attribute-steered detection: a known broken control, kept to calibrate adaptive attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.autograd.hooks import hooks
from robustexplain.autograd.layers import captured, pyramid, submodule
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Fraction, Positive
from robustexplain.hidden import refuse_hidden
from robustexplain.interpreters.base import pick
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session

from .base import Detector, DetectorDefense
from .learned import images_only, refuse_misfit

PAPER = "Tao et al. 2018 (AmI) and code; broken by Carlini 2019"


@DETECTORS.register("attribute-steered", paper=PAPER)
@dataclass(frozen=True, eq=False)
class AttributeSteeredDetector(Detector):
    """One minus the predicted class's probability in a network that relies on that class's witnesses more.

    Of the maps of a layer, with ``m`` a map's mean, ``mu``, ``sigma`` and ``least`` those of the witnesses' means:
    a witness's map is multiplied by ``1 + strength - exp(-(m - least) / (beta sigma))``, any other one with ``m > mu``
    by ``exp(-(m - mu) / (alpha sigma))``.

    Args:
        model: the deployed classifier.
        layers: names of layers with feature maps.
        witnesses: ``[K, C]`` 0 or 1 for each layer: the maps that a class relies on.
        alpha: how slowly others are weakened.
        beta: how slowly witnesses are strengthened.
        strength: of the witnesses.
    """

    model: nn.Module
    layers: tuple[str, ...]
    witnesses: tuple[Tensor, ...]
    alpha: Positive = 100.0
    beta: Positive = 60.0
    strength: Positive = 1.15

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]`` in ``[0, 1]``."""
        return self.soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same."""
        refuse_hidden(self.model, "the outputs of layers are changed")
        classes = answer(self.model, x).argmax(1)
        found = {submodule(self.model, name): which for name, which in zip(self.layers, self.witnesses, strict=True)}

        def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * self._factors(output.mean((2, 3)), found[module].to(output)[classes])[:, :, None, None]

        with hooks(list(found), steer):
            steered = answer(self.model, x)
        return 1 - pick(steered.softmax(1), classes)

    def _factors(self, means: Tensor, witness: Tensor) -> Tensor:
        """``[B, C]``, from the maps' means and which are witnesses, both ``[B, C]``."""
        count = witness.sum(1, keepdim=True)
        mu = (means * witness).sum(1, keepdim=True) / count
        sigma = (((means - mu).square() * witness).sum(1, keepdim=True) / count + 1e-12).sqrt()
        least = means.where(witness > 0, torch.inf).amin(1, keepdim=True)
        more = 1 + self.strength - (-(means - least) / (self.beta * sigma)).exp()
        less = torch.where(means > mu, (-(means - mu) / (self.alpha * sigma)).exp(), 1)
        return torch.where(witness > 0, more, less)


@DEFENSES.register("attribute-steered", paper=PAPER, needs=("data",))
@dataclass(frozen=True)
class AttributeSteered(DetectorDefense):
    """Add a detector that compares the network's answer with that of one steered to its class's own feature maps.

    A control: it is known to be broken, and a matrix in which its adaptive column is good has a weak attacker. The
    authors find the maps of a face's attributes from annotated pictures; here a class's witnesses are the maps with the
    largest mean gradient times activation for its logit on training inputs of that label. The alarm of the paper is a
    change of the prediction; here the lost probability is a score.

    Args:
        share: of a layer's maps that are witnesses of a class.
        layers: names of layers with feature maps; none: the last at each grid size.

    Raises:
        FieldError: a share of 0.
    """

    share: Fraction = 0.25
    layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.share:
            raise FieldError(type(self).__name__, "share", f"must be above 0, got {self.share!r}")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        layers = tuple(self.layers) or tuple(layer.name for layer in pyramid(system.model, x[:1]))
        parts = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        found = [_attributions(system.model, layers, *part) for part in parts]
        with torch.no_grad():
            classes = answer(system.model, x[:1]).shape[1]
        member = F.one_hot(y, classes).to(x)
        totals = (member.mT @ torch.cat(part) for part in zip(*found, strict=True))
        return AttributeSteeredDetector(system.model, layers, tuple(map(self._chosen, totals)))

    def _chosen(self, total: Tensor) -> Tensor:
        count = max(round(self.share * total.shape[1]), 1)
        return torch.zeros_like(total).scatter(1, total.topk(count, 1).indices, 1.0)


def _attributions(model: nn.Module, layers: tuple[str, ...], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """``[B, C]`` for each layer: the sum over positions of gradient times activation, for the logits of ``y``."""
    with torch.enable_grad(), captured(model, layers) as outputs:
        logits = answer(model, x.detach().requires_grad_())
        maps = [outputs[name] for name in layers]
    gradients = torch.autograd.grad(pick(logits, y).sum(), maps)
    return tuple((g * a).sum((2, 3)).detach() for g, a in zip(gradients, maps, strict=True))
