from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.bundle.manifest import (
    SCHEMA_VERSION,
    ExportRecord,
    FileRecord,
    Manifest,
    PartRecord,
    SourceFile,
    SourceRecord,
    VariantRecord,
    checked_relative_name,
    manifest_from_bytes,
)
from vlm_export.bundle.strict_json import MAX_JSON_BYTES
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.specs import ImageSpec, Origins, Resample, RgbStage, TextSpec, TileSpec, Transparency
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, FeatureSpec, TaskSpec

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
    st.one_of(st.none(), texts),
    st.lists(source_names, max_size=2).map(tuple),
    st.lists(source_names, max_size=2).map(tuple),
)
some_texts = st.lists(texts, max_size=2).map(tuple)
exports = st.builds(
    ExportRecord,
    texts,
    json_objects,
    st.one_of(st.none(), texts),
    st.dictionaries(texts, some_texts, max_size=2),
    some_texts,
    some_texts,
    some_texts,
    st.one_of(st.none(), json_objects),
)
cut_images = st.sampled_from(
    [TileSpec(32, 64, resize_to_max_side=True, global_tile=False), slice_spec_from_version("2.6", queries=64)]
)
manifests = st.builds(
    Manifest,
    name=texts,
    source=sources,
    family=texts,
    architecture=json_objects,
    image=st.one_of(st.none(), images, cut_images),
    text=st.one_of(st.none(), text_specs),
    tasks=st.just(()),
    parts=st.lists(parts, min_size=1, max_size=2, unique_by=lambda part: part.name).map(tuple),
    origins=st.builds(Origins, st.dictionaries(texts, texts, max_size=2), st.dictionaries(texts, texts, max_size=2)),
    export=exports,
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
        replace(manifest, architecture={"eps": float("nan")}).to_bytes()


def json_of(manifest: Manifest) -> dict[str, Any]:
    """What `vlm_export.json` holds."""
    data: dict[str, Any] = json.loads(manifest.to_bytes())
    return data


def read(data: Any) -> Manifest:
    return manifest_from_bytes(json.dumps(data).encode())


def test_the_schema_stands_first(manifest: Manifest) -> None:
    assert next(iter(json_of(manifest).items())) == ("schema_version", SCHEMA_VERSION)
    assert manifest.to_json() == json_of(manifest)


def test_another_schema_is_refused_with_what_to_do(manifest: Manifest) -> None:
    data = json_of(manifest)
    with pytest.raises(InputError, match=r"made by a newer vlm-export[\s\S]*upgrade"):
        read({**data, "schema_version": SCHEMA_VERSION + 1, "something": "new"})
    with pytest.raises(InputError, match=r"made by an older vlm-export[\s\S]*export the model again"):
        read({"schema_version": 1, "name": "tiny", "facts": {}})
    for version in (0, -1, "2", 2.0, True, None, [2]):
        with pytest.raises(InputError, match="schema_version is no version"):
            read({**data, "schema_version": version})


def test_unknown_and_missing_fields(manifest: Manifest) -> None:
    data = json_of(manifest)
    with pytest.raises(InputError, match=r"unknown field 'famly'[\s\S]*did you mean 'family'"):
        read({**data, "famly": 1})
    del data["parts"][0]["variants"][0]["opset"]
    with pytest.raises(InputError, match=r"parts\[0\]\.variants\[0\][\s\S]*no opset"):
        read(data)


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below `data`, inner nodes included."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from _leaves(value, (*path, key))


def test_no_odd_value_gives_another_error(manifest: Manifest) -> None:
    """Every value is replaced by every kind of junk in turn: it is read, or refused with an InputError."""
    data = json_of(replace(manifest, files={"a": FileRecord(1, "0" * 64)}))
    read(data)
    refused = 0
    for path in _leaves(data):
        junk: Any
        for junk in (None, True, -1, 1.5, 2**70, "x", "../x", [], [[]], [None], {}, {"x": {}}):
            broken = copy.deepcopy(data)
            inner: Any = broken
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            try:
                read(broken)
            except InputError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b'{"schema_version": 2, "na', "cut off"),
        (b"[]", "no object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "not a finite number"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 characters"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"schema_version": 2, "x": "' + b"[" * 1000 + b'"}', "unknown field"),
        (b" " * (MAX_JSON_BYTES + 1), "too large"),
        (b"{}", "no schema_version"),
        (b'{"schema_version": "2"}', "is no version"),
        (b'{"schema_version": true}', "is no version"),
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


def test_a_file_name_that_leaves_the_bundle_is_refused_wherever_it_stands(manifest: Manifest) -> None:
    data = json_of(manifest)
    record = {"size_bytes": 1, "sha256": "0" * 64}
    with pytest.raises(InputError, match="not a plain path") as caught:
        read({**data, "files": {"../x": record}})
    assert caught.value.where == "vlm_export.json: files"
    for field, value in (("file", "/x.onnx"), ("external_data", ["../x"])):
        changed = copy.deepcopy(data)
        changed["parts"][0]["variants"][0][field] = value
        with pytest.raises(InputError, match="not a plain path") as caught:
            read(changed)
        assert caught.value.where == f"vlm_export.json: parts[0].variants[0].{field}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("source.random_weights_seed", -1),
        ("source.files.0.sha256", "AB" * 32),
        ("source.dropped_keys", [1]),
        ("export.keep_fp32", {"vision": "Softmax"}),
        ("export.warnings", "none"),
        ("parts.0.variants.0.oldest_onnxruntime", "1.23"),
        ("parts.0.variants.0.opset", 0),
        ("parts.0.variants.0.simplified", 1),
        ("parts.0.variants", []),
        ("parts", []),
        ("tools", {"onnx": 1}),
    ],
)
def test_odd_records_are_named(manifest: Manifest, path: str, value: Any) -> None:
    data = json_of(manifest)
    *outer, name = path.split(".")
    group: Any = data
    for key in outer:
        group = group[int(key) if key.isdecimal() else key]
    group[name] = value
    with pytest.raises(InputError) as caught:
        read(data)
    assert f"'{name}'" in caught.value.what
    assert caught.value.where.startswith("vlm_export.json")


