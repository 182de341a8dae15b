"""Squeezers: they map images that differ little to the same image (Xu et al. 2018, section III).

A detector compares predictions before and after; an adversary who knows it looks through them as well. They are
transforms, made by name: ``bit-depth-3``, ``median-2``, ``nl-means-11-3-4``.
"""

from __future__ import annotations

from functools import reduce
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import maps as ops
from ..autograd.straight_through import rounded
from ..errors import FieldError, InputError
from ..registry import TRANSFORMS
from ..rounding import wide
from .base import Transform, within


@runtime_checkable
class Squeezing(Protocol):
    """A detector that compares predictions before and after squeezing: the interface that adaptive attacks use."""

    @property
    def squeezers(self) -> tuple[Transform, ...]:
        """Its squeezers."""
        ...

    @property
    def threshold(self) -> float:
        """The L1 distance of probabilities, the largest over squeezers, above which it raises the alarm."""
        ...


@TRANSFORMS.register("bit-depth", paper="Xu et al. 2018, section III-A")
class BitDepth(Transform):
    """``round(x (2^bits - 1)) / (2^bits - 1)`` (Xu et al. 2018, section III-A). Its gradient is zero.

    Args:
        bits: of each channel, from 1 to 16.
    """

    form: ClassVar[str] = "bit-depth-BITS"
    rounds: ClassVar[bool] = True

    def __init__(self, bits: int) -> None:
        super().__init__(f"bit-depth-{bits}")
        within("BitDepth", "bits", bits, 1, 16)
        self.bits = bits
        self.top: int = 2**bits - 1

    @property
    def step(self) -> float:
        """The distance of two neighbouring levels."""
        return 1 / self.top

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level; halves go to the even one."""
        return (rounded(wide(x) * self.top) / self.top).to(x.dtype)


@TRANSFORMS.register("median", paper="Xu et al. 2018, section III-B")
class Median(Transform):
    """The median of a ``size x size`` window, channel by channel (Xu et al. 2018, section III-B).

    As ``scipy.ndimage.median_filter`` with ``mode="reflect"``, which the authors use: borders are mirrored, a window of
    even size reaches one pixel further up and left, and of its two middle values the upper one counts. The gradient
    goes to the pixel that is the median.

    Args:
        size: of the window, in pixels.
    """

    form: ClassVar[str] = "median-SIZE"

    def __init__(self, size: int) -> None:
        super().__init__(f"median-{size}")
        within("Median", "size", size, 1, 15)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """The filtered images."""
        before = self.size // 2
        padded = _mirrored(x, before, self.size - 1 - before, edge=True)
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return windows.kthvalue(self.size**2 // 2 + 1, dim=4).values


@TRANSFORMS.register("nl-means", paper="Buades et al. 2005; Xu et al. 2018, section III-B")
class NonLocalMeans(Transform):
    """Non-local means: each pixel the mean of those whose patches look alike (Buades et al. 2005; Xu et al. 2018).

    What OpenCV's ``fastNlMeansDenoising`` computes, in floating point and differentiably: weights
    ``exp(-d / strength^2)``, ``d`` the mean squared difference of two patches in 8-bit units, none below 0.001.
    Colour images are filtered in CIELAB, lightness apart from the two others, as ``fastNlMeansDenoisingColored`` does
    (it takes the channels for linear). Not rounded to 8 bits, and channels are red, green, blue: the authors' code
    hands them to OpenCV in that order, which takes them for blue, green, red. A backward pass holds some four images
    for each pixel of the search window.

    Args:
        search: side of the window in which similar patches are looked for, odd.
        patch: side of a patch, odd.
        strength: ``h``, in 8-bit units.
    """

    form: ClassVar[str] = "nl-means-SEARCH-PATCH-STRENGTH"

    def __init__(self, search: int = 11, patch: int = 3, strength: float = 4) -> None:
        super().__init__(f"nl-means-{search}-{patch}-{strength:g}")
        for field, value in (("search", search), ("patch", patch)):
            within("NonLocalMeans", field, value, 1, 51)
            if value % 2 == 0:
                raise FieldError("NonLocalMeans", field, f"must be odd, got {value!r}")
        if not strength > 0:
            raise FieldError("NonLocalMeans", "strength", f"must be above 0, got {strength!r}")
        self.search, self.patch, self.strength = search, patch, float(strength)

    def forward(self, x: Tensor) -> Tensor:
        """The filtered images.

        Raises:
            InputError: neither one channel nor three, or images smaller than half a search window and half a patch.
        """
        if x.shape[1] not in (1, 3):
            raise InputError(f"non-local means takes grey or RGB images, got {x.shape[1]} channels")
        if min(x.shape[-2:]) <= self.search // 2 + self.patch // 2:
            raise InputError(f"images of {list(x.shape[-2:])} are too small for a search window of {self.search}")
        dtype, x = x.dtype, wide(x)  # a hundred weights are summed
        if x.shape[1] == 1:
            return self._filtered(x).to(dtype)
        lab = _to_lab(x)
        found = _from_lab(torch.cat([self._filtered(lab[:, :1]), self._filtered(lab[:, 1:])], 1))
        return ops.clipped(found.to(dtype))

    def _filtered(self, x: Tensor) -> Tensor:
        reach, rim = self.search // 2, self.patch // 2
        height, width = x.shape[-2:]
        padded = _mirrored(x, reach + rim, reach + rim, edge=False)
        centre = padded[..., reach : reach + height + 2 * rim, reach : reach + width + 2 * rim]
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        scale = (255 / self.strength) ** 2 / (self.patch**2 * x.shape[1])
        for down in range(self.search):
            for right in range(self.search):
                other = padded[..., down : down + height + 2 * rim, right : right + width + 2 * rim]
                d = _window_sums((centre - other).square().sum(1, keepdim=True), self.patch)
                # Cut off before exp, which is slow where it underflows.
                weight = F.threshold((-scale * d).clamp(min=-10).exp(), 1e-3, 0.0)
                total = total + weight * other[..., rim : rim + height, rim : rim + width]
                weights = weights + weight
        # The pixel itself has weight one.
        return total / weights


def _mirrored(x: Tensor, before: int, after: int, *, edge: bool) -> Tensor:
    """``x`` with mirrored borders, the pixel at the edge repeated (``edge``) or not; any width of border."""
    for dim in (2, 3):
        size = x.shape[dim]
        places = torch.arange(-before, size + after, device=x.device)
        period = 2 * size if edge else max(2 * size - 2, 1)
        places = places % period
        x = x.index_select(dim, torch.where(places >= size, period - places - int(edge), places))
    return x


def _window_sums(x: Tensor, size: int) -> Tensor:
    """The sum over every whole ``size x size`` window."""
    # Rows, then columns, by slices: several times as fast on a CPU as average pooling at stride one.
    for dim in (2, 3):
        count = x.shape[dim] - size + 1
        x = reduce(torch.add, [x.narrow(dim, i, count) for i in range(size)])
    return x


# Linear RGB to XYZ of the white point D65, each row divided by the white's.
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)


def _to_lab(x: Tensor) -> Tensor:
    """Linear RGB ``[B, 3, H, W]`` to CIELAB, in OpenCV's 8-bit units over 255."""
    matrix = x.new_tensor(_XYZ) / x.new_tensor(_WHITE)[:, None]
    xyz = torch.einsum("ij,bjhw->bihw", matrix, x)
    root = xyz.clamp(min=0.008856).pow(1 / 3)
    f = torch.where(xyz > 0.008856, root, 7.787 * xyz + 16 / 116)
    y = xyz[:, 1:2]
    light = torch.where(y > 0.008856, 116 * root[:, 1:2] - 16, 903.3 * y)
    a, b = 500 * (f[:, :1] - f[:, 1:2]), 200 * (f[:, 1:2] - f[:, 2:])
    return torch.cat([light / 100, (a + 128) / 255, (b + 128) / 255], 1)


def _from_lab(lab: Tensor) -> Tensor:
    """The inverse of :func:`_to_lab`."""
    light, a, b = 100 * lab[:, :1], 255 * lab[:, 1:2] - 128, 255 * lab[:, 2:] - 128
    dark = light / 903.3
    fy = torch.where(dark > 0.008856, (light + 16) / 116, 7.787 * dark + 16 / 116)
    f = torch.cat([fy + a / 500, fy, fy - b / 200], 1)
    xyz = torch.where(f > 0.206893, f.pow(3), (f - 16 / 116) / 7.787)
    matrix = lab.new_tensor(_XYZ) / lab.new_tensor(_WHITE)[:, None]
    return torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix.double()).to(lab.dtype), xyz)
