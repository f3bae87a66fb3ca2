"""The manifest of a Bundle, `vlm_export.json`: what was exported from what, and every file with size and sha256."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_export.bundle.spec_fields import (
    image_spec_from_fields,
    origins_from_fields,
    signature_from_fields,
    text_spec_from_fields,
)
from vlm_export.bundle.strict_json import Fields, json_object_from_bytes
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.signature import Signature
from vlm_export.specs import ImageSpec, Origins, TextSpec

MANIFEST_NAME = "vlm_export.json"
SCHEMA_VERSION = 1
# In the order in which a bundle is used by those who do not choose.
PRECISIONS = ("fp32", "fp16", "int8")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\\:]")


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 (64 lower-case hexadecimal digits) of a file of the bundle."""

    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"size_bytes": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class SourceFile:
    """A file of the checkpoint: name relative to it, size and sha256."""

    name: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "size_bytes": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights come from.

    Attributes:
        name: what the user named.
        format: how the tensors were stored (`vlm_export.family.CheckpointFormat`).
        revision: the resolved commit of a hub id.
        random_weights_seed: set when the weights are seeded random numbers, not a published checkpoint.
        files: every file that was read.
    """

    name: str
    format: str
    revision: str | None = None
    random_weights_seed: int | None = None
    files: tuple[SourceFile, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "format": self.format,
            "revision": self.revision,
            "random_weights_seed": self.random_weights_seed,
            "files": [entry.to_json() for entry in self.files],
        }


@dataclass(frozen=True)
class VariantRecord:
    """One Part at one precision.

    Attributes:
        precision: "fp32", "fp16", "int8", …
        file: the graph, relative to the bundle.
        external_data: the graph's weight files, relative to the bundle.
        opset, exporter, simplified: how the graph was made.
        oldest_onnxruntime: the oldest release of ONNX Runtime that loads the graph (`bundle/oldest_engine.py`).
        warnings: what the user should know about this graph.
        verification: the comparison with the Reference as JSON data, or None when there was none.
    """

    precision: str
    file: str
    external_data: tuple[str, ...] = ()
    opset: int = 18
    exporter: str = "dynamo"
    simplified: bool = False
    oldest_onnxruntime: str = "1.18.0"
    warnings: tuple[str, ...] = ()
    verification: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "file": self.file,
            "external_data": list(self.external_data),
            "opset": self.opset,
            "exporter": self.exporter,
            "simplified": self.simplified,
            "oldest_onnxruntime": self.oldest_onnxruntime,
            "warnings": list(self.warnings),
            "verification": None if self.verification is None else dict(self.verification),
        }


@dataclass(frozen=True)
class PartRecord:
    """One Part: its name, Signature and variants."""

    name: str
    signature: Signature
    variants: tuple[VariantRecord, ...]

    def variant(self, precision: str) -> VariantRecord:
        """The variant of that precision; UsageError when the bundle has none."""
        for variant in self.variants:
            if variant.precision == precision:
                return variant
        known = [variant.precision for variant in self.variants]
        raise UsageError(f"part {self.name!r} has no variant {precision!r}", fix=suggestion(precision, known))

    def chosen_variants(self, precision: str | None) -> tuple[VariantRecord, ...]:
        """All variants, or the one of that precision; UsageError when there is none."""
        return self.variants if precision is None else (self.variant(precision),)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "signature": self.signature.to_json(),
            "variants": [variant.to_json() for variant in self.variants],
        }


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says about itself.

    Attributes:
        name: of the bundle, for people.
        architecture, facts: JSON data of the family (sizes; `logit_scale`, …).
        origins: where each value of `image` and `text` comes from, and which files were not read.
        tools: name → version of each tool that took part.
        files: path relative to the bundle → size and sha256 of every file but the manifest; publication fills it.
    """

    name: str
    source: SourceRecord
    family: str
    architecture: Mapping[str, Any]
    facts: Mapping[str, Any]
    image: ImageSpec | None
    text: TextSpec | None
    parts: tuple[PartRecord, ...]
    origins: Origins = field(default_factory=Origins)
    tools: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def part(self, name: str) -> PartRecord:
        """The part of that name; InputError when the bundle has none."""
        for part in self.parts:
            if part.name == name:
                return part
        fix = suggestion(name, [part.name for part in self.parts])
        raise InputError(f"the bundle {self.name!r} has no part {name!r}", fix=fix)

    def default_precision(self) -> str:
        """The variant for a user who names none: float32 where every part has it, otherwise the only one.

        Raises:
            UsageError: there are several and none is float32.
        """
        shared = [name for name in PRECISIONS if all(name in _precisions(part) for part in self.parts)]
        if PRECISIONS[0] in shared or len(shared) == 1:
            return shared[0]
        raise UsageError(
            "the bundle's parts have no variant in common that is the default",
            where=self.name,
            expected=" or ".join(shared) or "one variant of all parts",
            got="no choice",
            fix="name one with --precision",
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON data; `manifest_from_json` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "source": self.source.to_json(),
            "family": self.family,
            "architecture": dict(self.architecture),
            "facts": dict(self.facts),
            "image": None if self.image is None else _with_lists(self.image.to_json()),
            "text": None if self.text is None else self.text.to_json(),
            "parts": [part.to_json() for part in self.parts],
            "origins": self.origins.to_json(),
            "tools": {name: self.tools[name] for name in sorted(self.tools)},
            "files": {name: self.files[name].to_json() for name in sorted(self.files)},
        }

    def to_bytes(self) -> bytes:
        """The content of `vlm_export.json`: the same manifest gives the same bytes; ValueError on NaN or infinity."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # A source path that is not UTF-8 holds lone surrogates; as \udcXX they are valid JSON and read back equal.
        return text.encode("utf-8", "backslashreplace")


def _precisions(part: PartRecord) -> set[str]:
    return {variant.precision for variant in part.variants}


def _with_lists(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def manifest_from_bytes(raw: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest in the content of `vlm_export.json`; InputError when it is anything else."""
    return manifest_from_json(json_object_from_bytes(raw, where), where)


