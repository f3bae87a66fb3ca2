"""Columns of texts beside the items, and conditions on them, such as `colour=red|green` or `year>=2020`.

A column is stored as its distinct texts and, for each item, which of them it has: a condition is asked once for each
distinct text, whatever the number of items.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError, suggestion

Operator: TypeAlias = Literal["=", "!=", "<=", ">=", "<", ">"]
_CONDITION = re.compile(r"(?P<column>[^=!<>]+)(?P<operator>!=|<=|>=|=|<|>)(?P<value>.*)", re.DOTALL)
_ALTERNATIVES = "|"
_DAMAGED = "build the index again"


@dataclass(frozen=True)
class Condition:
    """What a column must be.

    Attributes:
        column: its name.
        operator: "=" and "!=" compare texts, letter for letter; the others compare numbers, and what is no number does
            not meet them.
        values: of "=" one of them, of "!=" none of them; of the others a single number.
    """

    column: str
    operator: Operator
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.operator not in get_args(Operator):
            raise UsageError("a condition has no such operator", expected=" ".join(get_args(Operator)))
        if self.operator not in ("=", "!=") and (len(self.values) != 1 or math.isnan(_number(self.values[0]))):
            got = _ALTERNATIVES.join(self.values)
            raise UsageError("a condition compares with what is no number", where=self.column, got=got)

    def holds(self, text: str) -> bool:
        """Whether a text of the column meets it."""
        if self.operator in ("=", "!="):
            return (text in self.values) == (self.operator == "=")
        number, bound = _number(text), _number(self.values[0])
        return {"<": number < bound, "<=": number <= bound, ">": number > bound, ">=": number >= bound}[self.operator]


def parsed_condition(text: str) -> Condition:
    """`NAME=VALUE`, `NAME=VALUE|VALUE`, `NAME!=VALUE` or `NAME<NUMBER`; UsageError for anything else."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UsageError(
            "this is no condition", got=text, expected="NAME=VALUE, NAME!=VALUE, NAME<NUMBER, NAME>=NUMBER, …"
        )
    operator: Operator = next(known for known in get_args(Operator) if known == match["operator"])
    values = match["value"].split(_ALTERNATIVES) if operator in ("=", "!=") else [match["value"]]
    return Condition(match["column"].strip(), operator, tuple(values))


@dataclass(frozen=True)
class Column:
    """A text for each item.

    Attributes:
        codes: uint32 (N,), the number of each item's text.
        texts: distinct.
    """

    codes: npt.NDArray[np.uint32]
    texts: Sequence[str]

    def text(self, row: int) -> str:
        """The text of an item."""
        return self.texts[int(self.codes[row])]

    def rows_of(self, condition: Condition) -> npt.NDArray[np.bool_]:
        """Which items meet a condition, (N,); InputError where the column is damaged."""
        met = np.array([condition.holds(text) for text in self.texts], dtype=np.bool_)
        try:
            found: npt.NDArray[np.bool_] = met[self.codes]
        except IndexError as error:
            raise InputError("a column of an index is damaged", where=condition.column, fix=_DAMAGED) from error
        return found


def column_of(texts: Sequence[str]) -> Column:
    """The column of these texts, its distinct ones sorted."""
    distinct = sorted(set(texts))
    numbers = {text: number for number, text in enumerate(distinct)}
    return Column(np.fromiter((numbers[text] for text in texts), np.uint32, len(texts)), distinct)


def unknown_column(name: str, known: Sequence[str]) -> UsageError:
    """The error for a condition on a column that there is not."""
    return UsageError(
        "there is no such column beside the items",
        got=name,
        expected=", ".join(known) or "no conditions: no columns were kept",
        fix=suggestion(name, known) if known else "keep columns of a table: vlm-export embed … --keep COLUMN",
    )


def _number(text: str) -> float:
    """NaN for what is no number, which meets no comparison."""
    try:
        return float(text)
    except ValueError:
        return math.nan
