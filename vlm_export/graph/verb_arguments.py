"""Arguments of the graph verbs: the same declarations read a command line and a recipe. Imports nothing heavy."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlm_export.errors import UsageError

Kind = Literal[
    "text", "texts", "integer", "size", "value", "axis", "pairs", "shapes", "versions", "values", "operands",
    "connections", "model",
]  # fmt: skip
# Those that take several words of a command line.
_SEVERAL = ("connections", "texts", "pairs", "shapes", "versions", "values", "operands")
_LARGEST = (1 << 63) - 1
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Argument:
    """One argument of a verb.

    Attributes:
        name: in a recipe; on the command line with dashes, as `--name`, or as what stands there if positional.
        keyword: of the function; by default the name.
        none_if_absent: the function wants to be told that there is none.
    """

    name: str
    kind: Kind
    help: str
    keyword: str = ""
    positional: bool = False
    required: bool = False
    metavar: str = ""
    none_if_absent: bool = False

    @property
    def must_be_given(self) -> bool:
        return self.required or self.positional

    @property
    def target(self) -> str:
        return self.keyword or self.name

    @property
    def takes_several(self) -> bool:
        return self.kind in _SEVERAL


def value_from_words(argument: Argument, words: Any) -> Any:
    """Returns the function's value from a command line's words; UsageError where they are of another form."""
    if argument.kind == "connections":
        return _checked(argument, [_pair(argument, word) for word in words])
    if argument.kind in ("pairs", "shapes", "versions", "values"):
        pairs = [_pair(argument, word) for word in words]
        twice = [name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number])]
        if twice:
            raise UsageError(f"{argument.name} names {twice[0]!r} twice", got=" ".join(words), fix="give it once")
        return _checked(argument, dict(pairs))
    return _checked(argument, words)


def value_from_yaml(argument: Argument, value: Any) -> Any:
    """Returns the function's value from a recipe, where numbers, lists and mappings may stand for texts."""
    if argument.takes_several and argument.kind in ("texts", "operands") and isinstance(value, str):
        value = [value]
    return _checked(argument, value)


def _checked(argument: Argument, value: Any) -> Any:
    try:
        return _READERS[argument.kind](value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{argument.name} is of another form",
            expected=argument.help,
            got=repr(value)[:400] + (f" ({error})" if isinstance(error, ValueError) and str(error) else ""),
        ) from error


def _pair(argument: Argument, word: str) -> tuple[str, str]:
    # Names of tensors may hold "=" less often than values do.
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise UsageError(f"{argument.name} is given as NAME=VALUE", got=word, expected=argument.help)
    return name, value


def read_size(text: str | int) -> int:
    """Reads a number of bytes: `2GB`, `64MiB`, `1000`."""
    found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError("a size is a number with B, KB, MB, GB, KiB, MiB or GiB")
    return int(found[1]) * _UNITS[found[2].upper()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    # What a terminal sends need not be text; ValueError then.
    value.encode("utf-8")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return [_text(entry) for entry in value]


def _integer(value: Any) -> int:
    if isinstance(value, bool | float):
        raise TypeError
    number = int(value)
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError("beyond 64 bits")
    return number


def _literal(value: Any) -> Any:
    """A Python literal, otherwise the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return _python_literal(value)
    except ValueError:
        return value


def _python_literal(text: str) -> Any:
    """The value of a number, text, list, …; ValueError where it is none."""
    try:
        return ast.literal_eval(text)
    # The parser's own limits end in the last two.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("not a number or a list of numbers") from error


def _axis(value: Any) -> int | str | None:
    if value in ("?", None):
        return None
    is_number = isinstance(value, int | float) or re.fullmatch(r"[-+]?\d[\d.]*", value) is not None
    if not is_number:
        return _text(value)
    size = _integer(value)
    if size < 0:
        raise ValueError("a size is a whole number from 0 up")
    return size


def _shape(value: Any) -> list[int | str | None]:
    if isinstance(value, str):
        value = [entry.strip() for entry in value.strip("()[] ").split(",")]
        if value[-1] == "":
            value.pop()
    if not isinstance(value, list | tuple):
        raise TypeError
    if "" in value:
        raise ValueError("an axis is missing: ? stands for one that is not known")
    return [_axis(entry) for entry in value]


def _each(read: Callable[[Any], Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda value: {_text(name): read(entry) for name, entry in value.items()}


def _operand(value: Any) -> Any:
    """A tensor's name, "" for an input that is left out, or a constant: `int64:[0, 1]`."""
    if value is None or value == "":
        return None
    dtype, _, literal = _text(value).partition(":")
    if dtype not in ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"):
        return value
    return _constant(_python_literal(literal), dtype)


def _constant(value: Any, dtype: str) -> Any:
    """An array of numbers; ValueError where the dtype cannot hold them: whole numbers exactly, others as finite."""
    import numpy as np

    given = np.asarray(value)
    if given.dtype.kind not in "biuf":
        # Whole numbers beyond 64 bits, texts, and what is no array.
        raise ValueError(f"not numbers of {dtype}")
    with np.errstate(all="ignore"):
        array = given.astype(dtype)
        is_real = array.dtype.kind == "f"
        fits = np.isfinite(array) | ~np.isfinite(given) if is_real else array == given
    if not fits.all():
        raise ValueError(f"{dtype} cannot hold these numbers")
    return array


def _model(value: Any) -> Any:
    from vlm_export.graph.core.files import open_model

    return open_model(_text(value))


def _connections(value: Any) -> list[tuple[str, str]]:
    """A mapping, or pairs: one output may feed several inputs."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return [(_text(out), _text(into)) for out, into in pairs]


def _versions(value: Mapping[str, Any]) -> dict[str, int]:
    return {"" if domain == "ai.onnx" else domain: _integer(version) for domain, version in value.items()}


_READERS: Mapping[Kind, Callable[[Any], Any]] = {
    "text": _text,
    "texts": _texts,
    "integer": _integer,
    "size": read_size,
    "value": _literal,
    "axis": _axis,
    "pairs": _each(_text),
    "shapes": _each(_shape),
    "versions": _versions,
    "values": _each(_literal),
    "operands": lambda value: [_operand(entry) for entry in value],
    "connections": _connections,
    "model": _model,
}
