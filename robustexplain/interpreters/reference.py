"""Samples that an interpreter keeps: a background to compare with, or the training set whose influence it measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from .. import checks
from ..errors import InputError
from ..registry import PARTS


@PARTS.register("reference")
@dataclass(frozen=True, eq=False)
class Reference:
    """Some images or table rows and, where they matter, their labels and weights; stored with the system, no pickle.

    Args:
        x: ``[N, C, H, W]`` in ``[0, 1]``, or table rows ``[N, D]`` in the data's own units.
        y: labels ``[N]``, or ``None``.
        weights: ``[N]``, how much each sample counts, not negative; ``None``: all the same.

    Raises:
        InputError: no sample; samples that no interpreter would take, such as 8-bit images, or NaN; another number of
            labels or weights, or weights that make no distribution.
    """

    x: Tensor
    y: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor) or self.x.dim() < 2 or not len(self.x):
            raise InputError(f"a reference needs at least one image [N, C, H, W], got {_shape(self.x)}")
        checks.inputs(self.x, "Reference.x")
        if self.y is not None and (not isinstance(self.y, Tensor) or self.y.shape != self.x.shape[:1]):
            raise InputError(f"a reference of {len(self.x)} images needs as many labels, got {_shape(self.y)}")
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: Tensor) -> None:
        if not isinstance(weights, Tensor) or weights.shape != self.x.shape[:1]:
            raise InputError(f"a reference of {len(self.x)} samples needs as many weights, got {_shape(weights)}")
        wide = weights.double()
        if not torch.isfinite(wide).all() or float(wide.min()) < 0 or float(wide.sum()) <= 0:
            raise InputError(f"weights must be finite and not negative, and not all 0, got {weights.tolist()!r:.200}")

    def shares(self) -> Tensor:
        """Each sample's share of the total weight: float64 ``[N]`` on the CPU, adds up to one."""
        weights = torch.ones(len(self.x), dtype=torch.float32) if self.weights is None else self.weights.detach().cpu()
        wide = weights.double()
        return wide / wide.sum()

    def like(self, x: Tensor) -> Tensor:
        """The images or rows on the device and in the dtype of ``x``.

        Raises:
            InputError: if those of ``x`` have another shape.
        """
        if x.shape[1:] != self.x.shape[1:]:
            what = "rows" if self.x.dim() == 2 else "images"
            raise InputError(f"the reference holds {what} {list(self.x.shape[1:])}, got {list(x.shape[1:])}")
        return self.x.to(x.device, x.dtype)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        tensors = {"x": self.x, "y": self.y, "weights": self.weights}
        return save({n: value.detach().cpu().contiguous() for n, value in tensors.items() if value is not None})

    @classmethod
    def from_bytes(cls, content: bytes) -> Reference:
        """From safetensors."""
        tensors: dict[str, torch.Tensor] = load(content)
        return cls(tensors["x"], tensors.get("y"), tensors.get("weights"))


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
