"""Signatures travel through JSON with their axes' relations, and odd ones are refused with their path."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_export.errors import InputError
from vlm_export.specs.signature import Axis, Signature, TensorSpec

RELATED = Signature(
    (TensorSpec("x", "float32", ("batch", "new", "all", 3)),),
    (TensorSpec("y", "float32", ("batch", "kept", "height")),),
    (
        Axis("batch"),
        Axis("new", 1, 8),
        Axis("past", 0, 8),
        Axis("all", 1, 8, sum_of=("past", "new")),
        Axis("kept", 1, 8, at_most="new"),
        Axis("height", 14, 140, multiple_of=14),
    ),
)


def test_axes_keep_their_relations() -> None:
    assert Signature.from_json(RELATED.to_json(), "test") == RELATED


def changed(group: str, index: int, field: str, value: Any) -> dict[str, Any]:
    data = RELATED.to_json()
    data[group][index][field] = value
    return data


@pytest.mark.parametrize(
    ("group", "index", "field", "value", "says"),
    [
        ("axes", 4, "at_most", 3, "'at_most'"),
        ("axes", 4, "at_most", "nowhere", "'kept' to be the sum of"),
        ("axes", 3, "sum_of", "past", "'sum_of'"),
        ("axes", 3, "sum_of", ["nowhere"], "'all' to be the sum of"),
        ("axes", 5, "multiple_of", 0, "'multiple_of'"),
        ("axes", 4, "at_least", "new", "'at_least'"),
        ("axes", 1, "minimum", -1, "'minimum'"),
        ("axes", 1, "maximum", 0, "'maximum'"),
        ("axes", 1, "name", "batch", "axes of different names"),
        ("inputs", 0, "name", None, "'name'"),
        ("inputs", 0, "dtype", "float8", "'dtype'"),
        ("inputs", 0, "shape", ["batch", -1], "'shape'"),
        ("inputs", 0, "shape", ["batch", True], "'shape'"),
        ("inputs", 0, "shape", ["batch", 1.0], "'shape'"),
        ("inputs", 0, "shape", "batch", "'shape'"),
        ("outputs", 0, "shape", ["width"], "not width"),
    ],
)
def test_odd_entries_are_named(group: str, index: int, field: str, value: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        Signature.from_json(changed(group, index, field, value), "file: signature")
    assert says in str(caught.value)
    assert caught.value.where in ("file: signature", f"file: signature.{group}[{index}]")


def test_the_path_leads_to_the_tensor() -> None:
    with pytest.raises(InputError) as caught:
        Signature.from_json(changed("inputs", 0, "dtype", "float8"), "file: parts[0].signature")
    assert caught.value.where == "file: parts[0].signature.inputs[0]"


def test_a_signature_made_in_code_is_checked_alike() -> None:
    with pytest.raises(InputError, match="not rows"):
        Signature((TensorSpec("x", "float32", ("rows",)),), (), (Axis("batch"),))
    with pytest.raises(InputError, match="'maximum'"):
        Axis("batch", 4, 2)
