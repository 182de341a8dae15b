"""The audit of a manipulated system: its explanations compared with those of the honest system it was made from.

Every interpreter of the recipe, hardened ones included, explains both models, on inputs that nothing was trained on:
the audit shows the effect on the interpreter that was manipulated, whether it transfers to others, and whether a
hardened one withstands it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import data as data_sets
from .. import files
from ..attacks.manipulation import Manipulation, View
from ..attacks.manipulation.finetuned import HISTORY
from ..door import answer
from ..errors import recorded
from ..features import index_of
from ..interpreters import Interpreter
from ..metrics import SSIM, FeatureFirst, FeatureRank, Fooling, LocationCorrelation, Pearson, SignCorrelation, Spearman
from ..metrics import Entropy as MapEntropy
from ..random_streams import derive
from ..recipe.experiment import Recipe, Row
from ..system import System, on_model
from ..training import Session
from .origins import Origins
from .prepared import Prepared
from .statistics import estimate
from .store import RunFolder

PICTURES = 3
"""How many inputs of each view are stored with their maps."""


def audit(recipe: Recipe, prepared: Prepared, data: data_sets.Data, folder: RunFolder, session: Session) -> int:
    """Audit every manipulated row that is not audited yet; the number of those whose audit is incomplete.

    Processes share the rows.
    """
    rows = [row for row in recipe.rows if row.kind == "manipulation" and row.label in prepared.by_row]
    todo = [row for row in rows if not audited(folder, row)]
    accelerator = session.accelerator
    # All look before any writes: who looked later would take other turns.
    accelerator.wait_for_everyone()
    if todo:
        with session.progress.task("audits", len(todo)) as advance:
            for i, row in enumerate(todo):
                if i % accelerator.num_processes == accelerator.process_index:
                    Audit(recipe, row, prepared, data, folder, session).write()
                advance(1)
    accelerator.wait_for_everyone()
    return sum(not audited(folder, row) for row in rows)


def audited(folder: RunFolder, row: Row) -> bool:
    """Whether a row's audit is stored without errors; the next run repeats one that failed."""
    path = folder.audit(row.label)
    return path.is_file() and not any("error" in entry for entry in folder.read_part(path)["looks"])


