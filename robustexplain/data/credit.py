"""The three tables of people that Slack et al. (2020) judge: COMPAS, German credit, Communities and Crime.

Prepared as in their public code: the same rows, columns, order and labels. Class 0 is the outcome that is bad for the
person (or the community), class 1 the good one. Values stay in the data's own units: they standardise, a model of ours
does so by itself. Their split (nine tenths train, one tenth test) is ``fractions: [0.9, 0, 0.1]``; their random columns
and split come from numpy's global generator, ours from ``seed``.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.request import urlopen

import numpy as np
import torch

from .. import files
from ..errors import InputError, MissingDataError
from ..fields import Natural, check_fields
from ..random_streams import generator
from ..registry import DATASETS
from .arrays import default_root
from .base import Data, checked_fractions
from .frames import numeric, require_columns
from .tables import pandas_for, read_csv, table

UNRELATED: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("unrelated_column",),
    2: ("unrelated_column_one", "unrelated_column_two"),
}
"""Names of the random columns, by their number."""
_SLACK = "https://raw.githubusercontent.com/dylan-slack/Fooling-LIME-SHAP/master/data/"


@dataclass(frozen=True, kw_only=True)
class _Public(ABC):
    """A published CSV file: where it is, what it must hold, how it becomes a table."""

    path: str | None = None
    root: str | None = None
    download: bool = False
    unrelated: Literal[0, 1, 2] = 0
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)
    seed: Natural = 0

    name: ClassVar[str]
    url: ClassVar[str]
    least: ClassVar[int]
    """Bytes that a whole download has at least."""
    columns: ClassVar[tuple[str, ...]]
    """The columns that are used; all of them if the table keeps others too."""
    keeps_all: ClassVar[bool] = True
    """Whether a download is kept with the columns that are not used."""
    classes: ClassVar[tuple[str, str]]

    def __post_init__(self) -> None:
        check_fields(self)
        checked_fractions(self.fractions)

    def load(self) -> Data:
        """Read and prepare the table.

        Raises:
            MissingDataError: if the file is not there, or cannot be downloaded; or no pandas.
            InputError: if it is another table.
        """
        path = self._file()
        frame = read_csv(path, self.name)
        require_columns(frame, self.columns, f"{self.name} {str(path)!r}")
        try:
            x, labels = self._prepared(frame)
        except InputError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.name}: {str(path)!r} is another table than the published one: {error}") from error
        features, rows = numeric(x, (), 64, f"{self.name} {str(path)!r}")
        extra = UNRELATED[self.unrelated]
        drawn = [torch.randint(2, (len(rows), 1), generator=generator(self.seed, name)) for name in extra]
        return table(
            self.name,
            torch.cat([rows, *drawn], 1),
            labels,
            classes=self.classes,
            features=(*features, *extra),
            fractions=self.fractions,
            seed=self.seed,
        )

    @abstractmethod
    def _prepared(self, frame: Any) -> tuple[Any, list[int]]:
        """Features (a data frame) and labels."""

    def _file(self) -> Path:
        if self.path is not None:
            return Path(self.path).expanduser()
        folder = Path(self.root).expanduser() if self.root else default_root()
        kept = folder / self.url.rsplit("/", 1)[1]
        if not kept.is_file() and not self.download:
            raise MissingDataError(
                f"{self.name}: no {kept.name} in {folder}. Set path to the file, or download: true to fetch it from "
                f"{self.url}"
            )
        return kept if kept.is_file() else self._download(kept)

    def _download(self, kept: Path) -> Path:
        try:
            with urlopen(self.url, timeout=60) as answer:
                content: bytes = answer.read()
        except OSError as error:
            raise MissingDataError(f"{self.name}: the download from {self.url} failed: {error}") from error
        if len(content) < self.least:
            raise MissingDataError(
                f"{self.name}: {self.url} gave {len(content)} bytes, and the table has at least {self.least}"
            )
        frame = pandas_for(self.name).read_csv(io.BytesIO(content), index_col=False, dtype=str, keep_default_na=False)
        require_columns(frame, self.columns, f"{self.name} {self.url}")
        frame = frame if self.keeps_all else frame[list(self.columns)]
        return files.write_text(kept, frame.to_csv(index=False))


@DATASETS.register("compas", paper="Angwin et al. 2016 (ProPublica), as in Slack et al. 2020")
@dataclass(frozen=True, kw_only=True)
class Compas(_Public):
    """6172 defendants of Broward County, nine columns, ``race`` the sensitive one; class 0: the COMPAS score is high.

    ProPublica's filters; ``two_year_recid`` is a feature, and the label is COMPAS's prediction. ``race`` is 1 for
    African-American. Columns: age, two_year_recid, priors_count, length_of_stay (whole days),
    c_charge_degree_F, c_charge_degree_M, sex_Female, sex_Male, race. The published file holds names and birth dates: a
    download keeps only the columns that are used.

    Args:
        path: ProPublica's compas-scores-two-years.csv. Default: that name in ``root``.
        root: where a download is kept; default: the user's cache folder.
        download: fetch it from ProPublica's repository if it is not there.
        unrelated: append so many random 0/1 columns (``unrelated_column``; two: ``unrelated_column_one``, ``_two``).
        fractions: shares of train, defense and test; the split is stratified.
        seed: of the split and the random columns.
    """

    name: ClassVar[str] = "compas"
    url: ClassVar[str] = (
        "https://raw.githubusercontent.com/propublica/compas-analysis/master/compas-scores-two-years.csv"
    )
    least: ClassVar[int] = 1_000_000
    columns: ClassVar[tuple[str, ...]] = (
        *("age", "two_year_recid", "c_charge_degree", "race", "sex", "priors_count", "score_text", "is_recid"),
        *("days_b_screening_arrest", "c_jail_in", "c_jail_out"),
    )
    keeps_all: ClassVar[bool] = False
    classes: ClassVar[tuple[str, str]] = ("high score", "low or medium score")

    def _prepared(self, frame: Any) -> tuple[Any, list[int]]:
        pandas = pandas_for(self.name)
        frame = frame[
            frame["days_b_screening_arrest"].between(-30, 30)
            & (frame["is_recid"] != -1)
            & (frame["c_charge_degree"] != "O")
            & frame["score_text"].notna()
        ]
        try:
            stay = pandas.to_datetime(frame["c_jail_out"]) - pandas.to_datetime(frame["c_jail_in"])
        except (ValueError, TypeError) as error:
            raise InputError(f"compas: c_jail_in and c_jail_out must hold dates: {error}") from error
        x = frame[["age", "two_year_recid", "priors_count"]].assign(length_of_stay=stay.dt.days)
        for column in ("c_charge_degree", "sex"):
            for value in sorted(set(frame[column])):
                x[f"{column}_{value}"] = frame[column] == value
        x["race"] = frame["race"] == "African-American"
        return x, [int(score != "High") for score in frame["score_text"]]


@DATASETS.register("german-credit", paper="Hofmann 1994 (Statlog), as in Ustun et al. 2019 and Slack et al. 2020")
@dataclass(frozen=True, kw_only=True)
class GermanCredit(_Public):
    """1000 loans, 28 columns, ``Gender`` (1 for men) the sensitive one; class 0: a bad customer.

    The file of Ustun et al. 2019, whose categories are 0/1 columns already; ``PurposeOfLoan`` is dropped.

    Args:
        path: german_processed.csv. Default: that name in ``root``.
        root: where a download is kept; default: the user's cache folder.
        download: fetch it from the repository of Slack et al. if it is not there.
        unrelated: append so many random 0/1 columns (``unrelated_column``; two: ``unrelated_column_one``, ``_two``).
            Slack et al. append none here: their unrelated column is ``LoanRateAsPercentOfIncome``.
        fractions: shares of train, defense and test; the split is stratified.
        seed: of the split and the random columns.
    """

    name: ClassVar[str] = "german-credit"
    url: ClassVar[str] = f"{_SLACK}german_processed.csv"
    least: ClassVar[int] = 50_000
    columns: ClassVar[tuple[str, ...]] = ("GoodCustomer", "Gender", "PurposeOfLoan", "LoanRateAsPercentOfIncome")
    classes: ClassVar[tuple[str, str]] = ("bad customer", "good customer")

    def _prepared(self, frame: Any) -> tuple[Any, list[int]]:
        x = frame.drop(columns=["GoodCustomer", "PurposeOfLoan"]).assign(Gender=frame["Gender"] == "Male")
        return x, [int(value == 1) for value in frame["GoodCustomer"]]


@DATASETS.register("communities-crime", paper="Redmond 2009 (UCI), as in Slack et al. 2020")
@dataclass(frozen=True, kw_only=True)
class CommunitiesCrime(_Public):
    """1994 communities of the USA, 100 columns, share of whites the sensitive one; class 0: more crime than the median.

    The sensitive column is ``racePctWhite numeric``, the label by violent crime. Communities whose violent crime is not
    known are left out, and then every column in which a value is missing.

    Args:
        path: communities_and_crime_new_version.csv. Default: that name in ``root``.
        root: where a download is kept; default: the user's cache folder.
        download: fetch it from the repository of Slack et al. if it is not there.
        unrelated: append so many random 0/1 columns (``unrelated_column``; two: ``unrelated_column_one``, ``_two``).
        fractions: shares of train, defense and test; the split is stratified.
        seed: of the split and the random columns.
    """

    name: ClassVar[str] = "communities-crime"
    url: ClassVar[str] = f"{_SLACK}communities_and_crime_new_version.csv"
    least: ClassVar[int] = 1_000_000
    target: ClassVar[str] = "ViolentCrimesPerPop numeric"
    drop: ClassVar[tuple[str, ...]] = (
        "communityname string",
        *("fold numeric", "county numeric", "community numeric", "state numeric"),
    )
    columns: ClassVar[tuple[str, ...]] = (target, *drop)
    classes: ClassVar[tuple[str, str]] = ("more violent crime", "less violent crime")

    def _prepared(self, frame: Any) -> tuple[Any, list[int]]:
        # The file's first column has no name: it is the number of the row.
        frame = frame.drop(columns=[c for c in frame.columns if str(c).startswith("Unnamed")])
        frame = frame[frame[self.target].notna()]
        crime = np.asarray(frame[self.target], dtype=np.float32)
        if not len(crime):
            raise InputError(f"communities-crime: no row has a value in {self.target!r}")
        x = frame.drop(columns=[self.target, *self.drop])
        x = x[[c for c in x.columns if x[c].notna().all()]]
        return x, (crime <= np.percentile(crime, 50)).astype(int).tolist()
