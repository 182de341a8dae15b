"""How visible a perturbation is: norms, structural similarity, a learned distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import MissingDataError
from ..registry import METRICS
from .base import Better, Visibility, in_pieces
from .structure import ssim


@METRICS.register("perturbation", paper="Carlini and Wagner 2017")
@dataclass(frozen=True)
class Perturbation(Visibility):
    """Norm of the perturbation over pixels and channels; 0 is unchanged.

    Args:
        p: 0 counts the pixels in which any channel changed, 1 and 2 are sums, ``inf`` is the largest change.
    """

    p: Literal[0, 1, 2, "inf"] = "inf"

    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True

    def _measure(self, x: Tensor, attacked: Tensor) -> Tensor:
        change = attacked - x
        if self.p == 0:
            return (change != 0).any(1).flatten(1).sum(1).to(x.dtype)
        norm: Tensor = torch.linalg.vector_norm(change.flatten(1), float(self.p), dim=1)
        return norm


@METRICS.register("image-ssim", paper="Wang et al. 2004, eq. 13")
@dataclass(frozen=True)
class ImageSSIM(Visibility):
    """Structural similarity of image and attacked image, mean over channels, in ``[-1, 1]``; 1 is unchanged.

    See :class:`SSIM` for window and borders.
    """

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, x: Tensor, attacked: Tensor) -> Tensor:
        planes = in_pieces(partial(ssim, data_range=1.0), x.flatten(0, 1), attacked.flatten(0, 1))
        return planes.reshape(x.shape[:2]).mean(1)


@METRICS.register("lpips", paper="Zhang et al. 2018, perceptual similarity", needs=("lpips",))
@dataclass(frozen=True)
class LPIPS(Visibility):
    """Learned perceptual distance of image and attacked image; 0 is unchanged.

    Needs the ``lpips`` package and its backbone's weights (``MissingDataError`` says how to get them).

    Args:
        net: the backbone.
    """

    net: Literal["alex", "vgg", "squeeze"] = "alex"

    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True

    def ready(self) -> None:
        """Refuse, before anything runs, if packages or weights are missing.

        Raises:
            MissingDataError: the package is not installed, or its backbone's weights cannot be had.
        """
        _network(self.net)

    def _measure(self, x: Tensor, attacked: Tensor) -> Tensor:
        measured = _network(self.net).to(x)(*(_three(images) for images in (x, attacked)), normalize=True)
        return torch.as_tensor(measured).reshape(len(x))


def _three(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@cache
def _network(net: str) -> Any:
    try:
        lpips = import_module("lpips")
    except ImportError as error:
        raise MissingDataError(
            "LPIPS needs the lpips package: pip install 'robustexplain[visibility]', or pip install lpips"
        ) from error
    try:
        # Building it draws random weights before it loads its own.
        with torch.random.fork_rng(devices=[]):
            made = lpips.LPIPS(net=net, verbose=False)
    except OSError as error:
        raise MissingDataError(f"LPIPS could not load the weights of its {net} backbone: {error}") from error
    return made.eval().requires_grad_(False)
