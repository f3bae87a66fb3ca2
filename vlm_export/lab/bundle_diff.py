"""Two bundles compared in what is around their graphs: the model, preparation, tokenizer, tasks and side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.lab.differences import Difference, Section
from vlm_export.specs.codec import Spec

_MOST_FIELDS = 20
_LONGEST_VALUE = 60
_SIDE_FILES = (layout.CONFIG_NAME, layout.PREPROCESSOR_NAME, layout.TOKENIZER_CONFIG_NAME, "special_tokens_map.json")


def bundle_differences(left: OpenBundle, right: OpenBundle) -> Iterator[Difference]:
    """All that differs but for graphs: the names and figures of the export itself are no difference."""
    before, after = left.manifest, right.manifest
    yield from _parts(before, after)
    yield from field_differences("model", "", {"family": before.family}, {"family": after.family})
    yield from field_differences("model", "architecture", before.architecture, after.architecture)
    yield from field_differences("preparation", "image", spec_json(before.image), spec_json(after.image))
    yield from field_differences("preparation", "text", spec_json(before.text), spec_json(after.text))
    yield from _json_file("tokenizer", layout.TOKENIZER_NAME, left, right)
    mine, theirs = ({str(task.kind): task.to_json() for task in manifest.tasks} for manifest in (before, after))
    yield from field_differences("tasks", "tasks", mine, theirs)
    for name in _SIDE_FILES:
        yield from _json_file("files", name, left, right)


def _parts(before: Manifest, after: Manifest) -> Iterator[Difference]:
    mine, theirs = ({part.name: [v.precision for v in part.variants] for part in m.parts} for m in (before, after))
    for name in dict.fromkeys([*mine, *theirs]):
        if mine.get(name) != theirs.get(name):
            sides = (", ".join(names) if (names := found.get(name)) else "none" for found in (mine, theirs))
            yield Difference("parts", name, "variants", *sides)


def spec_json(spec: Spec | None) -> Mapping[str, Any]:
    """A spec as JSON data; nothing for none."""
    return {} if spec is None else spec.to_json()


def _json_file(section: Section, name: str, left: OpenBundle, right: OpenBundle) -> Iterator[Difference]:
    listed = [name in bundle.manifest.files for bundle in (left, right)]
    if not any(listed):
        return
    if not all(listed):
        yield Difference(section, name, "the file", *("there" if there else "none" for there in listed))
        return
    if left.manifest.files[name] == right.manifest.files[name]:
        return
    try:
        found = [json_object_from_bytes(bundle.file(name).read_bytes(), name) for bundle in (left, right)]
    except InputError:
        yield Difference(section, name, "the content differs, and is no JSON object in one of them")
        return
    yield from field_differences(section, name, *found)


def field_differences(
    section: Section, where: str, left: Mapping[str, Any], right: Mapping[str, Any]
) -> Iterator[Difference]:
    """Fields that differ, by their path; of many the first, and how many more."""
    found = list(_leaves(left, right, where))
    for path, before, after in found[:_MOST_FIELDS]:
        yield Difference(section, path, "value", _value_text(before), _value_text(after))
    if len(found) > _MOST_FIELDS:
        yield Difference(section, where, f"{len(found) - _MOST_FIELDS} more values differ")


_ABSENT = object()


def _leaves(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in dict.fromkeys([*left, *right]):
            name = f"{path}.{key}" if path else str(key)
            yield from _leaves(left.get(key, _ABSENT), right.get(key, _ABSENT), name)
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for index, (before, after) in enumerate(zip(left, right, strict=True)):
            yield from _leaves(before, after, f"{path}[{index}]")
    elif left is _ABSENT or right is _ABSENT or left != right or type(left) is not type(right):
        yield path, left, right


def _value_text(value: Any) -> str:
    if value is _ABSENT:
        return "none"
    text = f"{len(value)} entries" if isinstance(value, list | tuple) and len(value) > 8 else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
