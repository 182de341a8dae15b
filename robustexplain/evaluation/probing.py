"""What the audit of cells runs by itself: repeated passes of each row, and attacks that should be no weaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attacks import L2, Attack, Linf
from ..errors import DamagedFileError, InputError
from ..maps import absmax
from ..metrics import hit
from ..random_streams import frozen
from ..recipe.auditing import Auditing
from ..recipe.experiment import Column, Experiment, Row
from ..system import System
from .judged import Chunk
from .origins import Origins
from .raising import raised, to_raise
from .store import RunFolder

KIND = "audited"
"""The folder of what the audit ran; it is kept."""
ITERATES = "iterates"
"""The name of the attack itself, with its iterates watched."""
RANDOM, FROZEN, GOALS, PREDICTIONS = "random draws", "frozen draws", "planted goals", "planted predictions"
"""The names of what is set against an attack, and of what it must find."""
KINDS = (ITERATES, RANDOM, FROZEN, GOALS, PREDICTIONS)
"""All of them: other names are those of stronger attacks."""
WEIGHTS = "other weights"
"""The name of a row's maps of a classifier whose weights are drawn anew."""
REPEATS = 5
RESTARTS = 5
SMALL = 1e-4
"""The L-infinity length of the step by which a gradient is tried."""


@torch.no_grad()
def probe(system: System, x: Tensor) -> dict[str, Tensor]:
    """How a system answers one batch again and again, ``[1]`` each.

    ``output_change`` and ``map_change``: by how much repeated logits (L2) and maps (a pixel, over the map's largest)
    differ; ``softmax``: whether logits are probabilities; ``constant``: whether all inputs have the same map. And
    ``promise`` ``[B]``, see :func:`promise`.
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
    return {name: value.float().cpu()[None] for name, value in found.items()} | {"promise": promise(system, x)}


def promise(system: System, x: Tensor) -> Tensor:
    """``[B]``: by how much the margin falls along its own gradient, as a share of what the gradient promises.

    About 1 for a short step where the gradient is that of the classifier, infinite where it is not finite, NaN where it
    is zero, where rounding outweighs the change, and for a classifier without gradients. The margin is the largest
    logit less the next one: a loss that is saturated would round it away. Draws are frozen: those of a random
    classifier depend on its input.
    """
    with frozen():
        return _promise(system, x)


def _promise(system: System, x: Tensor) -> Tensor:
    nothing = torch.full((len(x),), torch.nan)
    if x.dim() != 4 or not x.is_floating_point():
        return nothing
    with torch.enable_grad():
        variable = x.detach().clone().requires_grad_()
        logits: Tensor = system.model(variable)
        if not logits.requires_grad:
            return nothing
        first, second = logits.topk(2, 1).indices.T[:, :, None]
        gap = (logits.gather(1, first) - logits.gather(1, second))[:, 0]
        (slope,) = torch.autograd.grad(gap.sum(), variable, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        broken = ~slope.flatten(1).isfinite().all(1)
        moved = (x - SMALL * slope.nan_to_num().sign()).clamp(0, 1)
        after = system.model(moved)
        real = gap - (after.gather(1, first) - after.gather(1, second))[:, 0]
        told = (slope.nan_to_num(0, 0, 0) * (x - moved)).flatten(1).sum(1)
        unheard = told <= 1e-5 * (1 + logits.abs().amax(1))
        share = torch.where(unheard, torch.nan, real / told.clamp(min=1e-30))
    return torch.where(broken, torch.inf, share).float().cpu()


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

    What the search shows to the classifier is taken for an iterate of the input that it is nearest to, if the attack
    may return it: interpreters and detectors show masked, noisy or blended inputs to the classifier too.
    """
    threat = attack.plan(system).threat
    clean, won = chunk.x.flatten(1), torch.zeros(len(chunk.x), dtype=torch.bool, device=chunk.x.device)

    @torch.no_grad()
    def watch(model: Any, given: tuple[Any, ...], logits: Any) -> None:
        x = given[0].detach() if given and isinstance(given[0], Tensor) else None
        if x is None or x.shape[1:] != chunk.x.shape[1:] or not isinstance(logits, Tensor):
            return
        owner = torch.cdist(x.flatten(1).to(clean), clean).argmin(1)
        goal = None if chunk.goal_class is None else chunk.goal_class[owner]
        hits = hit(logits.detach(), chunk.y[owner], goal)
        if type(threat) in (Linf, L2):
            inside = threat.project(chunk.x[owner], x.to(chunk.x))
            hits = hits & ((inside - x.to(inside)).flatten(1).abs().amax(1) <= 1e-3)
        won[owner[hits]] = True

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
        goal = None if chunk.goal_class is None else chunk.goal_class[:left]
        found.append(Chunk(chunk.index, chunk.x[:left], chunk.y[:left], goal, chunk.samples[:left]))
        if len(chunk.x) >= left:  # what comes after it is not even read
            break
    return found


