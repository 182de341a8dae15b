"""The matrix of the user's own systems and attacks: one call from Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import checks, files
from ..attacks import Attack
from ..data import Data, Item, take
from ..data.base import Digest
from ..door import admit, answer
from ..errors import InputError, RobustExplainWarning
from ..fingerprint import fingerprint
from ..metrics import Metric
from ..recipe.auditing import Auditing
from ..recipe.experiment import Column, Evaluation, Experiment, Knowledge, Row
from ..registry import METRICS
from ..renamed import KNOWLEDGE, renamed
from ..system import System
from ..training import Session
from .calibration import calibrator
from .growing import claim
from .judged import Chosen, choose
from .matrix import Matrix, conclude, finished
from .own_data import content_digest, data_of, pool_digest
from .prepared import Prepared, save
from .results import Results
from .store import RunFolder
from .words import words_of


class Defended(NamedTuple):
    """A system that stands on another one: a defense of it. A plain pair does as well.

    Args:
        system: what is deployed.
        of: label of the system that it defends, with which it is compared, and for which an adversary takes it who
            does not know of the defense.
    """

    system: System
    of: str


Systems: TypeAlias = Mapping[str, System | Defended | tuple[System, str]]
Attacks: TypeAlias = Mapping[str, Attack | tuple[Attack, Knowledge]]


def evaluate(
    systems: Systems,
    attacks: Attacks,
    data: Data | str | tuple[Tensor, Tensor] | Dataset[Item],
    *,
    out: str | Path,
    metrics: Sequence[str | Metric] = ("l1", "l2", "iou"),
    evaluation: Evaluation | None = None,
    audit: Auditing | None = None,
    about: str = "",
    seed: int = 0,
    session: Session | None = None,
) -> Results:
    """Judge every system under every attack; the run directory ``out`` then holds cells, table and report.

    Killed or stopped, the same call goes on where it was; with more systems, attacks or metrics, or others under the
    same label, what still holds is kept. It is what ``robustexplain run`` does with a recipe's
    components; ``robustexplain report`` works on the directory.

    Args:
        systems: what is deployed, by label; with ``(system, label)`` a defense of the system of that label.
        attacks: attacks by label; with a word, what the adversary knows: ``oblivious`` (default), ``transfer`` (crafts
            on the undefended system) or ``adaptive``.
        data: tensors ``(x, y)``, a map-style data set of ``(x, label)``, or a registered data set or its name, of which
            the test part is judged.
        out: the run directory.
        metrics: registered names, or metrics of a kind that a cell can measure.
        evaluation: how many inputs are judged, and how.
        audit: how cells are checked before they are believed.
        about: what the report says of it.
        seed: of goals and intervals.
        session: accelerator and progress. Systems stay on the device where they are.

    Returns:
        What the directory holds: ``results.measure(row, column, "joint")`` is an estimate with its interval.

    Raises:
        InputError: bad systems, attacks, data or metrics; no input that every undefended classifier gets right.
        RunMismatchError: ``out`` stands on another foundation: other data, seed, or ways to judge.
        RunBusyError: another process writes ``out``.
    """
    _check_mappings(systems, attacks)
    session, folder = session or Session(), RunFolder(Path(out))
    by_row, rows = _rows(systems)
    columns, measured = _columns(attacks), _metrics(metrics)
    device = _device(by_row)
    loaded = data_of(data, lambda x: _classes(by_row, x.to(device)))
    _check_data(columns, loaded, _classes(by_row, loaded.test[0][0][None].to(device)))
    settings = evaluation or Evaluation()
    if lines := settings.problems("tables" if len(loaded.shape) == 1 else "images", loaded.name):
        raise InputError("\n".join(lines))
    roots = {row.root for row in rows}
    models = list({id(by_row[label].model): by_row[label].model for label in by_row if label in roots}.values())
    made_of = files.digest([loaded.digest, settings.entry, seed, [fingerprint(model) for model in models]])
    chosen = choose(models, loaded, settings, seed, device)
    if loaded.digest:  # without one, nothing tells whether they were chosen from the same data
        chosen = folder.judged(made_of, lambda: chosen)
    identity = _digests(loaded, chosen, columns, settings, seed)
    experiment = _experiment(folder, about, seed, by_row, rows, columns, measured, settings, *identity)
    experiment = replace(experiment, audit=audit or Auditing())
    prepared = Prepared(by_row, {label: by_row[label].without_detector() for label in roots})
    failed = _fill(experiment, folder, session, prepared, loaded, chosen, made_of, device)
    if failed:
        warnings.warn(f"{failed} cells failed; {folder.root} says which and why", RobustExplainWarning, stacklevel=2)
    return Results.read(folder)


def _fill(
    experiment: Experiment,
    folder: RunFolder,
    session: Session,
    prepared: Prepared,
    data: Data,
    chosen: Chosen,
    made_of: str,
    device: torch.device,
) -> int:
    """Fill the run directory; the number of cells that failed."""
    # Whatever the classifiers get right, the same data have the same digest.
    wanted = min(experiment.evaluation.images, len(data.test))
    some, failed = list(take(data.test, wanted, experiment.seed).indices), 0
    with folder.held(session.accelerator.is_main_process):
        claim(experiment, folder, data, content_digest(data, some), session)
        if session.accelerator.is_main_process:
            folder.note_judged(made_of, chosen)
        if not finished(experiment, folder):
            if session.accelerator.is_main_process:
                save(experiment, prepared, folder, session)
            failed = Matrix(experiment, folder, session, prepared, data, chosen, device).fill()
        conclude(experiment, folder, session, failed)
    return failed


def _check_mappings(systems: object, attacks: object) -> None:
    for what, given in (("systems", systems), ("attacks", attacks)):
        if not isinstance(given, Mapping):
            raise InputError(f"{what} must be a mapping of labels, such as {{'mine': ...}}, got {type(given).__name__}")


def _digests(
    data: Data, chosen: Chosen, columns: Sequence[Column], settings: Evaluation, seed: int
) -> tuple[str, str | None]:
    """What identifies the judged inputs, and the adversary's own where attacks are fitted on data without a digest."""
    asking = not data.digest and any(column.attack.needs_data for column in columns)
    known = [chosen, content_digest(data, [*chosen.judged, *chosen.beyond])]
    if not data.digest and settings.calibration:
        # Of other parts: the inputs that rows are calibrated on, and what the changes of tables know of columns.
        made = calibrator(data, settings, chosen.judged, chosen.beyond, seed, torch.device("cpu"))
        known.append([Digest(draws.x).hex() for draws in made.draws] if made.part == "defense" else [])
        known.append([fingerprint(change) for change in made.changes])
    return files.digest(known), pool_digest(data, settings.pool, seed) if asking else None


