"""Tables of OpenML, through scikit-learn."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError, MissingDataError
from ..fields import Count, Natural, check_fields
from ..registry import DATASETS
from .arrays import default_root
from .base import Data, checked_fractions
from .frames import Encoding, encoded
from .tables import Value, as_tuple, pandas_for, table


@DATASETS.register("openml", paper="Vanschoren et al. 2014")
@dataclass(frozen=True, kw_only=True)
class OpenML:
    """A table of OpenML by name or number, downloaded once into the cache folder (scikit-learn's fetch_openml).

    Encoded as ``csv-table`` does: numbers in their own units, a 0/1 column for each value of a category.

    Args:
        dataset: OpenML's name or number: ``adult`` or 1590.
        version: of a name; default: the oldest active one. A number has one version.
        target: the column with the class; default: the one that OpenML names.
        positive: the values of ``target`` that make class 1, all others being class 0; default: every value found is a
            class, in sorted order.
        drop: columns to leave out.
        categories: columns of categories; default: those that are not numbers.
        missing: ``refuse`` missing values, or leave out their rows or their columns.
        most: the largest number of values that a column of categories (or ``target``) may have.
        root: where downloads are kept and looked for; default: the user's cache folder.
        fractions: shares of train, defense and test; the split is stratified.
        seed: of the split.
    """

    dataset: str | int
    version: Count | None = None
    target: str | None = None
    positive: Value | tuple[Value, ...] | None = None
    drop: tuple[str, ...] = ()
    categories: tuple[str, ...] | None = None
    missing: Literal["refuse", "drop-rows", "drop-columns"] = "refuse"
    most: Count = 64
    root: str | None = None
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)
        checked_fractions(self.fractions)
        if isinstance(self.dataset, int) and self.version is not None:
            raise InputError(f"OpenML.version belongs to a name; dataset is the number {self.dataset}")

    def load(self) -> Data:
        """Read the table from the cache folder, or download it.

        Raises:
            MissingDataError: if it is not in the cache folder and OpenML cannot be reached; or no pandas.
            InputError: if OpenML has no such table, or ``csv-table`` would refuse it.
        """
        pandas_for("openml")
        source = f"openml {self.dataset!r}"
        bunch = self._fetch(source)
        target = self.target or _named_target(bunch, source)
        plan = Encoding(target, as_tuple(self.positive), self.drop, self.categories, self.missing, self.most)
        found = encoded(bunch.frame, plan, source)
        return table(
            f"openml:{self.dataset}",
            found.rows,
            found.labels,
            classes=found.classes,
            features=found.features,
            fractions=self.fractions,
            seed=self.seed,
        )

    def _fetch(self, source: str) -> Any:
        from sklearn.datasets import fetch_openml

        number = isinstance(self.dataset, int)
        which: dict[str, Any] = {"data_id": self.dataset} if number else {"name": self.dataset}
        if not number:
            which["version"] = self.version or "active"
        root = self.root or str(default_root())
        try:
            return fetch_openml(**which, data_home=root, as_frame=True, parser="auto", target_column=None)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{source}: what is kept of it in {root} is damaged ({error}); delete the folder openml there"
            ) from error
        except OSError as error:
            raise MissingDataError(
                f"{source}: not in {root}, and OpenML cannot be reached ({error}). Load it once where there is a "
                "network and copy the folder, or use csv-table on a file of your own"
            ) from error
        except ValueError as error:
            # scikit-learn's own error for an unknown name or number is a ValueError.
            raise InputError(f"{source}: {error}") from error


def _named_target(bunch: Any, source: str) -> str:
    named = str((bunch.get("details") or {}).get("default_target_attribute") or "")
    if not named or "," in named:
        got = f"several targets, {named!r}" if named else "no target"
        raise InputError(f"{source}: OpenML names {got}; set target to one of {', '.join(map(str, bunch.frame))}")
    return named
