"""JSON from an untrusted file: bounded in size and depth, and no duplicate keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from vlm_export.errors import InputError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 200
MAX_INTEGER = 2**63 - 1
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
