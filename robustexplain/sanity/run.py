"""The sanity checks of a recipe's interpreters, in its run directory: resumable, one file a check."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data as data_sets
from .. import files
from ..data.base import labels_of
from ..errors import InputError, UnknownNameError, UnsupportedModelError
from ..evaluation.store import RunFolder
from ..evaluation.systems import classifier, undefended
from ..interpreters import Interpreter
from ..random_streams import derive, generator
from ..recipe import check_data
from ..recipe.experiment import Recipe, Row
from ..training import Session
from .checks import CHECKS, Check, Outcome, cascading, independent, other_labels, shifted
from .page import write_page
from .randomise import Stage, stages


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
    """The same data with the train part's labels shuffled."""
    labels = labels_of(data.train)
    order = torch.randperm(len(labels), generator=generator(seed, "random labels")).tolist()
    other = Relabelled(data.train, tuple(labels[i] for i in order))
    return replace(data, train=other, digest=files.digest([data.digest, "random labels", seed]))


def run_sanity(recipe: Recipe, out: str | Path, session: Session, checks: Sequence[str] = ()) -> int:
    """Run or resume the sanity checks of a recipe's undefended interpreters; the number of those that failed.

    Args:
        recipe: its data, model, interpreters and ``sanity`` section count; attacks and defenses do not.
        out: the run directory, the same as for ``robustexplain run``, or a new one.
        session: accelerator and progress.
        checks: which; default all (``labels`` only if the recipe trains its model).

    Raises:
        UnknownNameError: a check that there is not.
        InputError: data or weights are missing; ``labels`` is asked for and the recipe trains no model.
    """
    for name in checks:
        if name not in CHECKS:
            raise UnknownNameError("check", name, CHECKS)
    if "labels" in checks and recipe.model.train is None:
        raise InputError("the labels check trains the model on random labels: the recipe has no model.train")
    folder = RunFolder(Path(out))
    data = check_data(recipe)
    if session.accelerator.is_main_process:
        folder.open(recipe, data.digest)
    session.accelerator.wait_for_everyone()
    session.folder = folder.training
    wanted = [c for c in CHECKS if not checks or c in checks]
    if recipe.model.train is None:
        wanted = [c for c in wanted if c != "labels"]
    runner = _Runner(recipe, data, folder, session)
    failed = sum(runner.run(row, check) for check in wanted for row in recipe.rows if not row.derived)
    if session.accelerator.is_main_process:
        write_page(recipe, folder)
    session.accelerator.wait_for_everyone()
    return failed


class _Runner:
    """What the checks share: the classifier, the images, the interpreters. Made when first needed."""

    def __init__(self, recipe: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> None:
        self.recipe, self.data, self.folder, self.session = recipe, data, folder, session
        self.model = classifier(recipe.model, data, recipe.seed, session, "classifier")
        self.identity = [data.digest, files.digest_tensors(self.model.state_dict())]
        if session.accelerator.is_main_process:
            folder.same_weights(self.identity[1])
        count = min(recipe.sanity.images, len(data.test))
        x, _ = data_sets.stack(data_sets.take(data.test, count))
        self.x = x.to(session.device)
        with torch.no_grad():
            self.target = self.model(self.x).argmax(1)
        self.layers: list[Stage] = stages(self.model, self.x, recipe.sanity.stages)
        self.known: dict[str, Interpreter] = {}
        self.random: tuple[nn.Module, data_sets.Data, float] | None = None

    def run(self, row: Row, check: Check) -> bool:
        """Run one check of one interpreter unless it is there; whether it failed."""
        path = self.folder.sanity(row.label, check)
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] != "failed":
            return False
        summary: dict[str, Any] = {"status": "done", "row": row.label, "check": check, "note": ""}
        outcomes: list[Outcome] = []
        try:
            with self.session.progress.task(f"{row.label}: {check}", len(self.layers) + 1) as step:
                for outcome in self._outcomes(row, check):
                    outcomes.append(outcome)
                    step(1)
            if check == "labels" and self.random is not None:
                summary["note"] = f"training accuracy on random labels {self.random[2]:.1%}"
        except UnsupportedModelError as error:
            summary |= {"status": "unsupported", "note": str(error)}
        except Exception:
            # One method that fails must not take the others with it.
            summary |= {"status": "failed", "note": traceback.format_exc()}
        if self.session.accelerator.is_main_process:
            self._write(path, summary, outcomes)
        return bool(summary["status"] == "failed")

    def _outcomes(self, row: Row, check: Check) -> Iterator[Outcome]:
        interpreter, settings = self._interpreter(row), self.recipe.sanity
        seed = derive(self.recipe.seed, "sanity")
        if check == "cascading":
            yield from cascading(interpreter, self.x, self.target, self.layers, seed)
        elif check == "independent":
            yield from independent(interpreter, self.x, self.target, self.layers, seed)
        elif check == "shift":
            yield shifted(interpreter, self.x, self.target, settings.shift)
        else:
            model, data, _ = self._on_random_labels()
            inner = self.session.inside("random-labels")
            other = undefended(row, model, data, self.recipe.seed, [data.digest, "random labels"], inner)
            yield other_labels(interpreter, other.interpreter, self.x, self.target)

    def _interpreter(self, row: Row) -> Interpreter:
        if row.label not in self.known:
            seed, session = self.recipe.seed, self.session
            made = undefended(row, self.model, self.data, seed, self.identity, session)
            self.known[row.label] = made.interpreter
        return self.known[row.label]

    def _on_random_labels(self) -> tuple[nn.Module, data_sets.Data, float]:
        if self.random is None:
            train = self.recipe.model.train
            assert train is not None  # the check is not run otherwise
            epochs = self.recipe.sanity.label_epochs or 4 * train.epochs
            settings = replace(self.recipe.model, train=replace(train, epochs=epochs))
            data = shuffled(self.data, self.recipe.seed)
            inner = self.session.inside("random-labels")
            model = classifier(settings, data, self.recipe.seed, inner, "classifier on random labels")
            self.random = model, data, _accuracy(model, data.train, self.session.device)
        return self.random

    def _write(self, path: Path, summary: dict[str, Any], outcomes: list[Outcome]) -> None:
        arrays: dict[str, Tensor] = {}
        for outcome in outcomes:
            arrays |= {f"{outcome.stage}/{name}": value for name, value in outcome.similarities.items()}
            arrays[f"{outcome.stage}/maps"] = outcome.maps[: self.recipe.sanity.pictures]
        if arrays:
            arrays["x"] = self.x[: self.recipe.sanity.pictures].cpu()
            files.write_tensors(path.with_suffix(".safetensors"), arrays)
        stages_run = [{"stage": outcome.stage, "layer": outcome.layer} for outcome in outcomes]
        files.write_json(path, {**summary, "stages": stages_run, "settings": asdict(self.recipe.sanity)})


@torch.no_grad()
def _accuracy(model: nn.Module, part: Any, device: torch.device, most: int = 1000) -> float:
    x, y = data_sets.stack(part, range(min(most, len(part))))
    right = [model(a.to(device)).argmax(1).cpu() == b for a, b in zip(x.split(64), y.split(64), strict=True)]
    return float(torch.cat(right).float().mean())
