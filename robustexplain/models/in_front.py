"""Models with transforms of the image in front of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from ..door import admit_as
from ..errors import InputError
from ..random_streams import derive
from ..transforms import transforms as by_names

_passed_by: ContextVar[nn.Module | None] = ContextVar("the model whose images are transformed already", default=None)


class InFront(nn.Module):
    """A model that transforms its images first.

    Args:
        transforms: names of the transforms, the first one first.

    Raises:
        InputError: an unknown transform, or one twice.
    """

    def __init__(self, transforms: Sequence[str] = ()) -> None:
        super().__init__()
        # No parameters and no stored buffers: the weights' names are those of the model without them.
        self.transforms = nn.ModuleList(by_names(tuple(transforms)) if len(transforms) else ()).eval()

    @property
    def random(self) -> bool:
        """Whether a transform uses random draws."""
        return any(t.random for t in self.transforms)

    @property
    def rounds(self) -> bool:
        """Whether a transform rounds."""
        return any(t.rounds for t in self.transforms)

    @property
    def transform_names(self) -> tuple[str, ...]:
        """The names of the transforms."""
        return tuple(str(t.name) for t in self.transforms)

    def transformed(self, x: Tensor) -> Tensor:
        """The transformed images, as the network behind the transforms gets them, ``[B, C, H, W]``."""
        if _passed_by.get() is self:
            return x
        for transform in self.transforms:
            before, x = x, transform(x)
            if x.shape != before.shape:
                raise InputError(
                    f"the transform {transform.name!r} must give images of the shape of its input, "
                    f"{list(before.shape)}, got {list(x.shape)}"
                )
        return x

    @abstractmethod
    def with_transforms(self, names: Sequence[str]) -> InFront:
        """The same network, its weights shared, with these transforms in front of it and no others."""

    def redrawn(self, seed: int) -> InFront:
        """The model with other random draws of its transforms; itself where nothing is random."""
        # Each transform has draws of its own, also where one stands there twice.
        seeds = [seed, *(derive(seed, i) % 2**31 for i in range(1, len(self.transforms)))]
        names = [t.redrawn(own).name for t, own in zip(self.transforms, seeds, strict=False)]  # type: ignore[operator]
        if not self.random:
            return self
        made = self.with_transforms(names)
        admit_as(made, self)
        return made


def in_front_of(model: nn.Module) -> InFront | None:
    """The outermost model with transforms in front of it, among ``model`` and those that it stands around."""
    while not (isinstance(model, InFront) and len(model.transforms)):
        inside = getattr(model, "layers_inside", "")
        if not inside:
            return None
        model = model.get_submodule(inside)
    return model


@contextmanager
def transformed_already(model: InFront) -> Iterator[None]:
    """Within this block ``model`` takes images that its transforms have transformed already."""
    token = _passed_by.set(model)
    try:
        yield
    finally:
        _passed_by.reset(token)
