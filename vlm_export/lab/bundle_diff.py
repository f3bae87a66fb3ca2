"""Two bundles compared in what is around their graphs: the model, preparation, tokenizer, tasks and side files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.lab.differences import Difference, Section
from vlm_export.proof.contract_record import read_record
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis

_MOST_FIELDS = 20
_LONGEST_VALUE = 60
LONGEST_TEXT = 40
DIGEST_CHARACTERS = 16


def bundle_differences(left: OpenBundle, right: OpenBundle) -> Iterator[Difference]:
    """All that differs but for graphs: the names and figures of the export itself are no difference."""
    before, after = left.manifest, right.manifest
    yield from _parts(before, after)
    axes = [
        {part.name: {axis.name: axis_of(axis) for axis in part.signature.axes} for part in manifest.parts}
        for manifest in (before, after)
    ]
    for name, stated in axes[0].items():
        yield from field_differences("interface", f"{name} axes", stated, axes[1].get(name, stated))
    yield from field_differences("model", "", {"family": before.family}, {"family": after.family})
    yield from field_differences("model", "architecture", before.architecture, after.architecture)
    yield from field_differences("preparation", "image", spec_json(before.image), spec_json(after.image))
    yield from field_differences("preparation", "text", spec_json(before.text), spec_json(after.text))
    yield from field_differences("contract", "", contract_of(left), contract_of(right))
    mine, theirs = ({str(task.kind): task.to_json() for task in manifest.tasks} for manifest in (before, after))
    yield from field_differences("tasks", "tasks", mine, theirs)
    for name in dict.fromkeys([*side_files(left), *side_files(right)]):
        yield from _json_file("tokenizer" if name == layout.TOKENIZER_NAME else "files", name, left, right)


def side_files(bundle: OpenBundle) -> list[str]:
    """Every listed file that holds neither graphs and weights nor what the proof recorded."""
    manifest = bundle.manifest
    variants = (variant for part in manifest.parts for variant in part.variants)
    graphs = {name for variant in variants for name in (variant.file, *variant.external_data)}
    recorded = (f"{layout.GOLDEN_DIRECTORY}/", layout.LEDGER_NAME)
    return [name for name in manifest.files if name not in graphs and not name.startswith(recorded)]


def axis_of(axis: Axis) -> dict[str, Any]:
    """What an axis states beside its name."""
    return {name: value for name, value in axis.to_json().items() if name != "name" and value not in (None, [])}


def contract_of(bundle: OpenBundle) -> dict[str, Any]:
    """What the original's own code makes of the contract's images and texts."""
    record = read_record(bundle)
    if record is None:
        return {}
    found: dict[str, Any] = {"score": dict(record.score)}
    for image in record.images:
        size = f"{image.size[1]} x {image.size[0]}"
        found[f"image {image.file.rpartition('/')[2]}"] = f"{size} pixels {image.sha256[:DIGEST_CHARACTERS]}"
    for number, text in enumerate(record.texts):
        ids = " ".join(map(str, text.ids))
        found[f"text {number} {text.text[:LONGEST_TEXT]!a}"] = f"{len(text.ids)} ids {text_digest(ids)}"
    return found


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_CHARACTERS]


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