def manifest_from_json(data: Mapping[str, Any], where: str = MANIFEST_NAME) -> Manifest:
    """The Manifest that `Manifest.to_json` wrote; InputError on another schema, unknown, missing or odd fields."""
    top = Fields(data, where)
    _check_schema(top)
    top.only(("schema_version", *_names(Manifest)))
    parts = top.some("parts", _part_from_fields)
    _check_unique([part.name for part in parts], "parts", where)
    tools = top.fields("tools")
    files = top.fields("files")
    return Manifest(
        name=top.text("name"),
        source=_source_from_fields(top.fields("source")),
        family=top.text("family"),
        architecture=top.mapping("architecture"),
        facts=top.mapping("facts"),
        image=None if data["image"] is None else image_spec_from_fields(top.fields("image")),
        text=None if data["text"] is None else text_spec_from_fields(top.fields("text")),
        parts=parts,
        origins=origins_from_fields(top.fields("origins")),
        tools={name: tools.text(name) for name in tools.data},
        files={checked_relative_name(name, files.where): _file_from_fields(files.fields(name)) for name in files.data},
    )


def checked_relative_name(name: str, where: str) -> str:
    """`name`, when it is a plain relative path with `/` that stays inside its directory on every platform.

    Raises:
        InputError: empty, absolute, with `.`, `..` or empty segments, backslashes, colons or control characters.
    """
    if _CONTROL.search(name) or any(segment in ("", ".", "..") for segment in name.split("/")):
        raise InputError(
            "a file name is not a plain path inside the bundle",
            where=where,
            expected="segments joined by '/', without '..', a leading '/', backslashes or colons",
            got=repr(name[:200]),
            fix="do not use this bundle; export the model again",
        )
    return name


def _check_schema(top: Fields) -> None:
    if "schema_version" not in top.data:
        raise InputError("the manifest has no schema_version", where=top.where, fix="this is no vlm-export bundle")
    version = top.integer("schema_version", minimum=1)
    if version > SCHEMA_VERSION:
        raise InputError(
            "the bundle was made by a newer vlm-export",
            where=top.where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=f"schema_version {version}",
            fix="upgrade: pip install --upgrade vlm-export",
        )


def _check_unique(names: Iterable[str], kind: str, where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"two {kind} have the name {name!r}", where=where)
        seen.add(name)


def _names(record: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(record))


def _sha256(fields: Fields) -> str:
    text = fields.text("sha256")
    if not _SHA256.fullmatch(text):
        raise fields.fail("sha256", "64 lower-case hexadecimal digits")
    return text


def _release(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not _RELEASE.fullmatch(text):
        raise fields.fail(name, "a release, as 1.23.0")
    return text


def _file_from_fields(fields: Fields) -> FileRecord:
    fields.only(_names(FileRecord))
    return FileRecord(fields.integer("size_bytes"), _sha256(fields))


def _source_file_from_fields(fields: Fields) -> SourceFile:
    fields.only(_names(SourceFile))
    return SourceFile(fields.text("name"), fields.integer("size_bytes"), _sha256(fields))


def _source_from_fields(fields: Fields) -> SourceRecord:
    fields.only(_names(SourceRecord))
    return SourceRecord(
        name=fields.text("name"),
        format=fields.text("format"),
        revision=fields.text_or_none("revision"),
        random_weights_seed=fields.integer_or_none("random_weights_seed"),
        files=fields.each("files", _source_file_from_fields),
    )


def _part_from_fields(fields: Fields) -> PartRecord:
    fields.only(_names(PartRecord))
    variants = fields.some("variants", _variant_from_fields)
    _check_unique([variant.precision for variant in variants], "variants", fields.where)
    return PartRecord(fields.text("name"), signature_from_fields(fields.fields("signature")), variants)


def _variant_from_fields(fields: Fields) -> VariantRecord:
    fields.only(_names(VariantRecord))
    return VariantRecord(
        precision=fields.text("precision"),
        file=checked_relative_name(fields.text("file"), fields.where),
        external_data=tuple(checked_relative_name(name, fields.where) for name in fields.texts("external_data")),
        opset=fields.integer("opset", minimum=1),
        exporter=fields.text("exporter"),
        simplified=fields.boolean("simplified"),
        oldest_onnxruntime=_release(fields, "oldest_onnxruntime"),
        warnings=fields.texts("warnings"),
        verification=None if fields.data["verification"] is None else fields.mapping("verification"),
    )
