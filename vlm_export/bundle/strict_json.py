"""JSON from an untrusted file: bounded in size and depth, no duplicate keys, and fields read by type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vlm_export.errors import InputError, suggestion

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 200
MAX_INTEGER = 2**63 - 1
_DAMAGED = "the file is damaged or was changed by hand; copy the bundle again, or export again"
_MAX_NUMBER_CHARACTERS = 64
_STRUCTURE = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)

Item = TypeVar("Item")


def json_object_from_bytes(raw: bytes, where: str) -> dict[str, Any]:
    """The object that `raw` holds.

    Raises:
        InputError: too large, too deep, not UTF-8, not JSON, cut off, a duplicate key, NaN or infinity, or not an
            object.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise InputError(
            "a JSON file is too large", where=where, expected=f"at most {MAX_JSON_BYTES} bytes", got=f"{len(raw)} bytes"
        )
    _check_depth(raw, where)
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_bounded(int),
            parse_float=_bounded(_finite),
            parse_constant=_finite,
        )
    except ValueError as error:
        raise InputError(
            "a file is not valid JSON", where=where, got=str(error), fix="it may be cut off; copy or export it again"
        ) from error
    if not isinstance(data, dict):
        raise InputError("a JSON file holds no object", where=where, expected="{…}", got=type(data).__name__)
    return data


def _check_depth(raw: bytes, where: str) -> None:
    # Before the parser, whose recursion ends in RecursionError or worse; counts brackets outside strings.
    depth, in_string = 0, False
    for match in _STRUCTURE.finditer(raw):
        token = match[0]
        if token == b'"':
            in_string = not in_string
        elif not in_string and token in b"[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise InputError("a JSON file is nested too deeply", where=where, expected=f"depth {MAX_JSON_DEPTH}")
        elif not in_string and token in b"]}":
            depth -= 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice in one object")
        found[key] = value
    return found


def _bounded(parse: Callable[[str], Item]) -> Callable[[str], Item]:
    def bounded(text: str) -> Item:
        # Converting a number of a million digits takes quadratic time.
        if len(text) > _MAX_NUMBER_CHARACTERS:
            raise ValueError(f"a number has {len(text)} characters")
        return parse(text)

    return bounded


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


@dataclass(frozen=True)
class Fields:
    """An object whose fields are read by type; each reader raises InputError that names the field.

    `where` is the file and the path of the object in it, such as `vlm_export.json: parts[0]`.
    """

    data: Mapping[str, Any]
    where: str

    def only(self, known: Sequence[str]) -> Fields:
        """This object, after checking that it has exactly the fields in `known`."""
        for key in self.data:
            if key not in known:
                raise InputError(f"unknown field {key!r}", where=self.where, fix=suggestion(key, known))
        missing = [key for key in known if key not in self.data]
        if missing:
            raise InputError(
                "missing fields", where=self.where, expected=", ".join(known), got=f"no {missing}", fix=_DAMAGED
            )
        return self

    def fail(self, key: str, expected: str) -> InputError:
        got = repr(self.data.get(key))
        return InputError(
            f"field {key!r} has another type or value",
            where=self.where,
            expected=expected,
            got=got if len(got) <= 200 else got[:200] + "…",
            fix=_DAMAGED,
        )

    def text(self, key: str) -> str:
        value = self.data[key]
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if self.data[key] is None else self.text(key)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        if self.data[key] not in choices:
            raise self.fail(key, f"one of {', '.join(choices)}")
        return self.text(key)

    def integer(self, key: str, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        value = self.data[key]
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.fail(key, f"an integer from {minimum} to {maximum}")
        return value

    def integer_or_none(self, key: str, minimum: int = 0) -> int | None:
        return None if self.data[key] is None else self.integer(key, minimum)

    def boolean(self, key: str) -> bool:
        value = self.data[key]
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.data[key]
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value

    def fields(self, key: str) -> Fields:
        return Fields(self.mapping(key), f"{self.where}.{key}")

    def sequence(self, key: str) -> list[Any]:
        value = self.data[key]
        if not isinstance(value, list):
            raise self.fail(key, "a list")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.sequence(key)
        if not all(isinstance(value, str) for value in values):
            raise self.fail(key, "a list of strings")
        return tuple(values)

    def each(self, key: str, read: Callable[[Fields], Item]) -> tuple[Item, ...]:
        """What `read` makes of each object in the list."""
        items = []
        for i, value in enumerate(self.sequence(key)):
            if not isinstance(value, dict):
                raise self.fail(key, "a list of objects")
            items.append(read(Fields(value, f"{self.where}.{key}[{i}]")))
        return tuple(items)

    def some(self, key: str, read: Callable[[Fields], Item]) -> tuple[Item, ...]:
        """As `each`, of a list that is not empty."""
        items = self.each(key, read)
        if not items:
            raise self.fail(key, "a list of at least one object")
        return items