def over(make: Callable[[Chunk], dict[str, Tensor]], chunks: Sequence[Chunk], first: Chunk) -> dict[str, Tensor]:
    """What ``make`` finds for each of some chunks, one after the other; ``first`` is one of them."""
    found = [make(chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def decisive(columns: Sequence[Column]) -> list[Column]:
    """The attackers that decide about a row: those who know it, and want its map too; else the best that there are."""
    real = [c for c in columns if not c.facts.control]
    return (
        [c for c in real if c.knowledge == "adaptive" and c.facts.needs_maps]
        or [c for c in real if c.facts.needs_maps]
        or real
    )


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

    def weights(self, row: Row) -> str:
        """The name of a row's maps under other weights."""
        return f"{row.label} / {WEIGHTS} {self._digest(self.origins.row(row.label))}"

    def cell(self, row: Row, column: Column, name: str) -> str:
        """The name of what is run for a cell; a cell whose steps were raised is another."""
        made_of: list[Any] = [self.origins.cell(row, column)]
        steps = raised(self.folder, row, column)
        made_of += [] if steps is None else [steps]
        made_of += [self.settings.draws] if name == RANDOM else []
        return f"{row.label} / {column.label} / {name} {self._digest(made_of if len(made_of) > 1 else made_of[0])}"

    def _digest(self, made_of: Any) -> str:
        return files.digest([made_of, self.settings.images, self.folder.identity])[:8]

    def row_names(self, row: Row) -> list[str]:
        """The names of what is run for a row."""
        # A defense is judged by what its row stands on: it may hold maps still on purpose.
        dear = self.settings.level == "full" and not row.derived
        return [self.row(row), *([self.weights(row)] if dear else [])]

    def names(self, row: Row, column: Column) -> list[str]:
        """What is run for a cell: stronger attacks, the attack itself with its iterates watched, what it must find."""
        attack, settings = self.attack(row, column), self.settings
        if attack is None or column.facts.control:
            return []
        found = [n for n in stronger(attack) if settings.level == "full" or (settings.raises and n == "steps")]
        if settings.level == "full":
            found += [RANDOM, *([] if column.facts.keeps_prediction else [FROZEN, ITERATES])]
        if (settings.plants or self._suspected(row, column)) and attack.reaching() is not None:
            found.append(GOALS)
        if settings.plants and not (column.facts.keeps_prediction or attack.needs_data):
            found.append(PREDICTIONS)
        return found

    def _suspected(self, row: Row, column: Column) -> bool:
        """Whether the cell is of an attacker who decides about a defense that none such of its aim hurts.

        Either the defense is strong or they are weak: planted maps tell which.
        """
        deciding = decisive(self.experiment.columns)
        if self.settings.planted is False or not row.derived or column not in deciding:
            return False
        alike = [c for c in deciding if c.facts.keeps_prediction == column.facts.keeps_prediction]
        cells = [self.folder.done(row.label, other.label) for other in alike]
        won = [(cell["measures"].get("joint") or {}).get("value") or 0.0 for cell in cells if cell is not None]
        return bool(won) and max(won) < self.settings.unhurt

    def rows_of(self, row: Row) -> dict[str, str]:
        """The names of what is run for a row, by what it is."""
        kinds = ("how the system answers", f"its maps under {WEIGHTS}")
        return dict(zip(kinds, self.row_names(row), strict=False))

    def cells_of(self, row: Row, column: Column) -> dict[str, str]:
        """The names of what is run for a cell, by what it is."""
        return {name: self.cell(row, column, name) for name in self.names(row, column)}

    def error(self, name: str) -> str | None:
        """The last line of why nothing was found under a name; ``None`` where something was, or nothing was tried."""
        path = self.folder.error(KIND, name, 0)
        if self.read(name) is not None or not path.is_file():
            return None
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]

    def attack(self, row: Row, column: Column) -> Attack | None:
        """The attack of a cell, with its steps raised where they were; ``None`` if nobody can make it again."""
        if not isinstance(column.attack, Attack):
            return None
        steps = raised(self.folder, row, column)
        return column.attack if steps is None else replace(column.attack, steps=steps)  # type: ignore[call-arg]

    def gain(self, row: Row, column: Column, name: str = "steps") -> tuple[Tensor, Tensor] | None:
        """What a cell's attack and a stronger one won of the same inputs, ``[N]`` each; ``None`` if it was not run."""
        found = self.read(self.cell(row, column, name)) if name in self.names(row, column) else None
        if found is None or name in KINDS:
            return None
        won = "joint" if column.facts.keeps_prediction else "success"
        before = self.folder.arrays(row.label, column.label)[won]
        return before[: len(found[won])], found[won]

    @property
    def complete(self) -> bool:
        """Whether every row with a finished cell was probed, every attack run again, or tried, and all raised."""
        for row in self.experiment.rows:
            done = [c for c in self.experiment.columns if self.folder.done(row.label, c.label) is not None]
            names = [self.cell(row, column, name) for column in done for name in self.names(row, column)]
            names += self.row_names(row) if done else []
            if any(self.read(n) is None and not self.folder.error(KIND, n, 0).is_file() for n in names):
                return False
            if any(to_raise(self, row, column) for column in done):
                return False
        return True

    def read(self, name: str) -> dict[str, Tensor] | None:
        """What was found under a name; ``None`` where it is missing, failed or is damaged."""
        try:
            found: dict[str, Tensor] = files.read_tensors(self.folder.chunk(KIND, name, 0))[0]
        except DamagedFileError:
            return None
        return found
