"""The sanity checks of a recipe's interpreters, in its run directory: resumable, one file a check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data as data_sets
from .. import files
from ..data.base import labels_of
from ..door import answer
from ..errors import InputError, UnknownNameError, UnsupportedModelError, recorded
from ..evaluation.growing import claim
from ..evaluation.origins import Origins
from ..evaluation.prepared import Builder, classifier
from ..evaluation.store import RunFolder
from ..interpreters import Interpreter
from ..models.randomise import LayerGroup, stages
from ..random_streams import derive, generator
from ..recipe import check_data
from ..recipe.experiment import Recipe, Row
from ..training import Session
from .checks import CHECKS, Check, Outcome, cascading, independent, other_labels, shifted
from .page import write_page


@dataclass(frozen=True)
class Relabelled(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A data set whose labels were shuffled among its samples."""

    inner: Any
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inner[index][0], self.labels[index]


def shuffled(data: data_sets.Data, seed: int) -> data_sets.Data:
    """The same data with the labels of the parts that anything is trained on shuffled."""
    digest = files.digest([data.digest, "random labels", seed])
    return replace(data, digest=digest, train=_relabelled(data.train, seed), defense=_relabelled(data.defense, seed))


def _relabelled(part: Any, seed: int) -> Relabelled:
    labels = labels_of(part)
    order = torch.randperm(len(labels), generator=generator(seed, "random labels")).tolist()
    return Relabelled(part, tuple(labels[i] for i in order))


def run_sanity(recipe: Recipe, out: str | Path, session: Session, checks: Sequence[str] = ()) -> int:
    """Run or resume the sanity checks of a recipe's rows; the number of those that failed.

    Checked are interpreters, and defenses that change the interpreter or the model; not those that add a detector
    alone, and not manipulated systems, which are audited.

    Args:
        recipe: its data, model, rows and ``sanity`` section count; attacks do not.
        out: the run directory, the same as for ``robustexplain run``, or a new one.
        session: accelerator and progress.
        checks: which; default all (``labels`` only if the recipe trains its model).

    Raises:
        UnknownNameError: a check that there is not.
        InputError: data or weights are missing; ``labels`` is asked for and the recipe trains no model.
        RunBusyError: another process writes ``out``.
    """
    for name in checks:
        if name not in CHECKS:
            raise UnknownNameError("check", name, CHECKS)
    if "labels" in checks and recipe.model.train is None:
        raise InputError("the labels check trains the model on random labels: the recipe has no model.train")
    folder = RunFolder(Path(out))
    data = check_data(recipe)
    named = recipe.named(data.features)
    with folder.held(session.accelerator.is_main_process):
        return _run(named, data, folder, session, checks)


def _run(named: Recipe, data: data_sets.Data, folder: RunFolder, session: Session, checks: Sequence[str]) -> int:
    claim(named, folder, data, data.digest, session)
    session.folder, session.sets_aside = folder.training, True
    wanted = [c for c in CHECKS if not checks or c in checks]
    if named.model.train is None:
        wanted = [c for c in wanted if c != "labels"]
    runner = _Runner(named, data, folder, session)
    failed = sum(runner.run(row, check) for check in wanted for row in named.rows if _may_change_maps(row))
    if session.accelerator.is_main_process:
        write_page(named, folder)
    session.accelerator.wait_for_everyone()
    return failed


def _may_change_maps(row: Row) -> bool:
    if row.kind == "defense":
        return getattr(row.settings, "layer", None) != "detector"
    return row.kind == "interpreter"