@dataclass(frozen=True)
class Audit:
    """One manipulated row.

    Args:
        recipe: the experiment.
        row: the row.
        prepared: all systems of the run.
        data: the data set.
        folder: the run directory.
        session: device and checkpoints.
    """

    recipe: Recipe
    row: Row
    prepared: Prepared
    data: data_sets.Data
    folder: RunFolder
    session: Session

    @property
    def attack(self) -> Manipulation:
        """The manipulation."""
        attack: Manipulation = self.row.settings
        return attack

    def write(self) -> None:
        """Measure and write the audit: arrays first, so that a stored JSON means a complete audit."""
        manipulated, honest = self.prepared.by_row[self.row.label], self.prepared.by_row[self.row.root]
        x, y = self._inputs()
        arrays: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for label, before, after in self._interpreters(honest, manipulated):
            try:
                entries += self._entries(label, before, after, x, y, arrays)
            except Exception as error:
                # If one interpreter cannot explain the model, the others are still audited.
                entries.append({"interpreter": label, "view": "-", "error": recorded(error)})
        path = self.folder.audit(self.row.label)
        files.write_tensors(path.with_suffix(".safetensors"), arrays)
        content = {
            "row": self.row.label,
            "made_of": Origins(self.recipe).audit(self.row.label),
            "aimed": self.row.root,
            "history": self._history(),
            "looks": entries,
            "features": list(self.data.features),
            "hidden": self.attack.hidden,
        }
        self.folder.write_part(path, content, path.with_suffix(".safetensors"))

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """Test inputs, correctly classified or not: a manipulation affects all of them."""
        part = data_sets.take(self.data.test, min(self.recipe.evaluation.images, len(self.data.test)), self.recipe.seed)
        x, y = data_sets.stack(part)
        return x.to(self.session.device), y.to(self.session.device)

    def _interpreters(self, honest: System, manipulated: System) -> list[tuple[str, Interpreter, Interpreter]]:
        """Label, and the interpreter of the honest and of the manipulated model; the manipulated row's own first."""
        interpreters = [(self.row.root, honest.interpreter, manipulated.interpreter)]
        if manipulated.model is honest.model:
            return interpreters  # the interpreter itself was manipulated: nothing can transfer
        for row in self.recipe.rows:
            system = self.prepared.by_row.get(row.label)
            known = row.kind == "manipulation" or row.label == self.row.root
            # A defense may stand on another model, which no manipulated one was made from.
            if system is not None and not known and system.model is honest.model:
                interpreters.append((row.label, system.interpreter, on_model(system.interpreter, manipulated.model)))
        return interpreters

    @torch.no_grad()
    def _entries(
        self, label: str, before: Interpreter, after: Interpreter, x: Tensor, y: Tensor, arrays: dict[str, Tensor]
    ) -> list[dict[str, Any]]:
        """Figures of one interpreter, a dictionary a view; arrays go into ``arrays`` under ``label/view/name``."""
        entries = []
        for name, view in self.attack.views(before, x, y).items():
            measured, examples = self._measured(before, after, view)
            seed, resamples = derive(self.recipe.seed, "audit"), self.recipe.evaluation.bootstrap
            figures = {key: estimate(value, _binary(key), resamples, seed).as_dict() for key, value in measured.items()}
            arrays |= {f"{label}/{name}/{key}": value for key, value in measured.items()}
            arrays |= {f"{label}/{name}/shown_{key}": value for key, value in examples.items()}
            entries.append({"interpreter": label, "view": name, "figures": figures})
        return entries

    def _measured(
        self, before: Interpreter, after: Interpreter, view: View
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Figures of a view, one for each input, and inputs and maps of its first inputs."""
        size, parts = self.recipe.evaluation.batch_size, []
        for start in range(0, len(view.x), size):
            rows = torch.arange(start, min(start + size, len(view.x)), device=view.x.device)
            parts.append(self._chunk(before, after, view.select(rows)))
        figures, examples = (
            {key: torch.cat([part[key] for part in kind]).cpu() for key in kind[0]} for kind in zip(*parts, strict=True)
        )
        return figures, {key: value[:PICTURES] for key, value in examples.items()}

    def _chunk(
        self, before: Interpreter, after: Interpreter, view: View
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        honest, now = view.honest_maps(before), after.explain(view.x, view.explained, native=True)
        figures = {
            "answered": (now.logits.argmax(1) == view.answer).float(),
            "answered_before": (_logits(before.model, view.x).argmax(1) == view.answer).float(),
            "sign_correlation": SignCorrelation()(now.maps, honest),
            "spearman": Spearman()(now.maps, honest),
        }
        figures |= self._hidden(honest, now.maps) if view.x.dim() == 2 else _spatial(honest, now.maps, view)
        if self.attack.fooled is not None:
            figures |= _fooled(self.attack.fooled, honest, now.maps, view)
        return figures, {"x": view.x, "before": honest, "now": now.maps}

    def _hidden(self, before: Tensor, now: Tensor) -> dict[str, Tensor]:
        """The rank of the hidden column before and after the manipulation, and whether it is first."""
        if self.attack.hidden is None:
            return {}
        column = index_of(self.attack.hidden, self.data.features, width=now.shape[1])
        return {
            "rank": FeatureRank(column)(now),
            "rank_before": FeatureRank(column)(before),
            "first": FeatureFirst(column)(now),
            "first_before": FeatureFirst(column)(before),
        }

    def _history(self) -> dict[str, Any] | None:
        """Accuracy and objective by epoch, of an attack that trains."""
        path = self.folder.training / files.digest(self.row.label) / HISTORY
        return files.read_json(path) if path.is_file() else None


def _binary(name: str) -> bool:
    return name.removesuffix("_before") in ("answered", "first", "fooled")


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = answer(model, x)
    return logits


def _fooled(metric: Fooling, before: Tensor, now: Tensor, view: View) -> dict[str, Tensor]:
    """The test loss and whether it is in its success range, before and after; the goal map is that of another class."""
    losses = {"": metric(now, before, view.goal_map), "_before": metric(before, before, view.goal_map)}
    return {f"test_loss{when}": loss for when, loss in losses.items()} | {
        f"fooled{when}": metric.success(loss).float() for when, loss in losses.items()
    }


def _spatial(before: Tensor, now: Tensor, view: View) -> dict[str, Tensor]:
    found = {
        "ssim": SSIM()(now, before),
        "location": LocationCorrelation()(now),
        "location_before": LocationCorrelation()(before),
        "entropy": MapEntropy()(now),
        "entropy_before": MapEntropy()(before),
    }
    if view.goal_map is not None:
        found |= {
            "ssim_goal": SSIM()(now, view.goal_map),
            "ssim_goal_before": SSIM()(before, view.goal_map),
            "pearson_goal": Pearson()(now, view.goal_map),
        }
    return found
