"""A model that answers by the mean, or the vote, of its answers to several random versions of the image."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.straight_through import is_straight
from ..door import admit_as, answer
from ..errors import InputError
from ..random_streams import derive
from ..registry import PARTS
from ..transforms import Transform, transform
from .around import PlacedAround
from .classifier import ModelSpec
from .in_front import passed_by

Vote = Literal["mean", "majority"]
"""How the answers become one: the mean of the logits, or the share of the draws that decide for each class."""


class Voted(PlacedAround):
    """The answers of a model to ``draws`` versions of each image, each by a random transform, put together.

    ``mean``: the mean of the logits. ``majority``: ``log((n_c + 1/K) / (n + 1))``, where ``n_c`` of ``n`` draws are
    predicted as class ``c``: logits whose softmax is the share of the votes. A vote has a derivative of zero; inside
    :func:`~robustexplain.autograd.straight_through.straight_through` it is that of the mean of the probabilities, the
    expected share.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
        transform: the name of a random transform, without a seed.
        draws: versions of each image.
        vote: how the answers become one.
        mirrored: whether every other version is mirrored left to right.
        seed: of the draws.

    Raises:
        InputError: a transform that is not random.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: str,
        draws: int = 30,
        vote: Vote = "mean",
        *,
        mirrored: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if vote not in get_args(Vote):
            raise InputError(f"Voted.vote must be one of {', '.join(get_args(Vote))}, got {vote!r}")
        made = drawn(transform)
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise InputError(f"Voted.draws must be a whole number of at least 1, got {draws!r}")
        self.transform_name, self.draws, self.vote, self.mirrored, self.seed = transform, draws, vote, mirrored, seed
        seeds = (derive(seed, "draw", i) % 2**31 for i in range(draws))
        self.versions = nn.ModuleList([made.redrawn(own) for own in seeds]).eval()

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return self.placed_as("voted", transform=self.transform_name, draws=self.draws, vote=self.vote,
                              mirrored=self.mirrored, seed=self.seed)  # fmt: skip

    def around(self, model: nn.Module) -> Voted:
        """The same, with the same draws, around another model."""
        return Voted(model, self.transform_name, self.draws, self.vote, mirrored=self.mirrored, seed=self.seed)

    @property
    def random(self) -> bool:
        """Always."""
        return True

    @property
    def averaged(self) -> int:
        """Of how many random draws each answer is made."""
        return self.draws

    @property
    def rounds(self) -> bool:
        """Whether the answer is a vote."""
        return self.vote == "majority"

    def redrawn(self, seed: int) -> Voted:
        """The same with other random draws, of the model too."""
        inner = self.model
        inner = inner.redrawn(seed) if getattr(inner, "random", False) is True else inner  # type: ignore[operator]
        made = Voted(inner, self.transform_name, self.draws, self.vote, mirrored=self.mirrored, seed=seed)
        admit_as(made, self)
        return made

    def version(self, x: Tensor, draw: int) -> Tensor:
        """One random version of each image, ``[B, C, H, W]``."""
        found: Tensor = self.versions[draw](x)
        return found.flip(-1) if self._mirrors(draw) else found

    def taken_back(self, maps: Tensor, x: Tensor, draw: int) -> Tensor:
        """Maps ``[B, H, W]`` of that version of ``x``, in the coordinates of ``x``."""
        front: Transform = self.versions[draw]  # type: ignore[assignment]
        return front.taken_back(maps.flip(-1) if self._mirrors(draw) else maps, x)

    def together(self, logits: Tensor) -> Tensor:
        """One answer ``[B, K]`` of the logits of all draws ``[n, B, K]``."""
        if self.vote == "mean":
            return logits.mean(0)
        classes = logits.shape[2]
        votes = F.one_hot(logits.argmax(2), classes).to(logits.dtype).sum(0)
        # The zero keeps the vote in the graph: its gradient is zero rather than absent.
        expected = logits.softmax(2).sum(0) if is_straight() else 0 * logits.sum(0)
        votes = votes + (expected - expected.detach())
        return ((votes + 1 / classes) / (len(logits) + 1)).log()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        if passed_by(self):
            alone: Tensor = self.model(x)
            return alone
        each = [answer(self.model, self.version(x, draw), finite=False) for draw in range(self.draws)]
        return self.together(torch.stack(each))

    def _mirrors(self, draw: int) -> bool:
        return self.mirrored and draw % 2 == 1


PARTS.register("voted", paper="Xie et al. 2018; Cao and Gong 2017")(Voted)


def drawn(name: str) -> Transform:
    """A random transform by its name.

    Raises:
        InputError: no such name, or one that is not random.
    """
    made = transform(name)
    seed: int = getattr(made, "seed", 0)
    if not made.random or seed:
        raise InputError(f"a random transform without a seed is needed, such as 'resize-pad-3', got {name!r}")
    return made


def voting(model: nn.Module) -> Voted | None:
    """The outermost model that still draws versions of its images, among ``model`` and those that it stands around."""
    while not (isinstance(model, Voted) and not passed_by(model)):
        inside = getattr(model, "layers_inside", "")
        if not inside:
            return None
        model = model.get_submodule(inside)
    return model
