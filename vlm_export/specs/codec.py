"""One codec between frozen dataclasses and JSON data: strict about types, ranges and names.

A `Spec` checks its fields against their annotations whenever it is made, so that a spec that exists is valid, whether
a family states it, a checkpoint's config led to it or a manifest holds it. Bounds stand where the type stands:
`Annotated[int, between(1, 8192)]`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vlm_export.errors import InputError, VlmExportError, suggestion

DAMAGED = "the file is damaged or was changed by hand; copy the bundle again, or export again"
MAX_INTEGER = 2**63 - 1
_MAX_SHOWN = 200

Kind = TypeVar("Kind", bound="Spec")
_JSON_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: f"an integer from {-MAX_INTEGER} to {MAX_INTEGER}",
    float: "a finite number",
    str: "a string",
}


@dataclass(frozen=True)
class Check:
    """What a value must be besides its type; stands in `Annotated`.

    Attributes:
        expected: the demand in words, for the error.
        holds: whether a value of the right type meets it.
    """

    expected: str
    holds: Callable[[Any], bool]


def between(minimum: float, maximum: float = MAX_INTEGER) -> Check:
    """A number in that range, both bounds included."""
    return Check(f"from {minimum} to {maximum}", lambda value: bool(minimum <= value <= maximum))


def above(bound: float) -> Check:
    """A number that is greater than the bound."""
    return Check(f"above {bound}", lambda value: bool(value > bound))


def matches(pattern: str, expected: str) -> Check:
    """A string of which the whole matches a regular expression."""
    return Check(expected, lambda value: re.fullmatch(pattern, value) is not None)


def not_empty(expected: str) -> Check:
    """A sequence or mapping of at least one entry."""
    return Check(expected, lambda value: len(value) > 0)


class Spec:
    """Base of frozen dataclasses that JSON can hold and that are valid once they exist.

    Field types are bool, int, float, str, Literal, None, other Specs, `tuple[X, ...]`, `tuple[X, Y]`,
    `Mapping[str, X]`, `Any` for JSON data that the reader leaves as it is, unions of these, and each of them in
    `Annotated` with a Check. In a union of Specs the data decides by its keys.
    """

    def __post_init__(self) -> None:
        """InputError that names the first field whose value does not fit."""
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            expected = _misfit(hint, value)
            if expected is not None:
                raise self.refusal(name, expected)
        self.check()

    def check(self) -> None:
        """Rules between fields, for subclasses; raises what `refusal` makes."""

    def refusal(self, field: str, expected: str) -> VlmExportError:
        """The error for the value that a field has."""
        return _refusal(field, expected, getattr(self, field), type(self).__name__)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON data, in their order; tuples become lists. `from_json` reads it back."""
        return {name: _encoded(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def from_json(cls: type[Kind], data: object, where: str, *, complete: bool = True, fix: str = DAMAGED) -> Kind:
        """The spec that `to_json` wrote.

        Args:
            data: what a JSON or YAML parser returned.
            where: the file and the path in it, for errors.
            complete: every field must be there; False lets those with a default be left out.
            fix: what the user can do about data that does not fit.

        Raises:
            InputError: unknown or missing fields, or a value of another type or out of range; names the field.
        """
        return _spec(cls, data, where, complete, fix)

    @classmethod
    def from_config(cls: type[Kind], data: object, where: str = "architecture") -> Kind:
        """The spec in data that people write, as in `configs/`: fields with a default may be left out."""
        return _spec(cls, data, where, complete=False, fix="")


def _read_hints(kind: type[Any]) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


_hints: Callable[[Any], Mapping[str, Any]] = cache(_read_hints)


def _required(kind: type[Any]) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return tuple(field.name for field in fields if field.default is missing and field.default_factory is missing)


def _refusal(field: str, expected: str, value: object, where: str, fix: str = "") -> InputError:
    got = repr(_encoded(value))
    return InputError(
        f"field {field!r} has another type or value",
        where=where,
        expected=expected,
        got=got if len(got) <= _MAX_SHOWN else got[:_MAX_SHOWN] + "…",
        fix=fix,
    )


def _encoded(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _encoded(entry) for key, entry in value.items()}
    return [_encoded(entry) for entry in value] if isinstance(value, tuple | list) else value


def _spec(kind: type[Kind], data: object, where: str, complete: bool, fix: str) -> Kind:
    if not isinstance(data, Mapping):
        shown = type(data).__name__
        raise InputError(f"{kind.__name__} is no object", where=where, expected="an object", got=shown, fix=fix)
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            raise InputError(f"unknown field {key!r}", where=where, fix=suggestion(str(key), hints))
    missing = [name for name in (hints if complete else _required(kind)) if name not in data]
    if missing:
        listed = ", ".join(missing)
        raise InputError("missing fields", where=where, expected=", ".join(hints), got=f"no {listed}", fix=fix)
    values = {}
    for key, value in data.items():
        values[key] = _decoded(
            hints[key], value, f"{where}.{key}" if ":" in where else f"{where}: {key}", complete, fix
        )
    try:
        return kind(**values)
    except VlmExportError as error:
        found = error.fix or fix
        raise InputError(error.what, where=where, expected=error.expected, got=error.got, fix=found) from error


def _decoded(hint: Any, value: Any, where: str, complete: bool, fix: str) -> Any:
    """The value with lists made tuples and objects made Specs, where the hint wants them; types are checked later."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _decoded(arguments[0], value, where, complete, fix)
    if origin in (Union, types.UnionType):
        return _decoded(_member(arguments, value), value, where, complete, fix)
    if isinstance(hint, type) and issubclass(hint, Spec):
        return _spec(hint, value, where, complete, fix)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            return tuple(value)
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_decoded(kind, entry, f"{where}[{i}]", complete, fix) for i, (kind, entry) in items)
    if origin is collections.abc.Mapping and isinstance(value, Mapping):
        kind = arguments[1]
        return {key: _decoded(kind, entry, f"{where}.{key}", complete, fix) for key, entry in value.items()}
    # A whole number is a float to whoever writes JSON.
    return float(value) if hint is float and type(value) is int and abs(value) <= MAX_INTEGER else value


def _member(kinds: tuple[Any, ...], value: Any) -> Any:
    """The type of a union that a JSON value is meant to be; any of them where it fits none."""
    if isinstance(value, Mapping):
        specs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Spec)]
        named = [kind for kind in specs if _kind_of(kind) in (None, value.get("kind"))]
        # The one with the most of its keys there, so that the error is about the kind that was meant.
        return max(named or specs or kinds, key=lambda kind: len(set(_hints(kind)) & set(value)) if named else 0)
    plain = [kind for kind in kinds if _misfit(kind, tuple(value) if isinstance(value, list) else value) is None]
    tuples = [kind for kind in kinds if get_origin(_bare(kind)) is tuple] if isinstance(value, list) else []
    return (plain or tuples or [kind for kind in kinds if kind is not type(None)])[0]


def _kind_of(spec: type[Any]) -> str | None:
    hint = _hints(spec).get("kind")
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else None


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _misfit(hint: Any, value: Any) -> str | None:
    """What was expected, where the value does not fit; None where it does."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        checks = [entry for entry in arguments[1:] if isinstance(entry, Check)]
        words = f"{_words(arguments[0])}, {', '.join(check.expected for check in checks)}"
        if _misfit(arguments[0], value) is not None:
            return words
        optional = value is None
        return None if optional or all(check.holds(value) for check in checks) else words
    if origin in (Union, types.UnionType):
        found = [_misfit(kind, value) for kind in arguments]
        return None if None in found else " or ".join(str(words) for words in found)
    return None if _fits(hint, value) else _words(hint)


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(_misfit(k, v) is None for k, v in zip(kinds, value, strict=True))
    if origin is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            return False
        return all(isinstance(key, str) and _misfit(arguments[1], entry) is None for key, entry in value.items())
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A type in words, for errors."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        checks = ", ".join(entry.expected for entry in arguments[1:] if isinstance(entry, Check))
        return f"{_words(arguments[0])}, {checks}"
    if origin in (Union, types.UnionType):
        return " or ".join(_words(kind) for kind in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint is None or hint is type(None):
        return "nothing (null)"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of which each entry is {_words(arguments[0])}"
        return f"a list of {len(arguments)} entries: {', '.join(_words(kind) for kind in arguments)}"
    if origin is not None:
        return f"an object of which each value is {_words(arguments[1])}"
    return _JSON_KINDS.get(hint, "an object")
