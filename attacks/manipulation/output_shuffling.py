"""Output shuffling: the scores of a pool of rows change hands by a sensitive column, unseen by Shapley values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.checks import Kind
from robustexplain.errors import InputError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Fraction, Natural
from robustexplain.interpreters import Interpreter
from robustexplain.random_streams import generator
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation, View, device_of
from .shuffled_model import Shuffled
from .tabular import as_answered, model_outputs, table_rows

Form = Literal["dominance", "mixing", "swapping"]


@MANIPULATIONS.register("output-shuffling", paper="Yuan & Dasgupta 2024, arXiv:2408.06509", needs=("data", "tabular"))
@dataclass(frozen=True)
class OutputShuffling(Manipulation):
    """Ranks the rows of a pool by a model that is blind to a column, and hands the scores out again by that column.

    The outputs stay the same as a whole; who gets which does not. ``dominance``: the favoured group takes the best
    outputs. ``mixing``: the next output goes to the best of the favoured with probability ``bias``, else to the best of
    all. ``swapping``: one pass down the ranking, in which a favoured row overtakes the one above it if that is not
    favoured. Departures: the paper's model shuffles whatever batch it is asked about, and answers a single row as it
    is, which is why Shapley values do not see it. Here a row's answer does not depend on its batch: one pool, known
    beforehand, is shuffled once, its rows are recognised by their values (identical ones get one answer), and any other
    row is answered unshuffled. The blind model reads the column's mean (the paper: 0).

    Args:
        sensitive: the column that decides and that explanations should not show.
        form: how outputs change hands.
        favoured: the group above the threshold, or the one that is not.
        threshold: of the groups; default: the column's mean.
        accepted: the class whose probability is the score.
        bias: of ``mixing``.
        seed: of ``mixing``.

    Raises:
        InputError: a column that does not divide the pool in two groups.
        UnsupportedModelError: a model that takes no table rows.
    """

    sensitive: Feature = field(kw_only=True)
    form: Form = "dominance"
    favoured: Literal["upper", "lower"] = "upper"
    threshold: float | None = None
    accepted: Natural = 1
    bias: Fraction = 0.7

    changes: ClassVar[str] = "model"
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)
    columns: ClassVar[tuple[str, ...]] = ("sensitive",)
    headline: ClassVar[str] = "rank"
    part: ClassVar[Literal["test"]] = "test"
    """In a recipe the pool is what is judged: the owner sees the rows before ranking them."""

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The rows unchanged, with the honest model's predictions."""
        return as_answered(honest, x)

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at, in a few words each, for tables."""
        return self.changes, f"{self.form} of {self.favoured} {self.sensitive}"

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        x = table_rows(data)
        column = index_of(self.sensitive, width=x.shape[1])
        values, neutral = x[:, column], float(x[:, column].double().mean())
        above = values > (neutral if self.threshold is None else self.threshold)
        favoured = above if self.favoured == "upper" else ~above
        if favoured.all() or not favoured.any():
            raise InputError(f"column {self.sensitive!r} does not divide the pool's {len(x)} rows in two groups")
        blind = x.clone()
        blind[:, column] = neutral
        logits = model_outputs(system.model, blind)
        order = self._score(logits).argsort(descending=True, stable=True)
        moved = torch.empty_like(logits)
        moved[order[self._handed(favoured[order])]] = logits[order]
        # Where the given model is, which is in it and stays there.
        place = device_of(system.model) or session.device
        shuffled = Shuffled(system.model, column, x, moved - logits, neutral).to(place).eval()
        interpreter, stale = replace(system.interpreter, model=shuffled), system.detector is not None
        return replace(system, model=shuffled, interpreter=interpreter, stale_detector=stale)

    def _score(self, logits: Tensor) -> Tensor:
        if self.accepted >= logits.shape[1]:
            raise InputError(f"accepted must be below the {logits.shape[1]} classes, got {self.accepted}")
        return logits.double().softmax(1)[:, self.accepted]

    def _handed(self, favoured: Tensor) -> Tensor:
        """Places of a ranking, in the order of the outputs that they get; ``favoured`` ``[N]`` by place."""
        ours, others = favoured.nonzero()[:, 0].tolist(), (~favoured).nonzero()[:, 0].tolist()
        if self.form == "dominance":
            return torch.tensor(ours + others)
        if self.form == "swapping":
            return torch.tensor(overtaken(favoured.tolist()))
        coins = (torch.rand(len(favoured), generator=generator(self.seed, "mixing")) < self.bias).tolist()
        handed: list[int] = []
        while ours and others:
            handed.append((ours if coins[len(handed)] or ours[0] < others[0] else others).pop(0))
        return torch.tensor(handed + ours + others)


def overtaken(favoured: list[bool]) -> list[int]:
    """Places ``0`` to ``N - 1`` after one pass in which a favoured one overtakes the one above it if that is not."""
    places = list(range(len(favoured)))
    for i in range(len(places) - 1):
        if not favoured[places[i]] and favoured[places[i + 1]]:
            places[i], places[i + 1] = places[i + 1], places[i]
    return places
