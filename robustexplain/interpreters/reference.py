"""Images that an interpreter keeps with it: a background to compare with, or the training set that it points into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import InputError
from ..registry import PARTS


@PARTS.register("reference")
@dataclass(frozen=True, eq=False)
class Reference:
    """Some images and, where they matter, their labels; stored with the system, without pickle.

    Args:
        x: ``[N, C, H, W]`` in ``[0, 1]``.
        y: labels ``[N]``, or ``None``.

    Raises:
        InputError: no image, or another number of labels.
    """

    x: Tensor
    y: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor) or self.x.dim() < 2 or not len(self.x):
            raise InputError(f"a reference needs at least one image [N, C, H, W], got {_shape(self.x)}")
        if self.y is not None and (not isinstance(self.y, Tensor) or self.y.shape != self.x.shape[:1]):
            raise InputError(f"a reference of {len(self.x)} images needs as many labels, got {_shape(self.y)}")

    def like(self, x: Tensor) -> Tensor:
        """The images on the device and in the dtype of ``x``.

        Raises:
            InputError: if images of ``x`` have another shape.
        """
        if x.shape[1:] != self.x.shape[1:]:
            raise InputError(f"the reference holds images {list(self.x.shape[1:])}, got {list(x.shape[1:])}")
        return self.x.to(x.device, x.dtype)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        tensors = {"x": self.x} if self.y is None else {"x": self.x, "y": self.y}
        return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Reference:
        """From safetensors."""
        tensors: dict[str, torch.Tensor] = load(content)
        return cls(tensors["x"], tensors.get("y"))


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
