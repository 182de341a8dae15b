"""Removing pixels and evaluating the classifier, for the methods that explain by perturbation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...door import answer
from ...fields import Fraction, NonNegative, Positive, check_fields
from ...maps import clipped
from ...random_streams import Streams
from ...registry import PARTS
from ..base import pick, wide_dtype
from ..masks.rts import gaussian_blur

Score = Literal["probability", "logit", "log_probability"]


def score(logits: Tensor, classes: Tensor, of: Score) -> Tensor:
    """The score of class ``classes[i]`` in row ``i``: ``[n, K]`` and ``[n]`` to ``[n]``, in float32 or wider."""
    wide = logits.to(wide_dtype(logits))
    if of == "logit":
        return pick(wide, classes)
    log_p = pick(wide.log_softmax(1), classes)
    return log_p if of == "log_probability" else log_p.exp()


@PARTS.register("fill")
@dataclass(frozen=True)
class Fill:
    """What replaces removed pixels: one colour, a Gaussian blur of the image, or noise drawn for each image.

    Args:
        how: ``constant``, ``blur`` or ``noise``.
        value: the colour, in every channel; the mean of the noise.
        blur: standard deviation of the blur, as a share of the image's shorter side (Fong and Vedaldi 2017: 10 pixels
            of 224, 0.045; small images need a larger share, or hardly anything is removed).
        noise: standard deviation of the noise, which is cut off at 0 and 1. It is drawn from a stream seeded by the
            image, so the fill is no smooth function of the image.
    """

    how: Literal["constant", "blur", "noise"] = "constant"
    value: Fraction = 0.5
    blur: Positive = 0.1
    noise: NonNegative = 0.2

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """The replacement ``[B, C, H, W]`` of every pixel of ``x``."""
        if self.how == "constant":
            return torch.full_like(x, self.value)
        if self.how == "blur":
            return gaussian_blur(x, x.new_full(x.shape[:1], self.blur * min(x.shape[-2:])))
        noise = Streams.of(x, seed, "fill").normal(x)
        return clipped(self.value + self.noise * noise)


def chunks(number: int, batch: int, limit: int) -> Iterator[slice]:
    """Slices of ``range(number)``, as large as possible with ``batch`` images times a slice at most ``limit``."""
    size = max(1, limit // batch)
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


@torch.no_grad()
def perturbed_scores(model: nn.Module, x: Tensor, fill: Tensor, keep: Tensor, classes: Tensor, of: Score) -> Tensor:
    """Scores ``[B, n]`` of the images with the pixels removed where ``keep`` is 0; one forward pass.

    Args:
        model: the classifier.
        x: ``[B, C, H, W]``.
        fill: what replaces a removed pixel, of the shape of ``x``.
        keep: ``[n, H, W]`` for all images, or ``[B, n, H, W]``, in ``[0, 1]``.
        classes: ``[B]``.
        of: the score.
    """
    keep = (keep if keep.dim() == 4 else keep[None])[:, :, None].to(x.dtype)
    # This form is exact where keep is 0 or 1; that of lerp is not.
    perturbed = x[:, None] * keep + fill[:, None] * (1 - keep)
    number = perturbed.shape[1]
    return score(answer(model, perturbed.flatten(0, 1)), classes.repeat_interleave(number), of).reshape(-1, number)


def all_perturbed_scores(
    model: nn.Module,
    x: Tensor,
    fill: Tensor,
    keep: Callable[[slice], Tensor],
    number: int,
    classes: Tensor,
    of: Score,
    limit: int,
) -> Tensor:
    """Scores ``[B, number]`` like :func:`perturbed_scores`, with masks computed when needed: ``keep(slice)``."""
    parts = chunks(number, len(x), limit)
    return torch.cat([perturbed_scores(model, x, fill, keep(part), classes, of) for part in parts], 1)