def _rows(systems: Systems) -> tuple[dict[str, System], tuple[Row, ...]]:
    if not systems:
        raise InputError("evaluate needs at least one system")
    found = {label: value if isinstance(value, tuple) else (value, label) for label, value in systems.items()}
    for label, pair in found.items():
        if len(pair) != 2 or not isinstance(pair[0], System):
            raise InputError(f"systems[{label!r}] must be a System, or a System and a label, got {systems[label]!r}")
        if pair[1] not in found:
            raise InputError(f"systems[{label!r}] stands on {pair[1]!r}, which is none of {', '.join(found)}")
        checks.evaluating(pair[0].model)
    rows = []
    for label, (system, base) in found.items():
        kind: Literal["interpreter", "defense"] = "interpreter" if base == label else "defense"
        rows.append(Row(label, base, type(system.interpreter).__name__, None, _root(label, found), kind))
    return {label: system for label, (system, _) in found.items()}, tuple(rows)


def _root(label: str, found: Mapping[str, tuple[System, str]]) -> str:
    passed = [label]
    while found[passed[-1]][1] != passed[-1]:
        below = found[passed[-1]][1]
        if below in passed:
            raise InputError(f"systems stand on each other in a circle: {', '.join(passed)}")
        passed.append(below)
    return passed[-1]


