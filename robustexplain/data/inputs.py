"""The images that a system takes."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..errors import InputError
from ..fields import check_fields
from ..registry import PARTS
from .pictures import MOST_SIDE, Resize, decoded

if TYPE_CHECKING:
    from PIL import Image

    from .base import Data


@PARTS.register("input-spec")
@dataclass(frozen=True)
class InputSpec:
    """The images that a system takes, and the names of its classes; stored with the system.

    Args:
        size: ``(H, W)`` in pixels; ``None``: any, and images are not resized.
        resize: how an image of another size is brought to it, bicubic.
        channels: 3 for colour, 1 for grey.
        class_names: in the order of the logits; empty where nobody named them.

    Raises:
        InputError: a size that is not two whole numbers above 0, names that are no strings.
    """

    size: tuple[int, int] | None = None
    resize: Resize = "squash"
    channels: Literal[1, 3] = 3
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size is not None:
            object.__setattr__(self, "size", _checked_size(self.size))
        names: object = self.class_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InputError(f"class_names must be strings, got {names!r:.200}")
        object.__setattr__(self, "class_names", tuple(names))

    @classmethod
    def of_data(cls, data: Data) -> InputSpec | None:
        """What a data set's images are; ``None`` for a table, and for images that are neither grey nor colour."""
        if len(data.shape) != 3 or data.shape[0] not in (1, 3):
            return None
        channels, height, width = data.shape
        return cls((height, width), data.resize, channels, tuple(map(str, data.classes)))  # type: ignore[arg-type]

    def read(self, image: Image.Image | str | PathLike[str]) -> Tensor:
        """A picture or an image file as ``[1, C, H, W]`` in ``[0, 1]``, float32 on the CPU.

        Raises:
            MissingDataError: no such file.
            InputError: PIL cannot read it; more than 8 bits a pixel, several frames, no pixels or too many.
        """
        return decoded(image, self.size, self.resize, self.channels)[None]

    def check(self, x: Tensor) -> None:
        """Refuse a batch of another size or other channels.

        Raises:
            InputError: naming both.
        """
        shown = list(x.shape)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"the system takes images of {self.channels} channel(s), [B, {self.channels}, H, W], got {shown}"
            )
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise InputError(
                f"the system takes images of {self.size[0]} x {self.size[1]} pixels, got {x.shape[2]} x {x.shape[3]}; "
                "system.prepare(image) reads and resizes one as it was judged"
            )

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model with other channels, or another number of classes than there are names.

        Raises:
            InputError: naming both.
        """
        channels, classes = getattr(model, "in_channels", None), getattr(model, "num_classes", None)
        if isinstance(channels, int) and channels != self.channels:
            raise InputError(f"inputs say {self.channels} channel(s), but the model takes {channels}")
        if isinstance(classes, int):
            self.check_classes(classes)

    def check_classes(self, classes: int) -> None:
        """Refuse a model with another number of classes than there are names.

        Raises:
            InputError: naming both.
        """
        if self.class_names and classes != len(self.class_names):
            raise InputError(f"inputs name {len(self.class_names)} classes, but the model has {classes}")


def _checked_size(size: Any) -> tuple[int, int]:
    whole = isinstance(size, (tuple, list)) and all(isinstance(side, int) and side > 0 for side in size)
    if not whole or len(size) != 2:
        raise InputError(f"size must be (height, width) in pixels, two whole numbers above 0, got {size!r}")
    if max(size) > MOST_SIDE:
        raise InputError(f"size must be at most {MOST_SIDE} pixels a side, got {size!r}")
    return int(size[0]), int(size[1])
