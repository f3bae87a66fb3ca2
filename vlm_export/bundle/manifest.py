"""The manifest of a Bundle, `vlm_export.json`: what was exported from what, and every file with size and sha256."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeAlias

from vlm_export.bundle.loss import LossRecord
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.specs import AnyImageSpec, ImageSpec, Origins, SliceSpec, TextSpec, TileSpec
from vlm_export.specs.codec import Spec, between, matches, not_empty
from vlm_export.specs.signature import Signature
from vlm_export.specs.tasks import ChatSpec, EmbedSpec, FeatureSpec, FoundTask, TaskSpec, find_task

MANIFEST_NAME = "vlm_export.json"
IR_SUFFIX = ".xml"
"""Of graphs in OpenVINO's own form (`bundle/openvino_ir.py`)."""
SCHEMA_VERSION = 2
# In the order in which a bundle is used by those who do not choose.
PRECISIONS = ("fp32", "fp16", "w8a16", "int8", "int8-static", "int4")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\\:]")
Sha256: TypeAlias = Annotated[str, matches(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
Release: TypeAlias = Annotated[str, matches(r"[0-9]{1,4}(\.[0-9]{1,4}){2}", "a release, as 1.23.0")]
Count: TypeAlias = Annotated[int, between(0)]


def is_ir(graph: str | os.PathLike[str]) -> bool:
    """Whether a graph's file is OpenVINO's own form, which no other engine runs."""
    return os.fspath(graph).endswith(IR_SUFFIX)


@dataclass(frozen=True)
class FileRecord(Spec):
    """Size and sha256 (64 lower-case hexadecimal digits) of a file of the bundle."""

    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class SourceFile(Spec):
    """A file of the checkpoint: name relative to it, size and sha256."""

    name: str
    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class SourceRecord(Spec):
    """Where the weights come from.

    Attributes:
        name: what the user named.
        format: how the tensors were stored (`vlm_export.family.CheckpointFormat`).
        revision: the resolved commit of a hub id.
        random_weights_seed: set when the weights are seeded random numbers, not a published checkpoint.
        files: every file that was read.
        licence: of the weights, where a config states it.
        dropped_keys: stored keys that are not weights of the model, left out on purpose.
        shards_left_aside: shards that hold no key of the model, and were not opened.
    """

    name: str
    format: str
    revision: str | None = None
    random_weights_seed: Count | None = None
    files: tuple[SourceFile, ...] = ()
    licence: str | None = None
    dropped_keys: tuple[str, ...] = ()
    shards_left_aside: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariantRecord(Spec):
    """One Part at one precision.

    Attributes:
        precision: "fp32", "fp16", "int8", …
        file: the graph, relative to the bundle.
        external_data: the graph's weight files, relative to the bundle.
        opset, exporter, simplified: how the graph was made; of OpenVINO's own form, the graph that it was made of.
        oldest_onnxruntime: the oldest release of ONNX Runtime that loads the graph (`bundle/oldest_engine.py`); None
            for OpenVINO's own form (`bundle/openvino_ir.py`), which none loads.
        warnings: what the user should know about this graph.
        verification: the comparison with the Reference as JSON data, or None when there was none.
        loss: of a quantised graph, what it loses, and the budget that it is held to; None for any other.
    """

    precision: str
    file: str
    external_data: tuple[str, ...] = ()
    opset: Annotated[int, between(1)] = 18
    exporter: str = "dynamo"
    simplified: bool = False
    oldest_onnxruntime: Release | None = "1.18.0"
    warnings: tuple[str, ...] = ()
    verification: Mapping[str, Any] | None = None
    loss: LossRecord | None = None
    NEWER: ClassVar[frozenset[str]] = frozenset({"loss"})

    def check(self) -> None:
        checked_relative_name(self.file, "file")
        for name in self.external_data:
            checked_relative_name(name, "external_data")
        if (self.oldest_onnxruntime is None) != is_ir(self.file):
            raise self.refusal("oldest_onnxruntime", f"none for {IR_SUFFIX} files alone")


@dataclass(frozen=True)
class PartRecord(Spec):
    """One Part: its name, Signature and variants."""

    name: str
    signature: Signature
    variants: Annotated[tuple[VariantRecord, ...], not_empty("at least one variant")]

    def check(self) -> None:
        _check_unique(self, "variants", [variant.precision for variant in self.variants])
        if not self.signature.inputs or not self.signature.outputs:
            raise self.refusal("signature", "at least one input and one output")

    def variant(self, precision: str) -> VariantRecord:
        """The variant of that precision; UsageError when the bundle has none."""
        for variant in self.variants:
            if variant.precision == precision:
                return variant
        known = [variant.precision for variant in self.variants]
        raise UsageError(f"part {self.name!r} has no variant {precision!r}", fix=suggestion(precision, known))

    def served_by(self, precision: str) -> VariantRecord:
        """The variant that runs where that precision is asked for: it, or float32 where the part was not quantised.

        Raises:
            UsageError: the part has neither.
        """
        known = {variant.precision: variant for variant in self.variants}
        return known.get(precision) or known.get(PRECISIONS[0]) or self.variant(precision)

    def chosen_variants(self, precision: str | None) -> tuple[VariantRecord, ...]:
        """All variants, or the one of that precision, which a part that was not quantised lacks."""
        return tuple(variant for variant in self.variants if precision in (None, variant.precision))


@dataclass(frozen=True)
class ExportRecord(Spec):
    """How the bundle was made, and what its user should know.

    Attributes:
        reference: who computed the Reference.
        build: what the user chose about the modules (`vlm_export.family.BuildOptions`), as JSON data.
        target: the runtime that the graphs are meant for; None for any.
        keep_fp32: part → kinds of operators that half precision leaves in float32.
        warnings: what was assumed because neither the checkpoint nor the options say it.
        notes: what was decided while the checkpoint was read.
        image_processor_differs: where readers of the published `preprocessor_config.json` make other pixels.
        contract: what the proof of the contract found, as JSON data; None before it was made.
        packaged_for: the software that a package was made for; None for a bundle.
    """

    reference: str = ""
    build: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    keep_fp32: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    image_processor_differs: tuple[str, ...] = ()
    contract: Mapping[str, Any] | None = None
    packaged_for: str | None = None
    NEWER: ClassVar[frozenset[str]] = frozenset({"packaged_for"})


@dataclass(frozen=True)
class Manifest(Spec):
    """All that a bundle says about itself.

    Attributes:
        name: of the bundle, for people.
        architecture: JSON data of the family: sizes and choices.
        image: how images become inputs of the vision part: whole, cut into tiles or cut into slices; None where the
            model takes none.
        text: how texts become token ids, None where the model takes none.
        tasks: what the model can be asked.
        origins: where each value of `image` and `text` comes from, and which files were not read.
        export: how the bundle was made.
        tools: name → version of each tool that took part.
        files: path relative to the bundle → size and sha256 of every file but the manifest; publication fills it.
    """

    name: str
    source: SourceRecord
    family: str
    architecture: Mapping[str, Any]
    image: AnyImageSpec | None
    text: TextSpec | None
    tasks: tuple[TaskSpec, ...]
    parts: Annotated[tuple[PartRecord, ...], not_empty("at least one part")]
    origins: Origins = field(default_factory=Origins)
    export: ExportRecord = field(default_factory=ExportRecord)
    tools: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def check(self) -> None:
        _check_unique(self, "parts", [part.name for part in self.parts])
        _check_unique(self, "tasks", [task.kind for task in self.tasks])
        for name in self.files:
            checked_relative_name(name, "files")
        names = {part.name for part in self.parts}
        for task in self.tasks:
            if not set(task.parts) <= names:
                raise self.refusal("tasks", f"{task.kind} to run parts of the bundle: {', '.join(sorted(names))}")
            if isinstance(task, EmbedSpec):
                self._check_encoders(task)
            if isinstance(task, FeatureSpec) and not isinstance(self.image, SliceSpec):
                raise self.refusal("image", "how images are cut into slices, for the task 'features'")
            if isinstance(task, ChatSpec):
                self._check_images(task)
            self._check_tokens(task)

    def _check_encoders(self, task: EmbedSpec) -> None:
        """The parts of an embedding have the outputs that the task reads."""
        for encoder in (task.image, task.text):
            if encoder is None:
                continue
            outputs = {tensor.name: tensor for tensor in self.part(encoder.part).signature.outputs}
            if encoder.output not in outputs:
                raise InputError(
                    f"the part {encoder.part!r} has no output {encoder.output!r}",
                    where="tasks.embed",
                    expected=", ".join(outputs),
                    fix="export the model again",
                )
            axes = len(outputs[encoder.output].shape)
            if (axes == 3) != (encoder.pooling == "mean"):
                raise InputError(
                    f"the embedding of part {encoder.part!r} is pooled in another way than its output allows",
                    where="tasks.embed",
                    expected="'mean' of three axes, 'in_graph' of two",
                    got=f"{encoder.pooling!r} of {axes}",
                    fix="export the model again",
                )

    def _check_tokens(self, task: TaskSpec) -> None:
        """The token ids that a task states are of the vocabulary."""
        if not task.token_ids:
            return
        if self.text is None:
            raise self.refusal("text", f"how texts become token ids, for the task {task.kind!r}")
        if max(task.token_ids) >= self.text.vocab_size:
            raise InputError(
                "a task has a token id that the vocabulary lacks",
                where=f"tasks.{task.kind}",
                expected=f"ids below {self.text.vocab_size}, the manifest's text.vocab_size",
                got=", ".join(map(str, sorted(task.token_ids))),
            )

    def _check_images(self, chat: ChatSpec) -> None:
        """Images are cut into tiles where the layout says so and nowhere else, and each tile has its marker."""
        kind = TileSpec if chat.layout == "tiles" else ImageSpec
        if not isinstance(self.image, kind):
            raise self.refusal("image", f"the preparation of images for a chat of the layout {chat.layout!r}")
        if isinstance(self.image, TileSpec):
            has_token = chat.global_image_token is not None
            if self.image.global_tile != has_token:
                expected = (
                    f"global_tile {str(has_token).lower()}, as the chat has {'a' if has_token else 'no'} token for it"
                )
                raise self.refusal("image", expected)
            side = self.image.max_side_pixels // self.image.tile_size_pixels
            places = (f"r{row}c{column}" for row in range(1, side + 1) for column in range(1, side + 1))
            missing = [name for name in places if name not in chat.tile_tokens]
            if missing:
                raise InputError(
                    "a tile has no token that says where it is",
                    where="tasks.chat.tile_tokens",
                    expected=f"names up to r{side}c{side}",
                    got=f"no {', '.join(missing[:4])}",
                    fix="export the checkpoint again; its max_img_size may ask for more tiles than it has tokens for",
                )

    def part(self, name: str) -> PartRecord:
        """The part of that name; InputError when the bundle has none."""
        for part in self.parts:
            if part.name == name:
                return part
        fix = suggestion(name, [part.name for part in self.parts])
        raise InputError(f"the bundle {self.name!r} has no part {name!r}", fix=fix)

    def chosen(self, precision: str | None) -> list[tuple[PartRecord, VariantRecord]]:
        """All variants with their parts, or those of that precision; UsageError when no part has one."""
        found = [(part, variant) for part in self.parts for variant in part.chosen_variants(precision)]
        if not found:
            known = list(dict.fromkeys(variant.precision for part in self.parts for variant in part.variants))
            fix = suggestion(str(precision), known)
            raise UsageError(f"the bundle has no variant {precision!r}", where=self.name, fix=fix)
        return found

    def identity(self) -> str:
        """sha256 that names the model: equal for bundles of one checkpoint, whatever their opset or precision.

        Files of embeddings and features remember it of the bundle that made them.
        """
        source = self.source
        stated = {
            "family": self.family,
            "architecture": dict(self.architecture),
            "image": None if self.image is None else self.image.to_json(),
            "text": None if self.text is None else self.text.to_json(),
            "weights": sorted(file.sha256 for file in source.files),
            "seed": source.random_weights_seed,
        }
        if not source.files and source.random_weights_seed is None:
            graphs = [part.variant("fp32") for part in self.parts]
            names = [name for graph in graphs for name in (graph.file, *graph.external_data)]
            stated["weights"] = sorted(self.files[name].sha256 for name in names)
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

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

    def task(self, kind: type[FoundTask]) -> FoundTask | None:
        """What the bundle says about a task of that kind, None when it has none."""
        return find_task(self.tasks, kind)

    def to_json(self) -> dict[str, Any]:
        """What `vlm_export.json` holds, the schema included; `manifest_from_bytes` reads it."""
        data = super().to_json()
        in_order = {name: dict(sorted(data[name].items())) for name in ("tools", "files")}
        return {"schema_version": SCHEMA_VERSION, **data, **in_order}

    def to_bytes(self) -> bytes:
        """The content of `vlm_export.json`: the same manifest gives the same bytes; ValueError on NaN or infinity."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # A source path that is not UTF-8 holds lone surrogates; as \udcXX they are valid JSON and read back equal.
        return text.encode("utf-8", "backslashreplace")


def _precisions(part: PartRecord) -> set[str]:
    return {variant.precision for variant in part.variants}


def manifest_from_bytes(raw: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """The Manifest in the content of `vlm_export.json`.

    Raises:
        InputError: another schema, or fields that are unknown, missing, of another type or out of range.
    """
    data = json_object_from_bytes(raw, where)
    _check_schema(data, where)
    return Manifest.from_json({key: value for key, value in data.items() if key != "schema_version"}, where)


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


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    if "schema_version" not in data:
        raise InputError("the manifest has no schema_version", where=where, fix="this is no vlm-export bundle")
    version = data["schema_version"]
    if type(version) is int and 1 <= version < SCHEMA_VERSION:
        raise InputError(
            "the bundle was made by an older vlm-export, before its first release",
            where=where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=f"schema_version {version}",
            fix="export the model again",
        )
    if version != SCHEMA_VERSION or type(version) is not int:
        newer = type(version) is int and version > SCHEMA_VERSION
        raise InputError(
            "the bundle was made by a newer vlm-export" if newer else "the manifest's schema_version is no version",
            where=where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=f"schema_version {version!r}"[:200],
            fix="upgrade: pip install --upgrade vlm-export" if newer else "export the model again",
        )


def _check_unique(record: Spec, field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"two {field} have the name {name!r}", where=type(record).__name__)
        seen.add(name)
