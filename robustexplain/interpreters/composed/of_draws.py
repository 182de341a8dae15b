"""Maps of a model that answers by the mean, or the vote, of random versions of its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ... import maps as ops
from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...models.in_front import transformed_already
from ...models.voted import voting
from ...registry import INTERPRETERS
from ..base import Explanation, explained_class
from .base import Wrapper


@INTERPRETERS.register("of-draws", needs=("random transforms",))
@dataclass(frozen=True, eq=False)
class OfDraws(Wrapper):
    """Explains the network inside of a :class:`~robustexplain.models.Voted` model, by the interpreter ``base``.

    ``transformed``: the mean of the maps of all versions of the image, for the class that the vote explains, each taken
    back to the coordinates of the input; costs ``draws`` maps. ``raw``: the map of the input itself, which the network
    never classifies.

    Args:
        base: explains ``model``.
        explained: which image.

    Raises:
        InputError: a model that does not answer by draws, or a ``base`` that explains another one.
    """

    explained: Literal["raw", "transformed"] = "transformed"

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    explains_scalars: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if voting(self.model) is None:
            name = type(self.model).__name__
            raise InputError(f"{name} does not answer by draws: see models.Voted")

    @property
    def averaged(self) -> int:
        """Of how many draws each map is made."""
        model = voting(self.model)
        return self.base.averaged * (1 if model is None or self.explained == "raw" else model.draws)

    def lay_out(self, goal_map: Tensor, x: Tensor) -> Tensor:
        """As ``base`` does."""
        return self.base.lay_out(goal_map, x)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        model = voting(self.model)
        if model is None:
            # Another one around it has drawn already.
            return self.base._explain(x, target, graph)
        if target is None or self.explained == "raw":
            with torch.set_grad_enabled(graph and self.explained == "raw"):
                logits = answer(self.model, x)
            target = explained_class(logits, target)
        if self.explained == "raw":
            with transformed_already(model):
                found = self.base._explain(x, target, graph)
            return found._replace(logits=logits, certificate=None)
        versions = [model.version(x, draw) for draw in range(model.draws)]
        with transformed_already(model):
            each = [self.base._explain(version, target, graph) for version in versions]
        maps = [model.taken_back(ops.resize(found.maps, x.shape[-2:]), x, draw) for draw, found in enumerate(each)]
        heads = [found.encoder_logits for found in each if found.encoder_logits is not None]
        logits = model.together(torch.stack([found.logits for found in each]))
        return Explanation(logits, torch.stack(maps).mean(0), torch.stack(heads).mean(0) if heads else None)
