"""One codec between frozen dataclasses and JSON data: strict about types, ranges and names.

A `Spec` checks its fields against their annotations whenever it is made, so that a spec that exists is valid, whether
a family states it, a checkpoint's config led to it or a manifest holds it. Bounds stand where the type stands:
`Annotated[int, between(1, 8192)]`. The annotations of a class are read once, into functions.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from vlm_export.errors import InputError, VlmExportError, suggestion

DAMAGED = "the file is damaged or was changed by hand; copy the bundle again, or export again"
MAX_INTEGER = 2**63 - 1
_MAX_SHOWN = 200

Kind = TypeVar("Kind", bound="Spec")
_INTEGER, _NUMBER = "an integer", "a finite number"


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
    words = f"at least {minimum}" if maximum == MAX_INTEGER else f"from {minimum} to {maximum}"
    return Check(words, lambda value: bool(minimum <= value <= maximum))


def above(bound: float) -> Check:
    """A number that is greater than the bound."""
    return Check(f"above {bound}", lambda value: bool(value > bound))


def below(bound: float) -> Check:
    """A number that is smaller than the bound."""
    return Check(f"below {bound}", lambda value: bool(value < bound))


def matches(pattern: str, expected: str) -> Check:
    """A string of which the whole matches a regular expression."""
    compiled = re.compile(pattern)
    return Check(expected, lambda value: compiled.fullmatch(value) is not None)


def not_empty(expected: str) -> Check:
    """A sequence or mapping of at least one entry."""
    return Check(expected, lambda value: len(value) > 0)


class Spec:
    """Base of frozen dataclasses that JSON can hold and that are valid once they exist.

    Field types are bool, int, float, str, Literal, None, other Specs, `tuple[X, ...]`, `tuple[X, Y]`,
    `Mapping[str, X]`, `Any` for JSON data that the reader leaves as it is, unions of these, and each of them in
    `Annotated` with a Check. In a union of Specs the field `kind` of the data decides, or else its keys.

    Attributes:
        NEWER: fields that complete data may lack, because older data of the same schema does; each has a default.
    """

    NEWER: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """InputError that names the first field whose value does not fit."""
        for name, field in _fields(type(self)).items():
            if not field.fits(getattr(self, name)):
                raise self.refusal(name, field.words)
        self.check()

    def check(self) -> None:
        """Rules between fields, for subclasses; raises what `refusal` makes."""

    def refusal(self, field: str, expected: str) -> VlmExportError:
        """The error for the value that a field has."""
        return InputError(
            f"field {field!r} has another type or value",
            where=type(self).__name__,
            expected=expected,
            got=_shown(getattr(self, field)),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON data, in their order; tuples become lists. `from_json` reads it back."""
        return {name: _encoded(getattr(self, name)) for name in _fields(type(self))}

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
        return _read_spec(cls, data, _Place(where, complete, fix))

    @classmethod
    def from_config(cls: type[Kind], data: object, where: str = "architecture") -> Kind:
        """The spec in data that people write, as in `configs/`: fields with a default may be left out."""
        return _read_spec(cls, data, _Place(where, complete=False, fix=""))


def field_words(kind: type[Spec]) -> dict[str, str]:
    """Name of each field → what it may hold, in words."""
    return {name: field.words for name, field in _fields(kind).items()}


def misfit(hint: Any, value: Any) -> str | None:
    """What an annotation allows, in words, where the value is not of it; None where it is."""
    found = _type_of(hint)
    return None if found.fits(value) else found.words


class _Place(NamedTuple):
    """Where a reader stands in the data, and what it tells and asks there, as in `Spec.from_json`."""

    where: str
    complete: bool
    fix: str

    def at(self, step: str) -> _Place:
        return _Place(f"{self.where}{step}", self.complete, self.fix)

    def field(self, name: str) -> _Place:
        return self.at(f".{name}" if ": " in self.where else f": {name}")


