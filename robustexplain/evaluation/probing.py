"""What the audit of cells runs by itself: repeated passes of each row, and attacks that should be no weaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attacks import Attack
from ..errors import DamagedFileError, InputError
from ..maps import absmax
from ..metrics import hit
from ..recipe.auditing import Auditing
from ..recipe.experiment import Column, Experiment, Row
from ..system import System
from .judged import Chunk
from .origins import Origins
from .store import RunFolder

KIND = "audited"
"""The folder of what the audit ran; it is kept."""
ITERATES = "iterates"
"""The name of the attack itself, with its iterates watched."""
REPEATS = 5
RESTARTS = 5


@torch.no_grad()
def probe(system: System, x: Tensor) -> dict[str, Tensor]:
    """How a system answers one batch again and again, ``[1]`` each.

    ``output_change`` and ``map_change``: by how much repeated logits (L2) and maps (a pixel, over the map's largest)
    differ; ``softmax``: whether logits are probabilities; ``constant``: whether all inputs have the same map.
    """
    first = system(x)
    output, map_change = torch.zeros(()), torch.zeros(())
    reference = absmax(first.maps)
    for _ in range(REPEATS - 1):
        again = system(x)
        output = torch.maximum(output, (again.logits - first.logits).float().norm(dim=1).amax().cpu())
        map_change = torch.maximum(map_change, (absmax(again.maps) - reference).float().abs().amax().cpu())
    logits = first.logits.float()
    sums = bool(((logits.sum(1) - 1).abs() <= 1e-5).all()) and bool(((logits >= 0) & (logits <= 1)).all())
    same = len(x) > 1 and bool((x != x[:1]).any()) and float((reference - reference[:1]).abs().amax()) <= 1e-6
    found = {"output_change": output, "map_change": map_change}
    found |= {"softmax": torch.tensor(float(sums)), "constant": torch.tensor(float(same))}
    return {name: value.float().cpu()[None] for name, value in found.items()}


def stronger(attack: Attack) -> dict[str, Attack]:
    """The same attack with what should make it no weaker, by name: those that it has settings for."""
    known = {f.name: getattr(attack, f.name) for f in fields(attack)}
    asked: dict[str, dict[str, Any]] = {}
    if isinstance(steps := known.get("steps"), int) and steps > 0:
        asked["steps"] = {"steps": 2 * steps}
    if isinstance(eps := known.get("eps"), float) and 0 < eps < 1:
        asked |= {"eps": {"eps": min(1.0, 2 * eps)}, "unbounded": {"eps": 1.0}}
    if isinstance(restarts := known.get("restarts"), int) and restarts < RESTARTS:
        asked["restarts"] = {"restarts": RESTARTS}
    made = {}
    for name, changes in asked.items():
        try:
            made[name] = replace(attack, **changes)
        except InputError:
            continue  # a setting that this attack cannot have
    return made


def iterates(attack: Attack, system: System, chunk: Chunk, goal_map: Tensor | None) -> dict[str, Tensor]:
    """Of each input, ``[B]``: whether the attack ended with the wanted prediction, and whether any iterate had it.

    What the search shows to the classifier is taken for an iterate of the input that it is nearest to.
    """
    clean, won = chunk.x.flatten(1), torch.zeros(len(chunk.x), dtype=torch.bool, device=chunk.x.device)

    @torch.no_grad()
    def watch(model: Any, given: tuple[Any, ...], logits: Any) -> None:
        x = given[0].detach() if given and isinstance(given[0], Tensor) else None
        if x is None or x.shape[1:] != chunk.x.shape[1:] or not isinstance(logits, Tensor):
            return
        owner = torch.cdist(x.flatten(1).to(clean), clean).argmin(1)
        goal = None if chunk.goal_class is None else chunk.goal_class[owner]
        won[owner[hit(logits.detach(), chunk.y[owner], goal)]] = True

    hook = system.model.register_forward_hook(watch)
    try:
        made = attack(system, chunk.x, chunk.y, chunk.goal_class, goal_map)
    finally:
        hook.remove()
    return {"success": made.success.float().cpu(), "won": (won | made.success).float().cpu()}


def some(chunks: Sequence[Chunk], images: int) -> list[Chunk]:
    """The first inputs of an evaluation, in its chunks."""
    found: list[Chunk] = []
    for chunk in chunks:
        left = images - sum(len(part.x) for part in found)
        if left > 0:
            goal = None if chunk.goal_class is None else chunk.goal_class[:left]
            found.append(Chunk(chunk.index, chunk.x[:left], chunk.y[:left], goal, chunk.samples[:left]))
    return found


def over(make: Callable[[Chunk], dict[str, Tensor]], chunks: Sequence[Chunk], first: Chunk) -> dict[str, Tensor]:
    """What ``make`` finds for each of some chunks, one after the other; ``first`` is one of them."""
    found = [make(chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


class Probes:
    """Names and answers of what the audit runs.

    Args:
        experiment: rows, columns and settings.
        folder: its directory.
        origins: of the experiment.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, origins: Origins) -> None:
        self.experiment, self.folder, self.origins = experiment, folder, origins
        self.settings: Auditing = experiment.audit

    def row(self, row: Row) -> str:
        """The name of a row's probe."""
        return f"{row.label} {self._digest(self.origins.row(row.label))}"

    def cell(self, row: Row, column: Column, name: str) -> str:
        """The name of a stronger attack of a cell."""
        return f"{row.label} / {column.label} / {name} {self._digest(self.origins.cell(row, column))}"

    def _digest(self, made_of: Any) -> str:
        return files.digest([made_of, self.settings.images, self.folder.identity])[:8]

    def attacked(self, column: Column) -> bool:
        """Whether a column's attack is run again with other settings."""
        return self.settings.level == "full" and isinstance(column.attack, Attack) and not column.facts.control

    def names(self, column: Column) -> list[str]:
        """What is run again of a column's attack: stronger ones, and itself with its iterates watched."""
        if not self.attacked(column):
            return []
        return [*stronger(column.attack), *([] if column.facts.keeps_prediction else [ITERATES])]

    @property
    def complete(self) -> bool:
        """Whether every row with a finished cell was probed, and every attack run again, or tried."""
        for row in self.experiment.rows:
            done = [c for c in self.experiment.columns if self.folder.done(row.label, c.label) is not None]
            if done and self.read(self.row(row)) is None:
                return False
            names = [self.cell(row, column, name) for column in done for name in self.names(column)]
            if any(self.read(n) is None and not self.folder.error(KIND, n, 0).is_file() for n in names):
                return False
        return True

    def read(self, name: str) -> dict[str, Tensor] | None:
        """What was found under a name; ``None`` where it is missing, failed or is damaged."""
        try:
            found: dict[str, Tensor] = files.read_tensors(self.folder.chunk(KIND, name, 0))[0]
        except DamagedFileError:
            return None
        return found
