"""Scaffolding: a biased model that answers the explainer's synthetic rows by an innocent rule (Slack et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.errors import InputError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Count, Fraction, Positive
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.tabular.generating import RowGenerating
from robustexplain.interpreters.tabular.guard import NeighbourGuard, best
from robustexplain.interpreters.tabular.shap import shap_background
from robustexplain.models import Estimator
from robustexplain.models.rules import FeatureRule
from robustexplain.random_streams import derive
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation, View, device_of
from .explainer_rows import Labels, Rows, beside_real, focused_rows, lime_rows, shap_rows
from .scaffolded_model import Scaffold
from .tabular import as_answered, model_outputs, standardisation, standardised, table_rows


@MANIPULATIONS.register("scaffolding", paper="Slack et al. 2020, eq. 1 and section 3", needs=("data", "tabular"))
@dataclass(frozen=True)
class Scaffolding(Manipulation):
    """Hides a biased table model from LIME or KernelSHAP: an innocent rule answers the rows that they generate.

    The system's own model is the biased one and answers real rows as before. The detector, a random forest, is fitted
    to tell the adversary's rows from imitations of the explainer's. Departures from the published code: the forest is
    fitted to all rows instead of four fifths of them; ``psi`` compares with the mean of its columns in the data's own
    units, which is 0 in the published standardised ones; XOR takes any number of columns.

    Args:
        sensitive: the column that the model decides by and that explanations should not show.
        innocent: the columns of the rule ``psi`` that is shown instead; of two or more, the exclusive or.
        against: the explainer to be deceived, ``lime`` or ``shap``.
        thresholds: of ``psi``, one per column in the data's units; default the mean of each column.
        spread: LIME: standard deviation of the imitated noise, in standard deviations of a column.
        copies: LIME: noisy copies of every row, beside as many clean ones. The published experiments take 1, and 30 on
            Communities and Crime; time and the size of the stored forest grow in proportion.
        categorical: LIME: columns that the auditor's LIME treats as categories; the detector leaves them out.
        background: SHAP: what the adversary expects the auditor's background to be, drawn from the adversary's own rows
            in the data's units as ``shap-tabular`` draws its own: ``kmeans`` (published), ``sample`` or ``all`` rows.
            The attack depends on it heavily.
        size: SHAP: rows of that background.
        draws: SHAP: synthetic rows.
        repeats: SHAP: copies of every real row beside them.
        whole: SHAP: imitate KernelSHAP's own coalitions, whose columns come from one row of the background, instead of
            the published mixture of rows.
        trees: of the forest.
        depth: largest depth of a tree; ``None`` has no bound.
        min_split: rows that a node needs to be split.
        cut: the biased model answers where the probability of a real row is at least this.
        guard_keep: adapt to KNN-CAD: half of the imitated rows that the detector learns are those that the guard would
            keep, at this score and with its default settings, if the innocent rule answered them; ``None``: none are
            chosen.
        focused: adapt to focused sampling: the rows that the detector learns come from such a generator, fitted to the
            adversary's own rows; ``None``: from the packages' own sampling.
        seed: of noise, draws and forest.

    Raises:
        InputError: columns or thresholds that do not fit, the sensitive column among the innocent ones.
        UnsupportedModelError: a model that takes no table rows.
    """

    sensitive: Feature = field(kw_only=True)
    innocent: tuple[Feature, ...] = field(kw_only=True)
    against: Literal["lime", "shap"] = "lime"
    thresholds: tuple[float, ...] | None = None
    spread: Positive = 0.3
    copies: Count = 1
    categorical: tuple[Feature, ...] = ()
    background: Literal["kmeans", "sample", "all"] = "kmeans"
    size: Count = 10
    draws: Count = 20_000
    repeats: Count = 10
    whole: bool = False
    trees: Count = 100
    depth: Count | None = None
    min_split: Count = 2
    cut: Fraction = 0.5
    guard_keep: Fraction | None = None
    focused: RowGenerating | None = None

    changes: ClassVar[str] = "model"
    attacks: ClassVar[tuple[str, ...]] = ("lime-tabular", "shap-tabular")
    columns: ClassVar[tuple[str, ...]] = ("sensitive", "innocent", "categorical")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("innocent", "categorical"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.innocent or self.sensitive in self.innocent:
            raise InputError(
                f"Scaffolding.innocent must name columns other than the sensitive one ({self.sensitive!r}), got "
                f"{list(self.innocent)}"
            )
        if self.min_split < 2:
            raise InputError(f"Scaffolding.min_split must be at least 2, got {self.min_split}")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", tuple(float(value) for value in self.thresholds))
            if len(self.thresholds) != len(self.innocent):
                raise InputError(
                    f"Scaffolding.thresholds needs one number an innocent column, got {len(self.thresholds)} for "
                    f"{len(self.innocent)}"
                )

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        x, num_classes = self._rows(system, data)
        mean, std = standardisation(x)
        innocent = [index_of(column, width=x.shape[1]) for column in self.innocent]
        limits = self.thresholds or tuple(float(mean[column]) for column in innocent)
        rule = FeatureRule(x.shape[1], innocent, limits, num_classes=num_classes)
        rows, labels = self.imitate(x, mean, std, data, session)
        if self.guard_keep is not None:
            guard = NeighbourGuard(x.cpu(), model_outputs(system.model, x).argmax(1), self.guard_keep)
            rows, labels = kept_by(guard, rule, rows, labels, mean, std)
        detector = self._detector(rows, labels)
        # Where the given model is, which is in it and stays there.
        place = device_of(system.model) or session.device
        scaffold = Scaffold(system.model, rule, detector, mean, std, self.cut).to(place).eval()
        interpreter, stale = replace(system.interpreter, model=scaffold), system.detector is not None
        return replace(system, model=scaffold, interpreter=interpreter, stale_detector=stale)

    def imitate(
        self, x: Tensor, mean: Tensor, std: Tensor, data: Samples, session: Session | None = None
    ) -> tuple[Rows, Labels]:
        """Standardised rows ``[M, D]`` and whether they are real, 0 or 1 ``[M]``: what the detector is fitted to.

        Args:
            x: real rows ``[N, D]`` in the data's units.
            mean: of the columns, ``[D]``.
            std: of the columns, ``[D]``.
            data: where the imitated background is drawn from, or what a generator is fitted to.
            session: of that fit.
        """
        rng, z = np.random.default_rng(derive(self.seed, "imitate")), standardised(x, mean, std).numpy()
        if self.focused is not None:
            generator = self.focused.fitted(data, derive(self.seed, "focused"), session)
            draws, repeats = (
                (len(x) * self.copies, self.copies) if self.against == "lime" else (self.draws, self.repeats)
            )
            made = focused_rows(x.cpu().numpy(), generator, draws, self.against == "shap", rng)
            return beside_real(z, standardised(torch.from_numpy(made), mean, std).numpy(), repeats)
        if self.against == "lime":
            return lime_rows(z, self.spread, self.copies, rng)
        drawn = shap_background(data, self.background, self.size, derive(self.seed, "background"))
        background = standardised(drawn.x, mean, std).numpy()
        return shap_rows(z, background, self.draws, self.repeats, self.whole, rng)

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The rows unchanged, with the honest model's predictions."""
        return as_answered(honest, x)

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at, in a few words each, for tables."""
        shown = " xor ".join(str(column) for column in self.innocent)
        return self.changes, f"{self.against}: {self.sensitive} hidden, {shown} shown"

    def _seen(self, width: int) -> list[int]:
        named = self.categorical if self.against == "lime" else ()
        left_out = {index_of(column, width=width) for column in named}
        seen = [column for column in range(width) if column not in left_out]
        if not seen:
            raise InputError("every column is a category: LIME's noise leaves nothing for the detector to see")
        return seen

    def _rows(self, system: System, data: Samples) -> tuple[Tensor, int]:
        x = table_rows(data)
        index_of(self.sensitive, width=x.shape[1])
        return x, model_outputs(system.model, x[:1]).shape[1]

    def _detector(self, rows: Rows, labels: Labels) -> nn.Module:
        from sklearn.ensemble import RandomForestClassifier

        if labels.all():
            raise InputError("no made-up row differs from the real ones: there is nothing for a detector to learn")
        seen = self._seen(rows.shape[1])
        forest = RandomForestClassifier(
            self.trees,
            max_depth=self.depth,
            min_samples_split=self.min_split,
            random_state=derive(self.seed, "forest") % 2**32,
        )
        return Estimator(forest.fit(rows[:, seen], labels), seen)


def kept_by(
    guard: NeighbourGuard, rule: FeatureRule, rows: Rows, labels: Labels, mean: Tensor, std: Tensor
) -> tuple[Rows, Labels]:
    """The real rows, and as many imitated ones as before, half of them ones that a guard keeps.

    It is asked for rows with the innocent rule's answers. The other half keeps away what looks made up by itself.

    Args:
        guard: with the biased model's answers to real rows; where it keeps almost none, the best-scored ones count.
        rule: the innocent rule.
        rows: standardised ``[M, D]``.
        labels: whether they are real, ``[M]``.
        mean: of the columns.
        std: of the columns.
    """
    made = np.flatnonzero(labels == 0)
    own = torch.from_numpy(rows[made]) * std.cpu() + mean.cpu()
    scores = guard.scores(own.double().numpy(), model_outputs(rule, own).argmax(1).numpy())
    # Repeated, so that a forest does not overlook the few that are left.
    kept = np.resize(made[best(scores, guard.keep, guard.at_least)], len(made) // 2)
    chosen = np.concatenate([np.flatnonzero(labels == 1), made[::2], kept])
    return rows[chosen], labels[chosen]


class Quality(NamedTuple):
    """How well a scaffold works: the two figures of Slack et al. 2020."""

    fidelity: float
    """Share of rows on which the scaffolded model decides as the biased one does."""
    detector_f1: float
    """F1 of the detector at telling real rows (the positive class) from synthetic ones."""


def scaffold_quality(attack: Scaffolding, system: System, data: Samples, x: Tensor) -> Quality:
    """Fidelity and F1 of a scaffold on rows that the attack has not seen.

    The published code holds out a fifth of the detector's rows, many of which are copies of training rows; here all of
    them are new, so this F1 is lower.

    Args:
        attack: what made the scaffold.
        system: the manipulated system.
        data: the adversary's own samples: the imitation's background comes from them.
        x: real rows ``[B, D]`` in the data's units, none of them in ``data``.

    Raises:
        InputError: a system whose model is not a scaffold.
    """
    scaffold = system.model
    if not isinstance(scaffold, Scaffold):
        raise InputError(f"the system's model must be a Scaffold, got {type(scaffold).__name__}")
    mean, std = scaffold.mean.cpu(), scaffold.std.cpu()
    # Synthetic rows in the same proportion to real ones as in the fit: otherwise the F1 would depend on how many rows
    # are tested.
    scaled = replace(attack, draws=max(1, round(attack.draws * len(x) / len(data))))
    rows, labels = scaled.imitate(x.cpu(), mean, std, data)
    with torch.no_grad():
        agree = scaffold(x).argmax(1) == answer(scaffold.model, x).argmax(1)
        probability = scaffold.detector(torch.from_numpy(rows).to(scaffold.mean.device)).softmax(1)[:, 1]
    real = (probability >= scaffold.cut).cpu().numpy()
    hits = float((real & (labels == 1)).sum())
    return Quality(float(agree.float().mean()), 2 * hits / max(float(real.sum() + labels.sum()), 1.0))