class _Type(NamedTuple):
    """An annotation, read.

    Attributes:
        words: what it allows, for errors.
        fits: whether a Python value is of it.
        read: JSON data with lists made tuples and objects made Specs, where it wants them; `fits` is asked later.
        holds: what JSON holds there: an object, a list, or None for anything else.
        spec: the Spec that the object is.
    """

    words: str
    fits: Callable[[Any], bool]
    read: Callable[[Any, _Place], Any]
    holds: type[Mapping[str, Any]] | type[list[Any]] | None = None
    spec: type[Spec] | None = None


def _read_fields(kind: type[Any]) -> Mapping[str, _Type]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _type_of(hints[field.name]) for field in dataclasses.fields(kind)}


_fields: Callable[[Any], Mapping[str, _Type]] = cache(_read_fields)


def _required(kind: type[Any]) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return tuple(field.name for field in fields if field.default is missing and field.default_factory is missing)


def _shown(value: Any) -> str:
    text = repr(_encoded(value))
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _encoded(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _encoded(entry) for key, entry in value.items()}
    return [_encoded(entry) for entry in value] if isinstance(value, tuple | list) else value


def _read_spec(kind: type[Kind], data: object, place: _Place) -> Kind:
    where, fix = place.where, place.fix
    if not isinstance(data, Mapping):
        raise InputError(f"{kind.__name__} is no object", where=where, expected="an object", got=_shown(data), fix=fix)
    fields = _fields(kind)
    for key in data:
        if key not in fields:
            raise InputError(f"unknown field {key!r}", where=where, fix=suggestion(str(key), fields))
    needed = [name for name in fields if name not in kind.NEWER] if place.complete else _required(kind)
    missing = [name for name in needed if name not in data]
    if missing:
        listed = ", ".join(missing)
        raise InputError("missing fields", where=where, expected=", ".join(fields), got=f"no {listed}", fix=fix)
    # Most values are read as they are, and need no place: paths are a third of the time otherwise.
    reads = {key: fields[key].read for key in data}
    values = {key: v if reads[key] is _as_it_is else reads[key](v, place.field(key)) for key, v in data.items()}
    try:
        return kind(**values)
    except VlmExportError as error:
        inside = where if error.where in ("", kind.__name__) else place.field(error.where).where
        found = error.fix or fix or _yaml_fix(values, fields)
        raise InputError(error.what, where=inside, expected=error.expected, got=error.got, fix=found) from error


def _yaml_fix(values: Mapping[str, Any], fields: Mapping[str, _Type]) -> str:
    """What to do about the first value that YAML may have read as something else than its writer meant."""
    value = next((value for name, value in values.items() if not fields[name].fits(value)), None)
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+e[+-]?[0-9]+", value):
        return "YAML reads 1e-4 as text: write 0.0001"
    return "YAML reads 2.0 and yes as text only in quotes" if isinstance(value, int | float) else ""


