"""The patches that LIME and KernelSHAP switch on and off: a regular grid, or superpixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError
from ...fields import Count, Positive, check_fields
from ...registry import PARTS


@PARTS.register("segments")
@dataclass(frozen=True)
class Segments:
    """How an image is cut into patches.

    Args:
        how: ``grid`` (a square grid, the same for every image), or ``slic`` (superpixels of Achanta et al. 2012, by
            scikit-image; install the extra ``superpixels``).
        number: about how many; the grid's side is the rounded square root, at most the number of pixels.
        compactness: of SLIC: the larger, the squarer. Colour images are compared in Lab, grey ones by their values in
            ``[0, 1]``, where 0.1 does what 10 does for colours.
    """

    how: Literal["grid", "slic"] = "grid"
    number: Count = 49
    compactness: Positive = 10.0

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The patch of each pixel, int64 ``[B, H, W]``, numbered from 0 without gaps in every image.

        Raises:
            InputError: for ``slic`` without scikit-image.
        """
        if self.how == "grid":
            return self._grid(x).expand(len(x), -1, -1)
        return torch.stack([self._slic(row) for row in x]).to(x.device)

    def _grid(self, x: Tensor) -> Tensor:
        cells = max(1, round(math.sqrt(self.number)))
        height, width = x.shape[-2:]
        rows, columns = (torch.arange(n, device=x.device) * min(cells, n) // n for n in (height, width))
        return (rows[:, None] * min(cells, width) + columns)[None]

    def _slic(self, image: Tensor) -> Tensor:
        try:
            from skimage.segmentation import slic
        except ImportError as error:
            raise InputError(
                "superpixels need scikit-image: pip install 'robustexplain[superpixels]', or use Segments(how='grid')"
            ) from error
        # Through float32, so that an image has the same superpixels in every dtype that holds its values.
        pixels = image.detach().float().cpu().permute(1, 2, 0).double().numpy()
        labels = slic(pixels, n_segments=self.number, compactness=self.compactness, start_label=0, channel_axis=-1)
        numbered: Tensor = torch.from_numpy(labels).long().unique(return_inverse=True)[1]
        return numbered


def counts(segments: Tensor) -> list[int]:
    """How many patches each image has."""
    return [int(n) + 1 for n in segments.flatten(1).amax(1)]


def switched(segments: Tensor, coalitions: Tensor) -> Tensor:
    """Which pixels stay, ``[B, n, H, W]``, from patches ``[B, H, W]`` and coalitions ``[B, n, S]`` (1 stays)."""
    batch, number = coalitions.shape[:2]
    index = segments.flatten(1)[:, None].expand(batch, number, -1)
    return coalitions.gather(2, index).reshape(batch, number, *segments.shape[1:])


def painted(segments: Tensor, values: list[Tensor]) -> Tensor:
    """Maps ``[B, H, W]`` with each patch's value at all of its pixels."""
    maps = [v.to(segments.device)[patches] for v, patches in zip(values, segments, strict=True)]
    return torch.stack(maps)


def padded(coalitions: list[Tensor], like: Tensor) -> Tensor:
    """Coalitions of different widths as one ``[B, n, S]``; entries of patches that an image lacks are not used."""
    width = max(c.shape[1] for c in coalitions)
    return torch.stack([torch.nn.functional.pad(c, (0, width - c.shape[1])) for c in coalitions]).to(
        like.device, like.dtype
    )
