"""A run's results without a run: cells whose arrays are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustexplain.evaluation.doubts import Doubts, doubts
from robustexplain.evaluation.page import Page
from robustexplain.evaluation.ranking import Arrays, ranking
from robustexplain.evaluation.results import Results
from robustexplain.evaluation.statistics import estimate
from robustexplain.evaluation.store import RunFolder
from robustexplain.evaluation.words import words_of
from robustexplain.recipe.experiment import AttackFacts, Column, Evaluation, Experiment, Row

RUN = {
    "version": "0", "seed": 0, "data": "d" * 20, "experiment": "e" * 20, "kind": "experiment", "precision": "no",
    "libraries": {"torch": "2"}, "features": [], "classes": ["cat", "dog"], "shape": [1, 8, 8],
}  # fmt: skip


def row(label: str, base: str | None = None) -> Row:
    return Row(label, base or label, label, None, base or label, "interpreter" if base is None else "defense")


def column(label: str, knowledge: Any = "oblivious", name: str = "ADV2", **facts: Any) -> Column:
    control = name in ("Clean", "Noise")
    return Column(label, AttackFacts(name, not control, False, True, control, **facts), knowledge)


def results_of(
    rows: list[Row], columns: list[Column], arrays: Arrays, run: dict[str, Any] | None = None, **evaluation: Any
) -> Results:
    settings = Evaluation(**{"images": 40, "calibration": 40, "bootstrap": 50, **evaluation})
    experiment = Experiment(
        name="made up", rows=tuple(rows), columns=tuple(columns), metrics={}, evaluation=settings, source={}
    )
    cells: dict[tuple[str, str], dict[str, Any] | None] = {}
    for r in rows:
        for c in columns:
            found = arrays.get((r.label, c.label))
            measured = {
                n: estimate(v, True).as_dict() for n, v in (found or {}).items() if v.dim() == 1 and n != "sample"
            }
            words = {"row": r.label, "column": c.label, "knowledge": c.knowledge, "on_successes": {}, "made_of": {}}
            words |= {"against_undefended": {}, "flags": []}
            cells[r.label, c.label] = None if found is None else {"status": "done", "measures": measured, **words}
    return Results(experiment, {**RUN, **(run or {})}, cells, {}, words_of({}))


def wins(*won: int, of: int = 40) -> dict[str, Tensor]:
    """A cell in which these samples fell."""
    joint = torch.zeros(of)
    joint[list(won)] = 1
    return {"sample": torch.arange(of), "joint": joint, "success": torch.ones(of)}


def page_of(results: Results, arrays: Arrays, root: Path, found: Doubts | None = None) -> Page:
    found = doubts(results) if found is None else found
    return Page(results, RunFolder(root), arrays, found, ranking(results, arrays, found), [])
