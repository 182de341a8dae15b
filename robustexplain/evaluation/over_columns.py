"""The worst case of each row: per sample, whether any adversary of any column won."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import files, seals
from ..random_streams import derive
from ..recipe.experiment import Column, Experiment, Row
from .differences import difference, over_seeds_difference
from .seeds import over_all, repeats, stacked
from .statistics import share
from .store import RunFolder

WORST = "worst case"
"""In the table, the column of a row's worst case."""


def write_worst(experiment: Experiment, folder: RunFolder, main: str) -> None:
    """Write every row's worst case; a row without a finished cell of an attack has none.

    Args:
        experiment: rows and columns.
        folder: its directory, with those of its repeats.
        main: the measure that says that an adversary won: ``joint``, or ``joint_correct``.
    """
    made: dict[str, list[dict[str, Tensor]]] = {}
    for row in experiment.rows:
        path, columns = folder.worst(row.label), attackers(experiment)
        several = [found for f in repeats(experiment, folder) if (found := _arrays(f, row, columns, main))]
        if not several or not (known := made_of(folder, row, columns)):
            path.unlink(missing_ok=True)
            continue
        made[row.label] = several
        summary = {
            "row": row.label,
            "main": main,
            "made_of": known,
            "missing": [c.label for c in columns if folder.done(row.label, c.label) is None],
            "measures": _measures(experiment, several),
            "against_undefended": _against(experiment, row, made),
        }
        beside = path.with_suffix(".safetensors")
        files.write_tensors(beside, several[0])
        seals.write(path, summary, beside)


def attackers(experiment: Experiment) -> list[Column]:
    """The columns in which somebody attacks: all but unchanged inputs. Random noise in the ball is an attack, too."""
    return [column for column in experiment.columns if column.facts.name != "Clean"]


def made_of(folder: RunFolder, row: Row, columns: Sequence[Column]) -> dict[str, str]:
    """The content hashes of the arrays of a row's cells, by column."""
    cells = {c.label: folder.done(row.label, c.label) for c in columns}
    return {label: cell["arrays_sha256"] for label, cell in cells.items() if cell is not None}


def read_worst(experiment: Experiment, folder: RunFolder, row: Row) -> dict[str, Any] | None:
    """A row's worst case; ``None`` where it is missing, damaged, or of other cells than those that are there."""
    path = folder.worst(row.label)
    known = seals.read_or_none(path) if path.is_file() else None
    return known if known and known["made_of"] == made_of(folder, row, attackers(experiment)) else None


def _arrays(folder: RunFolder, row: Row, columns: Sequence[Column], main: str) -> dict[str, Tensor]:
    """``sample`` and, for each aim, 1 where any adversary won; NaN where no column says."""
    found = [(c, folder.arrays(row.label, c.label)) for c in columns if folder.done(row.label, c.label) is not None]
    if not found:
        return {}
    aims = {"": found} | {
        name: some
        for name, keeps in (("_forge", False), ("_move", True))
        if (some := [(c, a) for c, a in found if c.facts.keeps_prediction is keeps]) and len(some) < len(found)
    }
    parts = {f"worst{name}": torch.stack([_won(a, main) for _, a in some]) for name, some in aims.items()}
    return {"sample": found[0][1]["sample"], **{name: _most(part) for name, part in parts.items()}}


def _won(arrays: dict[str, Tensor], main: str) -> Tensor:
    return arrays[main if main in arrays else "joint"].float()


def _most(values: Tensor) -> Tensor:
    """The largest over the columns ``[C, N]`` that is not NaN."""
    most = values.nan_to_num(-1).amax(0)
    return torch.where(most < 0, torch.nan, most)


def _measures(experiment: Experiment, several: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    resamples, seed = experiment.evaluation.bootstrap, derive(experiment.seed, "worst")
    names = [name for name in several[0] if name != "sample"]
    if len(several) > 1:
        return {name: over_all(stacked(several, name), True, resamples, seed) for name in names}
    return {name: share(several[0][name]).as_dict() for name in names}


def _against(experiment: Experiment, row: Row, made: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Paired differences to the root's worst case on the same samples."""
    mine, plain = made[row.label], made.get(row.root)
    if row.root == row.label or plain is None or len(plain) != len(mine):
        return {}
    resamples, seed, found = experiment.evaluation.bootstrap, derive(experiment.seed, "worst"), {}
    for name in (n for n in mine[0] if n != "sample" and n in plain[0]):
        if len(mine) > 1:
            pairs = [{"sample": a["sample"], name: a[name] - b[name]} for a, b in zip(mine, plain, strict=True)]
            found[name] = over_seeds_difference(stacked(pairs, name), resamples, seed).as_dict()
        else:
            found[name] = difference(mine[0][name], plain[0][name], True, resamples, seed).as_dict()
    return found
