"""Scans of honest, manipulated and repaired models of one recipe: resumable, a file a model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks, files
from .. import data as data_sets
from ..defenses.manipulated import agreement
from ..door import answer
from ..errors import InputError, UnsupportedModelError, at_work, recorded
from ..recipe import check_data
from ..recipe.experiment import Recipe, Row
from ..system import System
from ..training import Session
from .growing import claim
from .origins import Origins
from .prepared import Builder
from .scan_page import write_scans
from .scan_results import place, scanned
from .seeds import again
from .store import RunFolder

GRID = 7
"""Cells a side on which maps are compared with the honest ones."""


def run_scans(recipe: Recipe, out: str | Path, session: Session) -> int:
    """Scan, or go on scanning, the models of a recipe; the number of scans that failed.

    Scanned are interpreters' rows (honest), manipulated rows, and defenses that change the model: of manipulated rows
    (repairs), and of honest ones (controls: what an owner without a bad intention does).
    Everything is trained ``scan.models`` times, under other seeds. Scanners that compare with a trusted model get an
    honest one of one seed more.

    Args:
        recipe: its data, model, rows and ``scan`` section count; attacks do not.
        out: the run directory, the same as for ``robustexplain run``, or a new one.
        session: accelerator and progress.

    Raises:
        InputError: no scanners; a table, where they take images; a classifier that is not trained here, of which there
            is but one.
        RunBusyError: another process writes ``out``.
    """
    if not recipe.scan.scanners:
        raise InputError("scan.scanners: at least one is needed; see robustexplain list scanners")
    if recipe.model.train is None and recipe.scan.models > 1:
        raise InputError("scan.models: the recipe trains no model (model.train), so there is only one of it")
    folder, data = RunFolder(Path(out)), check_data(recipe)
    for label, scanner in recipe.scan.scanners.items():
        checks.kind(data.train[0][0][None], scanner.takes, f"scan.scanners: {label}")
    with folder.held(session.accelerator.is_main_process):
        claim(recipe.named(data.features), folder, data, data.digest, session)
        session.folder, session.sets_aside = folder.training, True
        failed = Scans(recipe, data, folder, session).run()
        if session.accelerator.is_main_process:
            write_scans(recipe, folder)
        session.accelerator.wait_for_everyone()
    return failed


class Scans:
    """The scans of a run.

    Args:
        recipe: the experiment.
        data: the data set.
        folder: the run directory.
        session: accelerator, checkpoints, progress.
    """

    def __init__(self, recipe: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> None:
        self.recipe, self.data, self.folder, self.session = recipe, data, folder, session

    def run(self) -> int:
        """Scan what is not scanned yet; the number of scans that failed."""
        models = self.recipe.scan.models
        with self.session.progress.task("scans of models", models * len(scanned(self.recipe))) as advance:
            failed = 0
            for number in range(models):
                builder = _Late(self, number)
                for row in scanned(builder.recipe):
                    failed += self._row(builder, row)
                    advance(1)
        return failed

    def _row(self, late: _Late, row: Row) -> int:
        path = place(self.folder, row.label, late.number)
        made_of = self._made_of(late, row)
        if path.is_file():
            known = self.folder.read_part(path)
            if known["made_of"] == made_of and not any("error" in s for s in known["scans"].values()):
                return 0
        content = {"row": row.label, "check": str(late.number), "made_of": made_of, **self._scanned(late, row)}
        if self.session.accelerator.is_main_process:
            self.folder.write_part(path, content)
        self.session.accelerator.wait_for_everyone()
        return sum("error" in found for found in content["scans"].values())

    def _made_of(self, late: _Late, row: Row) -> str:
        scan = self.recipe.scan
        return files.digest([Origins(late.recipe).row(row.label), repr(scan.scanners), scan.probe, scan.models])

    def _scanned(self, late: _Late, row: Row) -> dict[str, Any]:
        scanners = self.recipe.scan.scanners
        try:
            system, honest = late.system(row), late.system(late.recipe.row(row.root))
        except Exception as error:
            # If one row cannot be made, the others still are.
            failed = {"error": recorded(error)}
            return {"accuracy": None, "agreement": None, "scans": dict.fromkeys(scanners, failed)}
        test = data_sets.take(self.data.test, min(self.recipe.scan.probe, len(self.data.test)))
        x, y = (part.to(self.session.device) for part in data_sets.stack(test))
        scans = {}
        for label, scanner in scanners.items():
            with at_work(f"{row.label} / {label}"):
                scans[label] = self._one(scanner, system, row)
        return {"accuracy": accuracy(system, x, y), "agreement": likeness(system, honest, x), "scans": scans}

    def _one(self, scanner: Any, system: System, row: Row) -> dict[str, Any]:
        part = self.data.defense if len(self.data.defense) else self.data.train
        try:
            reference = (
                self._reference.system(self._reference.recipe.row(row.root)) if scanner.needs_reference else None
            )
            found = scanner(system, part, reference)
        except UnsupportedModelError as error:
            return {"unsupported": str(error)}
        except Exception as error:
            return {"error": recorded(error)}
        return {"score": found.score, "figures": found.figures}

    @cached_property
    def _reference(self) -> _Late:
        """An honest model that has nothing to do with those scanned."""
        return _Late(self, self.recipe.scan.models)


class _Late:
    """The systems of one seed, trained when the first of them is asked for."""

    def __init__(self, scans: Scans, number: int) -> None:
        self.number, self.scans = number, scans
        recipe = again(scans.recipe, scans.recipe.repeat + number) if number else scans.recipe
        self.recipe: Recipe = recipe.named(scans.data.features)

    @cached_property
    def builder(self) -> Builder:
        """Makes them; the first model is that of ``robustexplain run``."""
        session = self.scans.session
        return Builder(self.recipe, self.scans.data, session.inside(f"scan-{self.number}") if self.number else session)

    def system(self, row: Row) -> System:
        """The system of a row."""
        return self.builder.system(row)


@torch.no_grad()
def accuracy(system: System, x: Tensor, y: Tensor) -> float:
    """Share of ``x`` that the system gets right."""
    return float((answer(system.model, x).argmax(1) == y).float().mean())


@torch.no_grad()
def likeness(system: System, honest: System, x: Tensor) -> float:
    """Mean agreement of the system's maps with the honest ones of the same class."""
    seen = system.interpreter.explain(x)
    return float(agreement(seen.maps, honest.interpreter.explain(x, seen.logits.argmax(1)).maps, GRID).mean())
