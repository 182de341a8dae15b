"""What attacks on maps can aim at, and the maps as they are shown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

from robustexplain import maps as ops
from robustexplain.fields import Eps
from robustexplain.interpreters.base import Explanation
from robustexplain.interpreters.composed.base import Wrapper

from ..base import Attack

Aim = Literal["forge", "match", "move"]
"""``forge``: another prediction, the benign map (or a goal map). ``match``: the benign prediction, a goal map.
``move``: the benign prediction, a map far from the benign one."""


@dataclass(frozen=True)
class Aimed(Attack):
    """An attack whose aim is a setting.

    Args:
        eps: L-infinity radius.
        aim: ``forge`` (another prediction and the benign map, or a goal map), ``match`` (the benign prediction and a
            goal map) or ``move`` (the benign prediction and a map far from the benign one).
    """

    eps: Eps = 8 / 255
    aim: Aim = "forge"

    needs_maps: ClassVar[bool] = True

    @property
    def keeps_prediction(self) -> bool:  # type: ignore[override]
        """Unless it forges."""
        return self.aim != "forge"

    @property
    def moves_map(self) -> bool:  # type: ignore[override]
        """Whether the map should differ from the benign one."""
        return self.aim == "move"

    def reaching(self) -> Self:
        """With the aim to match a map."""
        return replace(self, aim="match")


@dataclass(frozen=True, eq=False)
class Shown(Wrapper):
    """An interpreter whose own grid is that of the input: attacks then compare maps as they are shown and judged."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = self.base._explain(x, target, graph)
        return found._replace(maps=ops.resize(found.maps, x.shape[-2:]))