def _columns(attacks: Attacks) -> tuple[Column, ...]:
    if not attacks:
        raise InputError("evaluate needs at least one attack")
    columns = []
    for label, value in attacks.items():
        attack, knowledge = value if isinstance(value, tuple) else (value, None)
        if not isinstance(attack, Attack):
            raise InputError(f"attacks[{label!r}] must be an Attack, or an Attack and a word, got {value!r}")
        if knowledge is None:
            knowledge = "adaptive" if attack.knows_defense else "oblivious"
        if knowledge not in get_args(Knowledge):
            hint = renamed(knowledge, KNOWLEDGE)
            raise InputError(f"attacks[{label!r}]: {knowledge!r} is none of {', '.join(get_args(Knowledge))}{hint}")
        columns.append(Column(label, attack, knowledge))
    return tuple(columns)


def _metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for given in metrics:
        metric = METRICS.get(given).build() if isinstance(given, str) else given
        if not isinstance(metric, Metric) or type(metric).of_cell is Metric.of_cell:
            raise InputError(f"metrics: {given!r} is no metric that a cell can measure")
        known = [entry.name for entry in METRICS if entry.build is type(metric)]
        name = known[0] if known else type(metric).__name__
        if name in found:
            raise InputError(f"metrics: {name} stands there twice")
        found[name] = metric
    if "iou" not in found:
        found["iou"] = METRICS.get("iou").build()
    return found


def _device(by_row: Mapping[str, System]) -> torch.device:
    tensors = {label: [*s.model.parameters(), *s.model.buffers()] for label, s in by_row.items()}
    devices = {label: found[0].device for label, found in tensors.items() if found}
    if len(set(devices.values())) > 1:
        raise InputError(f"systems must be on one device, got {devices}")
    return next(iter(devices.values()), torch.device("cpu"))


@torch.no_grad()
def _classes(by_row: Mapping[str, System], x: Tensor) -> int:
    """How many classes the classifiers tell apart."""
    for system in by_row.values():
        admit(system.model, x)
    counts = {label: answer(system.model, x).shape[1] for label, system in by_row.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"classifiers must have the same classes, got {counts}")
    return int(next(iter(counts.values())))


def _check_data(columns: Sequence[Column], data: Data, classes: int) -> None:
    if data.num_classes > classes:
        raise InputError(f"{data.name} has {data.num_classes} classes, and the classifiers tell {classes} apart")
    needing = [column.label for column in columns if column.attack.needs_data]
    if needing and not len(data.defense) + len(data.train):
        raise InputError(
            f"attacks[{needing[0]!r}] needs inputs of the adversary's own, which nobody is judged on: hand in a data "
            "set with a defense or a train part (robustexplain.data.load, or a robustexplain.data.Data)"
        )


def _experiment(
    folder: RunFolder,
    about: str,
    seed: int,
    by_row: Mapping[str, System],
    rows: tuple[Row, ...],
    columns: tuple[Column, ...],
    metrics: dict[str, Metric],
    evaluation: Evaluation,
    inputs: str,
    pool: str | None,
) -> Experiment:
    """The experiment; its ``source`` is all that a report needs, and a hash of all that decides the results."""
    source = {
        "about": about,
        "seed": seed,
        "rows": [{f.name: getattr(row, f.name) for f in fields(row) if f.name != "settings"} for row in rows],
        "columns": [
            {"label": c.label, "attack": asdict(c.facts), "knowledge": c.knowledge, "goal_map": c.goal_map}
            for c in columns
        ],
        "metrics": list(metrics),
        "words": {name: list(words) for name, words in words_of(metrics).items()},
        "evaluation": evaluation.entry,
        "judged": inputs,
        **({} if pool is None else {"pool": pool}),
        "systems": {label: fingerprint(system) for label, system in by_row.items()},
        "attacks": {c.label: {**_settings(c.attack), "hash": fingerprint(c.attack)} for c in columns},
        "measured": {name: fingerprint(metric) for name, metric in metrics.items()},
    }
    return Experiment(
        name=folder.root.name,
        about=about,
        seed=seed,
        rows=rows,
        columns=columns,
        metrics=metrics,
        evaluation=evaluation,
        source=source,
    )


def _settings(component: Any) -> dict[str, Any]:
    """A component's plain fields, for people."""
    found = {f.name: getattr(component, f.name) for f in fields(component)}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (bool, int, str))} | {
        name: repr(value) for name, value in found.items() if isinstance(value, float)
    }
