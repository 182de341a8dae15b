"""How an interpreter's maps change with randomised weights, shuffled labels or a shifted input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..autograd.input_shift import compensated
from ..errors import UnsupportedModelError
from ..interpreters import Interpreter, MeTFA
from ..interpreters.composed.base import walk
from ..metrics import HOG, SSIM, MapMetric, Spearman
from ..models.randomise import LayerGroup, randomise

Check = Literal["cascading", "independent", "labels", "shift"]
CHECKS: tuple[Check, ...] = get_args(Check)


def measures(side: int) -> dict[str, MapMetric]:
    """The similarities of Adebayo et al. 2018, section 4, for maps of that side.

    HOG cells are 16 pixels on 224, as in their code, and in proportion on smaller maps.
    """
    return {
        "rank correlation of magnitudes": Spearman(magnitude=True),
        "rank correlation": Spearman(),
        "SSIM": SSIM(),
        "HOG": HOG(cell=max(2, round(side / 14))),
    }


@dataclass(frozen=True)
class Outcome:
    """How much maps resemble the original ones at one stage of one check.

    Args:
        check: which.
        stage: 0 is untouched; the further, the more (or the lower) layers are random.
        layer: the layer of that stage.
        similarities: by measure, ``[B]``; NaN where a measure is undefined, such as on a constant map.
        maps: ``[B, H, W]``.
    """

    check: Check
    stage: int
    layer: str
    similarities: dict[str, Tensor]
    maps: Tensor


def compare(check: Check, stage: int, layer: str, found: Tensor, original: Tensor) -> Outcome:
    """An outcome from maps and the original ones, both ``[B, H, W]``."""
    found, original = found.detach().float().cpu(), original.detach().float().cpu()
    known = measures(min(original.shape[-2:]))
    # A randomised network can overflow: NaN counts as no similarity, not as a zero map.
    finite = torch.isfinite(found).flatten(1).all(1)
    safe = torch.where(finite[:, None, None], found, 0)
    similarities = {name: torch.where(finite, metric(safe, original), torch.nan) for name, metric in known.items()}
    return Outcome(check, stage, layer, similarities, safe)


def explained(interpreter: Interpreter, x: Tensor, target: Tensor, batch: int = 32) -> Tensor:
    """Maps ``[B, H, W]`` of ``target``, in batches; values of ``x`` are not checked: a shift leaves [0, 1]."""
    with torch.no_grad():
        parts = zip(x.split(batch), target.split(batch), strict=True)
        return torch.cat([interpreter.explain(a, b).maps for a, b in parts])


def cascading(
    interpreter: Interpreter, x: Tensor, target: Tensor, layers: Sequence[LayerGroup], seed: int = 0
) -> Iterator[Outcome]:
    """Randomise the model from the logits down, stage by stage (Adebayo et al. 2018, section 3.1).

    Args:
        interpreter: it and its model stay as they are.
        x: ``[B, C, H, W]``.
        target: ``[B]``, the explained classes; the same at every stage.
        layers: from the logits down (:func:`robustexplain.sanity.stages`).
        seed: of the random weights.
    """
    original = explained(interpreter, x, target)
    yield compare("cascading", 0, "", original, original)
    copied = copy.deepcopy(interpreter)
    for i, stage in enumerate(layers, 1):
        randomise(copied.model, stage, x, seed)
        yield compare("cascading", i, stage.name, explained(copied, x, target), original)


def independent(
    interpreter: Interpreter, x: Tensor, target: Tensor, layers: Sequence[LayerGroup], seed: int = 0
) -> Iterator[Outcome]:
    """Randomise one stage and leave all others as they are (Adebayo et al. 2018, section 3.2)."""
    original = explained(interpreter, x, target)
    yield compare("independent", 0, "", original, original)
    for i, stage in enumerate(layers, 1):
        copied = copy.deepcopy(interpreter)
        randomise(copied.model, stage, x, seed)
        yield compare("independent", i, stage.name, explained(copied, x, target), original)


def other_labels(interpreter: Interpreter, other: Interpreter, x: Tensor, target: Tensor) -> Outcome:
    """Against the same method on a model trained on random labels (Adebayo et al. 2018, section 3.3)."""
    original = explained(interpreter, x, target)
    return compare("labels", 1, "random labels", explained(other, x, target), original)


def shifted(interpreter: Interpreter, x: Tensor, target: Tensor, shift: float) -> Outcome:
    """Against the same method on a model that computes the same from shifted images (Kindermans et al. 2019).

    Raises:
        UnsupportedModelError: if the model's first layer cannot take the shift back, or the method clips the images
            that it makes to ``[0, 1]``, where shifted ones are not.
    """
    clipping = [type(part).__name__ for part in walk(interpreter) if isinstance(part, MeTFA)]
    if clipping:
        raise UnsupportedModelError(f"{clipping[0]} clips its copies to [0, 1], and a shifted image lies outside")
    original = explained(interpreter, x, target)
    copied = rebound(interpreter, lambda model: compensated(model, x, shift))
    return compare("shift", 1, f"x + {shift:g}", explained(copied, x + shift, target), original)


def rebound(interpreter: Interpreter, change: Callable[[nn.Module], nn.Module]) -> Interpreter:
    """A copy of an interpreter, its parts included, that explains ``change(model)``."""
    memo = {id(interpreter.model): change(interpreter.model)}
    return copy.deepcopy(interpreter, memo)
