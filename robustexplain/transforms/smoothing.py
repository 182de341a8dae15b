"""Smoothing by scikit-image: total variation and wavelets. Their steps leave the graph, and count as rounding."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import maps as ops
from ..autograd.straight_through import stepped
from ..errors import FieldError, MissingDataError
from ..registry import TRANSFORMS
from .base import Transform


class Smoothing(Transform):
    """A filter of scikit-image, image by image in float64 on the CPU.

    Its derivative is that of rounding: one where a gradient goes straight through, else zero (Athalye et al. 2018,
    BPDA: a filter changes an image little). A subclass writes ``_filtered``.
    """

    rounds: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """The smoothed images.

        Raises:
            MissingDataError: without scikit-image, or without PyWavelets for wavelets.
        """
        images = x.detach().double().cpu().permute(0, 2, 3, 1).numpy()
        made = np.stack([np.asarray(self._filtered(image)) for image in images])
        value = torch.from_numpy(made).permute(0, 3, 1, 2).to(x.device, x.dtype)
        return stepped(x, ops.clipped(value))

    @abstractmethod
    def _filtered(self, image: np.ndarray) -> np.ndarray:
        """An image ``[H, W, C]``, filtered."""


@TRANSFORMS.register("tv", paper="Chambolle 2004; Guo et al. 2018, section 3.3 (as a defense)")
class TotalVariation(Smoothing):
    """The image of least total variation near the given one (Rudin et al. 1992), by Chambolle's algorithm.

    ``skimage.restoration.denoise_tv_chambolle``. Departure: Guo et al. first drop random pixels, and minimise by split
    Bregman over those kept.

    Args:
        weight: of the variation; the larger, the smoother.
    """

    form: ClassVar[str] = "tv-WEIGHT"

    def __init__(self, weight: float) -> None:
        super().__init__(f"tv-{weight:g}")
        self.weight = _within("TotalVariation", "weight", weight)

    def _filtered(self, image: np.ndarray) -> np.ndarray:
        filtered: np.ndarray = _restoration().denoise_tv_chambolle(image, weight=self.weight, channel_axis=-1)
        return filtered


@TRANSFORMS.register("wavelet", paper="Chang et al. 2000 (BayesShrink); Prakash et al. 2018 (as a defense)")
class Wavelet(Smoothing):
    """Small wavelet coefficients cut to zero, by BayesShrink with soft thresholds (Chang et al. 2000).

    ``skimage.restoration.denoise_wavelet`` with the Daubechies wavelet ``db1``.

    Args:
        sigma: standard deviation of the noise to be removed; Prakash et al. take 0.04.
    """

    form: ClassVar[str] = "wavelet-SIGMA"

    def __init__(self, sigma: float) -> None:
        super().__init__(f"wavelet-{sigma:g}")
        self.sigma = _within("Wavelet", "sigma", sigma)

    def _filtered(self, image: np.ndarray) -> np.ndarray:
        _module("pywt")
        filtered: np.ndarray = _restoration().denoise_wavelet(image, sigma=self.sigma, channel_axis=-1)
        return filtered


def _within(component: str, field: str, value: float) -> float:
    # A smaller one would be written with an exponent, which no name has.
    if not 1e-4 <= value <= 1e4:
        raise FieldError(component, field, f"must be from 0.0001 to 10000, got {value!r}")
    return float(f"{value:g}")


def _restoration() -> Any:
    return _module("skimage.restoration")


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDataError(
            "smoothing by total variation needs scikit-image, and by wavelets PyWavelets besides: "
            "pip install 'robustexplain[smoothing]'"
        ) from error
