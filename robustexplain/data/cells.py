"""Columns of text that are something else: numbers with a slip among them, numbers of another notation, dates."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

from ..errors import DataWarning, InputError

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*|\s*[-+]?(inf|infinity|nan)\s*", re.IGNORECASE)
_GROUPS = r"\d{1,3}(?:[.,'’\s]\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?|\d+(?:_\d+)+"
_MONEY = r"(?:[$€£¥₹%]|[A-Z]{3}(?![A-Za-z]))"
_NOTATION = re.compile(rf"\s*\(?[-+]?\s*{_MONEY}?\s*[-+]?(?:{_GROUPS})\s*{_MONEY}?\)?\s*")
_DATE = re.compile(r"\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4}))([T\s].*)?\s*")
_CURE = "put the column into categories if it holds categories, or into drop"


def _is(pattern: re.Pattern[str], text: str) -> bool:
    # Matching a long text may take its length squared, and only whole numbers are so long.
    if len(text) > 100 and not text.isdigit():
        return False
    return pattern.fullmatch(text[:100]) is not None


def refuse_numbers_as_text(column: Any, name: str, source: str) -> None:
    """Refuse text that nobody declared to be categories and that is numbers or dates for at least half of the rows.

    Each of its values would become a 0/1 column.

    Args:
        column: a pandas series without missing values.
        name: of the column.
        source: what errors call the table.

    Raises:
        InputError: naming the first cells that are no numbers, or how the numbers are written.
    """
    if str(column.dtype) == "category":
        return
    texts = [str(value) for value in column]
    odd = [i for i, text in enumerate(texts) if not _is(_NUMBER, text)]
    where = f"{source}: column {name!r}"
    if 2 * len(odd) <= len(texts):
        # Whole numbers beyond 64 bits come as text.
        shown = odd or [max(range(len(texts)), key=lambda i: len(texts[i]))]
        cells = ", ".join(f"sample {column.index[i]} {texts[i]!r:.60}" for i in shown[:4])
        slip = f"numbers but for {len(odd)} of {len(texts)} rows" if odd else "numbers as text"
        raise InputError(
            f"{where} holds {slip}: {cells}{', ...' if len(odd) > 4 else ''}; mend them, name what stands for a "
            f"missing value in na (csv-table), or {_CURE}"
        )
    for pattern, what in ((_DATE, "dates"), (_NOTATION, "numbers of another notation")):
        alike = [text for text in texts if _is(pattern, text)]
        if 2 * len(alike) >= len(texts):
            wanted = "a number, such as days since one of them" if what == "dates" else "1234.5"
            raise InputError(f"{where} holds {what}, such as {alike[0]!r:.60}; write them as {wanted}, or {_CURE}")


def check_target(found: list[str], where: str) -> None:
    """Refuse a target that is measured, not counted; warn of text among classes that are numbers otherwise.

    Args:
        found: the values, as text.
        where: what errors call the column.

    Raises:
        InputError: more than ten values, and most of them fractions or dates.
    """
    numbers = [text for text in found if _is(_NUMBER, text) and math.isfinite(float(text))]
    measured = [text for text in numbers if not float(text).is_integer()]
    measured += [text for text in found if _is(_DATE, text)]
    if len(found) > 10 and 2 * len(measured) > len(found):
        raise InputError(
            f"{where} is continuous: {len(found)} different values, such as {', '.join(measured[:3])}; use a column "
            "of classes, or name the values of class 1 in positive"
        )
    odd = [text for text in found if text not in numbers]
    if odd and len(numbers) > len(odd):
        warnings.warn(
            f"{where}: the classes are numbers but for {', '.join(map(repr, odd[:4]))}; if that stands for a missing "
            "value, name it in na",
            DataWarning,
            stacklevel=4,
        )
