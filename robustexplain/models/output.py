"""Models that answer with more than logits, or with one logit, as classifiers that answer with logits ``[B, K]``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..answers import Name, TrainingLogits, auxiliary, has, offered, read, with_auxiliary
from ..autograd.layers import two_classes
from ..errors import InputError
from ..registry import PARTS
from .around import PlacedAround
from .classifier import ModelSpec


class Output(PlacedAround):
    """One output of a model that answers with a tuple, a list, a dictionary or an object: ``Output(model, "logits")``.

    In train mode the outputs of auxiliary heads come with it (:class:`TrainingLogits`): those in ``auxiliary``, or else
    all whose name begins with ``aux``, as in torchvision's GoogLeNet. The training loss of a classifier adds theirs.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, or table rows.
        name: the key or attribute of the logits ``[B, K]``, or their place in the answer.
        auxiliary: names of the auxiliary heads' logits.

    Raises:
        InputError: in a forward pass, where the answer has no such output, or it is no tensor; lists what there is.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from robustexplain import models
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return {"logits": x.flatten(1)[:, :3], "features": x}
        >>> models.Output(Net(), "logits")(torch.rand(2, 1, 4, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, name: Name, auxiliary: Sequence[Name] = ()) -> None:
        super().__init__(model)
        if isinstance(auxiliary, (str, int)) or not all(_is_name(n) for n in (name, *auxiliary)):
            raise InputError(f"an output is named by a key or a place, got {name!r} and auxiliary={auxiliary!r}")
        self.name, self.auxiliary = name, tuple(auxiliary)

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return self.placed_as("output", name=self.name, auxiliary=list(self.auxiliary))

    def around(self, model: nn.Module) -> Output:
        """The same output of another model."""
        return Output(model, self.name, self.auxiliary)

    def forward(self, x: Tensor) -> Tensor | TrainingLogits:
        """The logits of ``x``; in train mode with those of auxiliary heads."""
        answer = self.model(x)
        logits = read(answer, self.name, type(self.model).__name__)
        if not self.training:
            return logits
        names = self.auxiliary or auxiliary(answer, logits)
        heads = tuple(read(answer, n, type(self.model).__name__) for n in names if has(answer, n))
        return TrainingLogits(logits, heads) if heads else logits

    def extra_repr(self) -> str:
        """The name of the output."""
        return repr(self.name) + (f", auxiliary={self.auxiliary!r}" if self.auxiliary else "")


class BinaryLogit(PlacedAround):
    """A model that answers with one logit ``z`` as two classes: logits ``[-z/2, z/2]``.

    Their softmax is ``(1 - sigmoid(z), sigmoid(z))``. ``[0, z]`` has the same one, but a map of class 0's logit would
    be zero everywhere; here it is the map of class 1 with the other sign. The log odds are ``z`` itself.

    Args:
        model: gives ``[B]`` or ``[B, 1]``.

    Raises:
        InputError: in a forward pass, for an answer of another shape.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from robustexplain import models
        >>> model = models.BinaryLogit(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
        >>> model(torch.rand(2, 1, 4, 4)).shape
        torch.Size([2, 2])
    """

    num_classes = 2

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return self.placed_as("binary-logit")

    def around(self, model: nn.Module) -> BinaryLogit:
        """The same of another model."""
        return BinaryLogit(model)

    def forward(self, x: Tensor) -> Tensor | TrainingLogits:
        """Logits ``[B, 2]`` of ``x``; in train mode with those of auxiliary heads."""
        answer = self.model(x)
        if isinstance(answer, Tensor):
            return self._two(answer, len(x))
        logits, heads = with_auxiliary(answer)
        if not heads:
            raise InputError(
                f"BinaryLogit needs a model that gives one logit, {[len(x), 1]}, got {type(answer).__name__}"
                f"{offered(answer)}"
            )
        return TrainingLogits(self._two(logits, len(x)), tuple(self._two(head, len(x)) for head in heads))

    def _two(self, z: Tensor, batch: int) -> Tensor:
        if z.shape not in ((batch,), (batch, 1)):
            raise InputError(
                f"BinaryLogit needs a model that gives one logit, [{batch}] or [{batch}, 1], got {list(z.shape)}"
                + ("; a model of several logits needs no BinaryLogit" if z.dim() == 2 else "")
            )
        return two_classes(z.reshape(-1, 1))


PARTS.register("output")(Output)
PARTS.register("binary-logit")(BinaryLogit)


def adapted(model: nn.Module, output: Name | None = None, binary: bool = False) -> nn.Module:
    """A model as a classifier: one output of it where ``output`` names it, two classes where it gives one logit."""
    model = model if output is None else Output(model, output)
    return BinaryLogit(model) if binary else model


def _is_name(name: object) -> bool:
    return isinstance(name, (str, int)) and not isinstance(name, bool)
