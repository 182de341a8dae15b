"""What the stored scans of a run say: AUC over models, shares detected, as data and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..defenses.manipulated import p_values
from ..recipe.experiment import Recipe, Row
from .statistics import Estimate, separation
from .store import RunFolder, slug

TABLE = "scans.csv"

Kind = Literal["honest", "control", "suspect"]
"""Whose models are scanned."""


def scanned(recipe: Recipe) -> list[Row]:
    """The rows that are scanned."""
    return [row for row in recipe.rows if row.kind != "defense" or getattr(row.settings, "layer", None) == "model"]


def place(folder: RunFolder, row: str, number: int) -> Path:
    """The JSON file of the scans of a row's model of one seed."""
    return folder.root / "scans" / f"{slug(row)}--{number}.json"


@dataclass(frozen=True)
class Finding:
    """What a scanner finds of the models of one row.

    Args:
        row: label.
        kind: ``honest``; ``control``, honest and trained on by a defense; or ``suspect``, manipulated or repaired.
        scanner: label.
        models: how many were scanned.
        accuracy: their mean accuracy.
        agreement: mean agreement of their maps with the honest ones.
        auc: of their scores against the honest models'; ``None`` for an honest row.
        against_controls: of a suspect row's scores against those of the controls; ``None`` where there are none.
        detected: share whose p-value reaches the alarm; of an honest row, each against the others.
        scores: of its models ``[models]``.
        honest: of the honest models that they are set against.
    """

    row: str
    kind: Kind
    scanner: str
    models: int
    accuracy: float
    agreement: float
    auc: Estimate | None
    against_controls: Estimate | None
    detected: float
    scores: tuple[float, ...]
    honest: tuple[float, ...]


def read_results(recipe: Recipe, folder: RunFolder) -> list[Finding]:
    """What the stored scans say, in the recipe's order; rows whose models were not all scanned have fewer."""
    found, rows = [], scanned(recipe)
    stored = {row.label: [_read(folder, row.label, number) for number in range(recipe.scan.models)] for row in rows}
    for row in rows:
        parts = stored[row.label]
        kind = kind_of(row)
        controls = [o for o in rows if kind_of(o) == "control" and o.root == row.root] if kind == "suspect" else []
        for label in recipe.scan.scanners:
            scores, level = _scores(parts, label), _scores(stored[row.root], label)
            trained = _scores([part for other in controls for part in stored[other.label]], label)
            if not len(scores) or not len(level):
                continue
            some = [p for p in parts if p is not None and "score" in p["scans"].get(label, {})]
            accuracies, agreements = (
                float(torch.tensor([p[key] for p in some]).mean()) for key in ("accuracy", "agreement")
            )
            area = separation(level, scores) if row.derived else None
            against = separation(trained, scores, recipe.scan.models) if len(trained) else None
            if row.derived:
                values = p_values(level, scores)
            else:
                values = torch.cat([p_values(_without(level, i), level[i : i + 1]) for i in range(len(level))])
            share = float((values <= recipe.scan.alarm).double().mean())
            finding = Finding(
                row=row.label,
                kind=kind,
                scanner=label,
                models=len(scores),
                accuracy=accuracies,
                agreement=agreements,
                auc=area,
                against_controls=against,
                detected=share,
                scores=tuple(scores.tolist()),
                honest=tuple(level.tolist()),
            )
            found.append(finding)
    return found


def kind_of(row: Row) -> Kind:
    """Whose models a row has; a control is what an owner without a bad intention does."""
    if not row.derived:
        return "honest"
    return "control" if row.kind == "defense" and row.base == row.root else "suspect"


def _without(values: Tensor, i: int) -> Tensor:
    # A single honest model has no others: it is set against itself, which raises no alarm.
    return torch.cat([values[:i], values[i + 1 :]]) if len(values) > 1 else values


def _read(folder: RunFolder, row: str, number: int) -> dict[str, Any] | None:
    path = place(folder, row, number)
    return folder.read_part(path) if path.is_file() else None


def _scores(parts: list[dict[str, Any] | None], scanner: str) -> Tensor:
    found = [part["scans"].get(scanner, {}).get("score") for part in parts if part is not None]
    return torch.tensor([score for score in found if score is not None], dtype=torch.float64)


HEAD = ("row", "scanner", "models", "accuracy", "agreement_with_honest", "auc", "auc_low", "auc_high", "detected",
        "auc_controls", "auc_controls_low", "auc_controls_high")  # fmt: skip


def as_csv(findings: list[Finding]) -> str:
    """A line a row and scanner."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(HEAD)
    for f in findings:
        figures = [f"{f.accuracy:.6g}", f"{f.agreement:.6g}", *_three(f.auc), f"{f.detected:.6g}"]
        out.writerow([f.row, f.scanner, f.models, *figures, *_three(f.against_controls)])
    return text.getvalue()


def _three(area: Estimate | None) -> list[str]:
    return ["", "", ""] if area is None else [f"{v:.6g}" for v in (area.value, area.low, area.high)]