class _Runner:
    """The systems and images that the checks share, computed when first needed."""

    def __init__(self, recipe: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> None:
        self.recipe, self.data, self.folder, self.session = recipe, data, folder, session
        self.systems, self.origins = Builder(recipe, data, session), Origins(recipe)
        if session.accelerator.is_main_process:
            folder.same_weights(self.systems.weights)
        count = min(recipe.sanity.images, len(data.test))
        x, _ = data_sets.stack(data_sets.take(data.test, count))
        self.x = x.to(session.device)
        self.layers: dict[nn.Module, list[LayerGroup]] = {}
        self.random: tuple[Builder, float] | None = None

    def run(self, row: Row, check: Check) -> bool:
        """Run one check of one row unless it is stored; whether it failed."""
        path = self.folder.sanity(row.label, check)
        known = self.folder.read_part(path) if path.is_file() else {"status": "failed"}
        if known["status"] != "failed" and known["settings"] == asdict(self.recipe.sanity):
            return False
        summary: dict[str, Any] = {"status": "done", "row": row.label, "check": check, "note": ""}
        outcomes: list[Outcome] = []
        try:
            interpreter = self._interpreter(row)
            if interpreter is None:
                return False
            steps = len(self._stages(interpreter.model)) + 1 if check in ("cascading", "independent") else 1
            with self.session.progress.task(f"{row.label}: {check}", steps) as step:
                for outcome in self._outcomes(row, interpreter, check):
                    outcomes.append(outcome)
                    step(1)
            if check == "labels" and self.random is not None:
                summary["note"] = f"training accuracy on random labels {self.random[1]:.1%}"
        except UnsupportedModelError as error:
            summary |= {"status": "unsupported", "note": str(error)}
        except Exception as error:
            # If one method fails, the others still run.
            summary |= {"status": "failed", "note": recorded(error)}
        if self.session.accelerator.is_main_process:
            self._write(path, summary, outcomes)
        return bool(summary["status"] == "failed")

    def _outcomes(self, row: Row, interpreter: Interpreter, check: Check) -> Iterator[Outcome]:
        settings, seed = self.recipe.sanity, derive(self.recipe.seed, "sanity")
        model = interpreter.model
        with torch.no_grad():
            target = answer(model, self.x).argmax(1)
        if check == "cascading":
            yield from cascading(interpreter, self.x, target, self._stages(model), seed)
        elif check == "independent":
            yield from independent(interpreter, self.x, target, self._stages(model), seed)
        elif check == "shift":
            yield shifted(interpreter, self.x, target, settings.shift)
        else:
            yield other_labels(interpreter, self._on_random_labels().system(row).interpreter, self.x, target)

    def _interpreter(self, row: Row) -> Interpreter | None:
        """The row's interpreter; ``None`` where it is the one of the row below, on the same model."""
        own = self.systems.system(row).interpreter
        below = self.systems.system(self.recipe.row(row.base)).interpreter
        return None if row.derived and own is below else own

    def _stages(self, model: nn.Module) -> list[LayerGroup]:
        if model not in self.layers:
            self.layers[model] = stages(model, self.x, self.recipe.sanity.stages)
        return self.layers[model]

    def _on_random_labels(self) -> Builder:
        if self.random is None:
            train = self.recipe.model.train
            assert train is not None  # the check is not run otherwise
            epochs = self._label_epochs()
            settings = replace(self.recipe.model, train=replace(train, epochs=epochs))
            data = shuffled(self.data, self.recipe.seed)
            inner = self.session.inside(f"random-labels-{epochs}")
            model = classifier(settings, data, self.recipe.seed, inner, "classifier on random labels")
            self.random = Builder(self.recipe, data, inner, model), _accuracy(model, data.train, self.session.device)
        return self.random[0]

    def _label_epochs(self) -> int:
        train = self.recipe.model.train
        return self.recipe.sanity.label_epochs or 4 * (train.epochs if train else 0)

    def _write(self, path: Path, summary: dict[str, Any], outcomes: list[Outcome]) -> None:
        arrays: dict[str, Tensor] = {}
        for outcome in outcomes:
            arrays |= {f"{outcome.stage}/{name}": value for name, value in outcome.similarities.items()}
            arrays[f"{outcome.stage}/maps"] = outcome.maps[: self.recipe.sanity.pictures]
        if arrays:
            arrays["x"] = self.x[: self.recipe.sanity.pictures].cpu()
            files.write_tensors(path.with_suffix(".safetensors"), arrays)
        stages_run = [{"stage": outcome.stage, "layer": outcome.layer} for outcome in outcomes]
        words = {"stages": stages_run, "settings": asdict(self.recipe.sanity)}
        content = {**summary, **words, "made_of": self.origins.row(summary["row"])}
        self.folder.write_part(path, content, path.with_suffix(".safetensors") if arrays else None)


@torch.no_grad()
def _accuracy(model: nn.Module, part: Any, device: torch.device, most: int = 1000) -> float:
    x, y = data_sets.stack(part, range(min(most, len(part))))
    right = [answer(model, a.to(device)).argmax(1).cpu() == b for a, b in zip(x.split(64), y.split(64), strict=True)]
    return float(torch.cat(right).float().mean())