def _type_of(hint: Any) -> _Type:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _checked_type(arguments[0], [entry for entry in arguments[1:] if isinstance(entry, Check)])
    if origin in (Union, types.UnionType):
        return _union_type([_type_of(kind) for kind in arguments])
    if origin is Literal:
        choices = {(type(choice), choice) for choice in arguments}
        words = f"one of {', '.join(map(repr, arguments))}"
        return _Type(words, lambda value: isinstance(value, _PLAIN) and (type(value), value) in choices, _as_it_is)
    if origin is tuple:
        return _sequence_type(arguments)
    if origin is collections.abc.Sequence:
        return _sequence_type((*arguments, ...))
    if origin is collections.abc.Mapping:
        return _mapping_type(_type_of(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Spec):
        spec: type[Spec] = hint
        reads: Callable[[Any, _Place], Any] = lambda value, place: _read_spec(spec, value, place)  # noqa: E731
        return _Type("an object", lambda value: isinstance(value, spec), reads, Mapping, spec)
    if hint not in _PLAIN_TYPES:
        raise TypeError(f"a Spec holds nothing of the type {hint}")
    return _PLAIN_TYPES[hint]


def _checked_type(hint: Any, checks: Sequence[Check]) -> _Type:
    base = _type_of(hint)
    words, joint = (_INTEGER, " ") if hint is int else (base.words, " " if hint is float else ": ")
    return base._replace(
        words=f"{words}{joint}{', '.join(check.expected for check in checks)}",
        fits=lambda value: base.fits(value) and (value is None or all(check.holds(value) for check in checks)),
    )


def _union_type(members: Sequence[_Type]) -> _Type:
    def read(value: Any, place: _Place) -> Any:
        fitting = [member for member in members if member.holds and isinstance(value, member.holds)]
        specs = [member.spec for member in fitting if member.spec is not None]
        if specs:
            return _read_spec(_meant(specs, value, place), value, place)
        if fitting:
            return fitting[0].read(value, place)
        found = ((member, member.read(value, place)) for member in members if member.holds is None)
        return next((kept for member, kept in found if member.fits(kept)), value)

    words = " or ".join(member.words for member in members)
    return _Type(words, lambda value: any(member.fits(value) for member in members), read)


def _meant(specs: Sequence[type[Spec]], data: Mapping[str, Any], place: _Place) -> type[Spec]:
    """The Spec that the data means: that of its `kind`, or else the one with most of its keys and fewest others."""
    kinds = {_fields(spec)["kind"].words.removeprefix("one of "): spec for spec in specs if "kind" in _fields(spec)}
    stated = _shown(data.get("kind"))
    if stated in kinds:
        return kinds[stated]
    if len(kinds) == len(specs) > 1:
        expected, got = f"one of {', '.join(kinds)}", stated if "kind" in data else "no kind"
        raise InputError(
            "field 'kind' has another type or value", where=place.where, expected=expected, got=got, fix=place.fix
        )
    return max(specs, key=lambda spec: (len(set(_fields(spec)) & set(data)), -len(_fields(spec))))


def _sequence_type(hints: Sequence[Any]) -> _Type:
    """Of `tuple[X, ...]`, or of `tuple[X, Y]`."""
    is_open = hints[-1] is Ellipsis
    entries = [_type_of(hint) for hint in hints if hint is not Ellipsis]

    def paired(value: Sequence[Any]) -> Iterable[tuple[_Type, Any]]:
        return zip(repeat(entries[0]) if is_open else entries, value, strict=False)

    def fits(value: Any) -> bool:
        is_whole = isinstance(value, tuple) and (is_open or len(value) == len(entries))
        return is_whole and all(entry.fits(found) for entry, found in paired(value))

    def read(value: Any, place: _Place) -> Any:
        if not isinstance(value, list) or not (is_open or len(value) == len(entries)):
            return value
        pairs = enumerate(paired(value))
        return tuple(found if e.read is _as_it_is else e.read(found, place.at(f"[{i}]")) for i, (e, found) in pairs)

    each = ", ".join(entry.words for entry in entries)
    words = f"a list of which each entry is {each}" if is_open else f"a list of {len(entries)} entries: {each}"
    return _Type(words, fits, read, list)


def _mapping_type(entry: _Type) -> _Type:
    def fits(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return all(isinstance(key, str) and entry.fits(found) for key, found in value.items())

    def read(value: Any, place: _Place) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: entry.read(found, place.field(key)) for key, found in value.items()}

    return _Type(f"an object of which each value is {entry.words}", fits, read, Mapping)


def _as_it_is(value: Any, _place: _Place) -> Any:
    return value


def _is_integer(value: Any) -> bool:
    return type(value) is int and -MAX_INTEGER <= value <= MAX_INTEGER


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (type(value) is float and math.isfinite(value))


def _read_number(value: Any, _place: _Place) -> Any:
    # A whole number is a float to whoever writes JSON.
    return float(value) if _is_integer(value) else value


_PLAIN = (bool, int, float, str)
_PLAIN_TYPES: Mapping[Any, _Type] = {
    Any: _Type("any value", lambda value: True, _as_it_is),
    type(None): _Type("nothing (null)", lambda value: value is None, _as_it_is),
    bool: _Type("true or false", lambda value: type(value) is bool, _as_it_is),
    int: _Type(f"{_INTEGER} from {-MAX_INTEGER} to {MAX_INTEGER}", _is_integer, _as_it_is),
    float: _Type(_NUMBER, _is_number, _read_number),
    str: _Type("a string", lambda value: isinstance(value, str), _as_it_is),
}