def test_two_of_one_name(manifest: Manifest) -> None:
    data = json_of(manifest)
    with pytest.raises(InputError, match="two parts have the name 'vision'"):
        read({**data, "parts": data["parts"] * 2})
    with pytest.raises(InputError, match="two tasks have the name 'embed'"):
        read({**data, "tasks": data["tasks"] * 2})
    data["parts"][0]["variants"] *= 2
    with pytest.raises(InputError, match="two variants have the name 'fp32'"):
        read(data)


EXAMPLES = runpy.run_path(str(Path(__file__).parents[1] / "specs" / "test_tasks.py"))
CHAT, CAPTION = EXAMPLES["PLACEHOLDERS"], EXAMPLES["CAPTION"]
TILES = replace(EXAMPLES["TILES"], tile_tokens={f"r{row}c{column}": "<t>" for row in (1, 2) for column in (1, 2)})
CUT = TileSpec(8, 16, resize_to_max_side=True, global_tile=True)


def able_to(manifest: Manifest, task: TaskSpec, **changes: Any) -> Manifest:
    """The manifest with that task, the parts that it runs, and a vocabulary that has its tokens."""
    part = manifest.parts[0]
    parts = tuple(replace(part, name=name) for name in dict.fromkeys(task.parts))
    text = replace(manifest.text or TextSpec(16, 400, 99, 0, "none"), vocab_size=400)
    return replace(manifest, **{"tasks": (task,), "parts": parts, "text": text, **changes})


def test_a_task_is_found_by_its_kind(manifest: Manifest) -> None:
    assert manifest.task(EmbedSpec) == manifest.tasks[0]
    assert manifest.task(FeatureSpec) is None
    for task, image in ((CHAT, manifest.image), (CAPTION, manifest.image), (TILES, CUT)):
        again = manifest_from_bytes(able_to(manifest, task, image=image).to_bytes())
        assert again.tasks == (task,)
        assert again.image == image


def test_a_task_of_an_unknown_kind_is_refused(manifest: Manifest) -> None:
    data = json_of(manifest)
    data["tasks"][0]["kind"] = "paint"
    with pytest.raises(InputError, match="'kind'") as caught:
        read(data)
    assert caught.value.where == "vlm_export.json: tasks[0]"
    assert "'embed', 'match', 'caption', 'answer', 'chat', 'features'" in caught.value.expected


def test_a_task_runs_parts_of_the_bundle(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="'tasks'") as caught:
        replace(manifest, tasks=(EmbedSpec(EncoderSpec("image", "image_embeds"), None),))
    assert caught.value.expected == "embed to run parts of the bundle: vision"
    with pytest.raises(InputError, match="no output 'pooled'"):
        replace(manifest, tasks=(EmbedSpec(EncoderSpec("vision", "pooled"), None),))
    with pytest.raises(InputError, match="'tasks'"):
        able_to(manifest, CAPTION, parts=manifest.parts)


@pytest.mark.parametrize(
    ("task", "size"),
    [(CAPTION, 156), (CHAT, 320), (replace(CHAT, pad_token_id=399), 399), (replace(CHAT, eos_token_ids=(2, 350)), 350)],
)
def test_token_ids_are_below_the_vocabulary(manifest: Manifest, task: TaskSpec, size: int) -> None:
    text = TextSpec(16, size + 1, 99, 0, "none")
    able_to(manifest, task, text=text)
    with pytest.raises(InputError, match="token id that the vocabulary lacks") as caught:
        able_to(manifest, task, text=replace(text, vocab_size=size))
    assert caught.value.where == f"tasks.{task.kind}"
    with pytest.raises(InputError, match="'text'"):
        able_to(manifest, task, text=None)


def test_tiles_and_the_layout_agree(manifest: Manifest) -> None:
    able_to(manifest, TILES, image=CUT)
    slices = slice_spec_from_version("2.6", queries=64)
    for task, image in ((TILES, manifest.image), (CHAT, CUT), (CHAT, None), (TILES, None), (CHAT, slices)):
        with pytest.raises(InputError, match="'image'"):
            able_to(manifest, task, image=image)


def test_every_tile_has_a_marker(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="no token that says where") as caught:
        able_to(manifest, TILES, image=replace(CUT, max_side_pixels=24))
    assert caught.value.got == "no r1c3, r2c3, r3c1, r3c2"


def test_features_are_of_slices(manifest: Manifest) -> None:
    able_to(manifest, FeatureSpec("vision"), image=slice_spec_from_version("2.6", queries=64))
    with pytest.raises(InputError, match="'image'"):
        able_to(manifest, FeatureSpec("vision"))
