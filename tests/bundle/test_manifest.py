from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.bundle.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    PartRecord,
    SourceFile,
    SourceRecord,
    VariantRecord,
    checked_relative_name,
    manifest_from_bytes,
    manifest_from_json,
)
from vlm_export.bundle.strict_json import MAX_JSON_BYTES
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.specs import ImageSpec, Origins, Resample, RgbStage, TextSpec, Transparency
from vlm_export.specs.signature import Axis, Signature, TensorSpec

texts = st.text(max_size=12)
# What Python makes of a file name that is not UTF-8.
source_names = st.one_of(texts, st.just("caf\udce9.pt"))
sizes = st.integers(0, 2**62)
hashes = st.from_regex(r"\A[0-9a-f]{64}\Z")
names = st.from_regex(r"\A[a-z]{1,4}(/[a-zA-Z0-9 _.\-ü]{1,6}x){0,2}\Z")
numbers = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)
unit = st.floats(0.001, 1.0)
images = st.builds(
    ImageSpec,
    st.integers(1, 1024),
    st.sampled_from(get_args(Resample)),
    st.sampled_from(get_args(RgbStage)),
    st.tuples(unit, unit, unit),
    st.tuples(unit, unit, unit),
    st.just("stretch"),
    st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
    st.sampled_from(["down", "nearest_even"]),
    st.sampled_from(get_args(Transparency)),
    st.floats(0.001, 1.0),
)
text_specs = st.builds(
    TextSpec,
    st.integers(1, 512),
    st.just(500),
    st.integers(0, 499),
    st.integers(0, 499),
    st.sampled_from(["openai", "none"]),
)
signatures = st.lists(texts, unique=True, min_size=1, max_size=3).flatmap(
    lambda axes: st.builds(
        lambda shape, dtype: Signature(
            (TensorSpec("in", dtype, tuple(shape)),),
            (TensorSpec("out", "float32", (axes[0],)),),
            tuple(Axis(name, 1, None if name == axes[0] else 77) for name in axes),
        ),
        st.lists(st.one_of(st.sampled_from(axes), st.integers(0, 999)), max_size=4),
        st.sampled_from(["float32", "int64", "bool"]),
    )
)
variants = st.builds(
    VariantRecord,
    precision=st.sampled_from(["fp32", "fp16", "int8"]),
    file=names,
    external_data=st.lists(names, max_size=2).map(tuple),
    opset=st.integers(11, 23),
    exporter=texts,
    simplified=st.booleans(),
    oldest_onnxruntime=st.sampled_from(["1.15.1", "1.23.0"]),
    warnings=st.lists(texts, max_size=2).map(tuple),
    verification=st.one_of(st.none(), json_objects),
)
parts = st.builds(
    PartRecord,
    texts,
    signatures,
    st.lists(variants, min_size=1, max_size=3, unique_by=lambda v: v.precision).map(tuple),
)
sources = st.builds(
    SourceRecord,
    source_names,
    texts,
    st.one_of(st.none(), texts),
    st.one_of(st.none(), st.integers(0, 2**31)),
    st.lists(st.builds(SourceFile, source_names, sizes, hashes), max_size=2).map(tuple),
)
manifests = st.builds(
    Manifest,
    name=texts,
    source=sources,
    family=texts,
    architecture=json_objects,
    facts=json_objects,
    image=st.one_of(st.none(), images),
    text=st.one_of(st.none(), text_specs),
    parts=st.lists(parts, min_size=1, max_size=2, unique_by=lambda part: part.name).map(tuple),
    origins=st.builds(Origins, st.dictionaries(texts, texts, max_size=2), st.dictionaries(texts, texts, max_size=2)),
    tools=st.dictionaries(texts, texts, max_size=2),
    files=st.dictionaries(names, st.builds(FileRecord, sizes, hashes), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(manifests)
def test_round_trip(manifest: Manifest) -> None:
    raw = manifest.to_bytes()
    again = manifest_from_bytes(raw)
    assert again == manifest
    assert again.to_bytes() == raw


def test_the_same_export_gives_the_same_bytes(manifest: Manifest) -> None:
    files = {"b": FileRecord(1, "0" * 64), "a": FileRecord(2, "1" * 64)}
    first = replace(manifest, files=files, tools={"x": "1", "a": "2"})
    second = replace(manifest, files=dict(reversed(files.items())), tools={"a": "2", "x": "1"})
    assert first.to_bytes() == second.to_bytes()
    assert first.to_bytes().endswith(b"}\n")


def test_parts_and_variants_are_found_by_name(manifest: Manifest) -> None:
    assert manifest.part("vision").variant("fp32").file == "onnx/vision_model.onnx"
    with pytest.raises(InputError, match="did you mean 'vision'"):
        manifest.part("visoin")
    with pytest.raises(UsageError, match="did you mean 'fp32'"):
        manifest.part("vision").variant("fp3")


def test_numbers_that_json_lacks_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(manifest, facts={"logit_scale": float("nan")}).to_bytes()


def test_a_newer_schema_says_to_upgrade(manifest: Manifest) -> None:
    data = {**manifest.to_json(), "schema_version": SCHEMA_VERSION + 1, "something": "new"}
    with pytest.raises(InputError, match=r"newer vlm-export[\s\S]*upgrade"):
        manifest_from_json(data)


def test_unknown_and_missing_fields(manifest: Manifest) -> None:
    data = manifest.to_json()
    with pytest.raises(InputError, match=r"unknown field 'famly'[\s\S]*did you mean 'family'"):
        manifest_from_json({**data, "famly": 1})
    del data["parts"][0]["variants"][0]["opset"]
    with pytest.raises(InputError, match=r"parts\[0\]\.variants\[0\][\s\S]*no \['opset'\]"):
        manifest_from_json(data)


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below `data`, inner nodes included."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from _leaves(value, (*path, key))


def test_no_odd_value_gives_another_error(manifest: Manifest) -> None:
    """Every value is replaced by every kind of junk in turn: it is read, or refused with an InputError."""
    data = replace(manifest, files={"a": FileRecord(1, "0" * 64)}).to_json()
    manifest_from_json(data)
    refused = 0
    for path in _leaves(data):
        junk: Any
        for junk in (None, True, -1, 1.5, 2**80, "x", "../x", [], [[]], [None], {}, {"x": {}}):
            broken = copy.deepcopy(data)
            inner: Any = broken
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            try:
                manifest_from_json(broken)
            except InputError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b'{"schema_version": 1, "na', "cut off"),
        (b"[]", "no object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "not a finite number"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 characters"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"schema_version": 1, "x": "' + b"[" * 1000 + b'"}', "unknown field"),
        (b" " * (MAX_JSON_BYTES + 1), "too large"),
        (b"{}", "no schema_version"),
        (b'{"schema_version": "1"}', "another type"),
        (b'{"schema_version": true}', "another type"),
    ],
)
def test_bad_content(raw: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        manifest_from_bytes(raw)


def test_every_cut_is_noticed(manifest: Manifest) -> None:
    raw = manifest.to_bytes()
    for length in range(0, len(raw) - 2, 7):
        with pytest.raises(VlmExportError):
            manifest_from_bytes(raw[:length])


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", "a\\..\\b", "C:x", "a\0b", "a\nb", "a\udcffb"],
)
def test_names_that_leave_the_bundle(name: str) -> None:
    with pytest.raises(InputError, match="not a plain path"):
        checked_relative_name(name, "test")


@pytest.mark.parametrize("name", ["a", "onnx/model.onnx", "größe/..x/…"])
def test_plain_names(name: str) -> None:
    assert checked_relative_name(name, "test") == name


def test_a_bundle_has_parts_and_each_has_variants(manifest: Manifest) -> None:
    empty = replace(manifest, parts=()), replace(manifest, parts=(replace(manifest.parts[0], variants=()),))
    for changed, field in zip(empty, ("parts", "variants"), strict=True):
        with pytest.raises(InputError, match=f"field '{field}'") as caught:
            manifest_from_bytes(changed.to_bytes())
        assert "at least one" in caught.value.expected


def test_two_parts_of_one_name(manifest: Manifest) -> None:
    data = manifest.to_json()
    with pytest.raises(InputError, match="two parts have the name 'vision'"):
        manifest_from_json({**data, "parts": data["parts"] * 2})
    data["parts"][0]["variants"] *= 2
    with pytest.raises(InputError, match="two variants have the name 'fp32'"):
        manifest_from_json(data)


def test_manifest_is_plain_json(manifest: Manifest) -> None:
    assert json.loads(manifest.to_bytes()) == manifest.to_json()
