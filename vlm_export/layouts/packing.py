"""What a layout works with: the bundle, the directory under construction, and the graphs that are proved on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_export.bundle import layout
from vlm_export.bundle.initializers import StoredValues, stored_initializers
from vlm_export.bundle.ledger import GraphLedger, LedgerEntry, found_ledger, ledger_to_bytes, read_ledger
from vlm_export.bundle.manifest import MANIFEST_NAME, PartRecord, VariantRecord, is_ir
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.publish import Staging
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.graph.core.files import DEFAULT_EXTERNAL_BYTES, Storage, save_model
from vlm_export.graph.core.tensors import tensor_slots
from vlm_export.layouts.consumer_graph import ConsumerGraph, encoder_graph, filled, masked_by_padding
from vlm_export.layouts.shared_weights import StoredKey, refer_to_weights
from vlm_export.proof.engine import engine_label, openvino_label, verifying_engine, verifying_openvino
from vlm_export.proof.gates import laxest_variant, variant_gate
from vlm_export.proof.golden import GoldenRecord, iterate_golden, write_golden
from vlm_export.proof.recheck import judge_records
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import CPU, Engine
from vlm_export.runtime.engines.openvino import write_ir
from vlm_export.runtime.inputs.texts import read_tokenizer_file
from vlm_export.runtime.inputs.tokenizer import bounded_tokenizer
from vlm_export.specs import ImageSpec, TextCleaning, TextSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec
from vlm_export.text_display import size_text

# What the runtime does before tokenizer.json, and its file cannot say.
_CLEANING: Mapping[TextCleaning, str] = {
    "openai": "",
    "open_clip": "",
    "whitespace": "",
    "none": "",
    "lower": "in lower case",
    "canonicalize": "in lower case and without punctuation",
}


@dataclass
class Packing:
    """A packaged directory under construction.

    Attributes:
        consumer: its name, for messages.
        precision: of the graphs.
        threads: of the engine that proves them.
        parts, reports: of the graphs so far.
        notes: what the consumer does differently, one sentence each; shown and recorded.
        tell: told at once what a user wants to know before it is there.
    """

    bundle: OpenBundle
    staging: Staging
    consumer: str
    precision: str
    threads: int | None = None
    parts: list[PartRecord] = field(default_factory=list)
    reports: list[PartReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = field(default=lambda _: None)
    _ledgers: list[GraphLedger] = field(default_factory=list)

    @property
    def embed(self) -> EmbedSpec:
        """What the bundle says about embeddings; InputError where it makes none."""
        task = self.bundle.manifest.task(EmbedSpec)
        if task is None:
            raise self.refusal("embeddings of images and texts", "a bundle that makes none")
        return task

    @property
    def score(self) -> ScoreSpec:
        """How cosines become probabilities; InputError where the model was not trained for that."""
        if self.embed.score is None:
            raise self.refusal("a model that scores texts against images", "none that does")
        return self.embed.score

    @property
    def image_spec(self) -> ImageSpec:
        """How images are prepared; InputError where they are not brought to one size."""
        spec = self.bundle.manifest.image
        if not isinstance(spec, ImageSpec):
            raise self.refusal("images of one size", "a model whose images are cut or packed, or none")
        return spec

    @property
    def text_spec(self) -> TextSpec:
        """How texts become ids; InputError where the bundle takes none, or has no tokenizer."""
        spec = self.bundle.manifest.text
        if spec is None or layout.TOKENIZER_NAME not in self.bundle.manifest.files:
            raise self.refusal("texts", "a bundle without a tokenizer")
        return spec

    def image(self, precision: str | None = None) -> ConsumerGraph:
        """The image encoder, whose input is `pixel_values` float32 (B, 3, H, W); None for the package's precision."""
        if self.embed.image is None:
            raise self.refusal("an image encoder", "a bundle of a text encoder alone")
        graph = encoder_graph(self.bundle, self.embed.image, precision or self.precision)
        if self.image_spec and graph.signature.input_names != ("pixel_values",):
            raise self.refusal("an image encoder of pixels alone", ", ".join(graph.signature.input_names))
        return graph

    def text(self, precision: str | None = None) -> ConsumerGraph:
        """The text encoder, whose inputs are `input_ids` int64 (B, L) and, where it reads one, `attention_mask`."""
        if self.embed.text is None:
            raise self.refusal("a text encoder", "a bundle of an image encoder alone")
        graph = encoder_graph(self.bundle, self.embed.text, precision or self.precision)
        if self.text_spec and not {*graph.signature.input_names} <= {"input_ids", "attention_mask"}:
            raise self.refusal("a text encoder of ids and a mask", ", ".join(graph.signature.input_names))
        return graph

    def text_of_any_length(self) -> ConsumerGraph:
        """As `text`, for consumers that fill a batch up to its longest text, also where the model wants its context."""
        return filled(self.text(), "input_ids", self.text_spec.pad_token_id)

    def text_without_mask(self) -> ConsumerGraph:
        """As `text` with ids alone, for consumers that give no mask and fill texts up to the context.

        Raises:
            InputError: the encoder reads a mask, and no record can show that the padding's id tells as much.
        """
        graph = self.text()
        if "attention_mask" not in graph.signature.input_names:
            return graph
        graph = masked_by_padding(graph, "input_ids", self.text_spec.pad_token_id)
        if not any(True for _ in graph.records()):
            raise self.refusal("a text encoder of ids alone", "one that reads a mask, whose records have no padding")
        self.notes.append(
            f"{self.consumer} gives no mask: tokens with the padding's id, {self.text_spec.pad_token_id}, are not "
            "seen, also where a text spells them"
        )
        return graph

    def told_cleaning(self, *own: TextCleaning) -> None:
        """Notes what the original does to a text before its tokenizer and the consumer does not, beside `own`."""
        done = _CLEANING[self.text_spec.cleaning]
        if done and self.text_spec.cleaning not in own:
            self.notes.append(
                f"{self.consumer} gives texts to the tokenizer as they are, and this model's original {done}"
            )

    def refusal(self, expected: str, got: str) -> InputError:
        """The error for what the consumer cannot do with this bundle."""
        where = self.bundle.manifest.name
        return InputError(f"{self.consumer} cannot use this bundle", where=where, expected=expected, got=got)

    def add(
        self, part: str, file: str, graph: ConsumerGraph, precision: str | None = None, *, shares_weights: bool = False
    ) -> None:
        """Writes a graph and its golden records, and proves it.

        Args:
            part: what the graph is called in the package's manifest, which may have it in another precision.
            file: its path in the package; weights above 64 MiB lie beside it.
            precision: of the graph; None for the package's.
            shares_weights: take weights from the data files of the graphs beside it, where they have the same.

        Raises:
            VerificationError: the graph does not compute what the original computed.
        """
        graph, precision = graph.finished(), precision or self.precision
        path = self.staging.file(file)
        shared = refer_to_weights(graph.model, self._weights_beside(path)) if shares_weights else frozenset()
        written = (*save_model(graph.model, path, storage=Storage(shared=shared), overwrite=False), *sorted(shared))
        data = tuple(entry.relative_to(self.staging.path).as_posix() for entry in written[1:])
        records = list(graph.records())
        if all(found.name != part for found in self.parts):
            write_golden(self.staging.path, part, records)
        size = sum(entry.stat().st_size for entry in written)
        engine = verifying_engine(path, weights_bytes=size, threads=self.threads)
        opset, oldest = graph.model.graph.opset_imports[""], oldest_onnxruntime(path)[0]
        variant = VariantRecord(precision, file, data, opset=opset, oldest_onnxruntime=oldest)
        self._prove(PartRecord(part, graph.signature, (variant,)), records, engine, engine_label((CPU,)))

    def tell_second_copy(self, file: str, graph: ConsumerGraph) -> None:
        """Says, before a graph is written, how large it is, where it holds weights that the package has already."""
        size = sum(slot.nbytes for slot in tensor_slots(graph.model))
        if size > DEFAULT_EXTERNAL_BYTES:
            self.tell(f"{file} holds the weights of both encoders a second time, {size_text(size)}")

    def _weights_beside(self, path: Path) -> dict[StoredKey, StoredValues]:
        """The values in data files of the folder, by what `refer_to_weights` finds them by."""
        found: dict[StoredKey, StoredValues] = {}
        for ledger in self._ledgers:
            graph = self.staging.path / ledger.file
            if graph.parent == path.parent and not is_ir(graph):
                stored = stored_initializers(self.staging.path, ledger.file)
                outside = {name: values for name, values in stored.items() if values.path != graph}
                digests = {entry.name: entry.sha256 for entry in ledger.initializers}
                # The first that has them: the encoders stand before graphs that hold them too.
                found = {(digests[name], at.data_type, at.shape): at for name, at in outside.items()} | found
        return found

    def add_for_openvino(self, part: PartRecord) -> None:
        """Writes a part, at the package's precision, in OpenVINO's own form, and proves it in OpenVINO.

        Raises:
            InputError: OpenVINO does not convert the graph.
            EnvironmentFailure: it is not installed.
            VerificationError: what it makes of the graph does not compute what the original computed.
        """
        source = part.served_by(self.precision)
        file = layout.ir_path(part.name, source.precision)
        path = self.staging.file(file)
        write_ir(self.bundle.model_files(source), path)
        data = path.with_suffix(".bin")
        engine = verifying_openvino(path, weights_bytes=data.stat().st_size, threads=self.threads)
        name = data.relative_to(self.staging.path).as_posix()
        variant = replace(source, file=file, external_data=(name,), oldest_onnxruntime=None, warnings=())
        self._copy_golden(part)
        records = iterate_golden(self.bundle, part.name)
        self._prove(replace(part, variants=(variant,)), records, engine, openvino_label())

    def _prove(self, part: PartRecord, records: Iterable[GoldenRecord], engine: Engine, engine_name: str) -> None:
        """Judges the only variant of a part that was written, and takes it into the package."""
        (variant,) = part.variants
        # What it is made of may be quantised: then it is held to the same budget.
        manifest = self.bundle.manifest
        own = next((found for found in manifest.parts if found.name == part.name), None)
        source = laxest_variant(manifest, variant.precision) if own is None else own.served_by(variant.precision)
        report = judge_records(
            part,
            variant.precision,
            variant_gate(part.name, source),
            records,
            engine.run,
            engine_name,
            reference=f"golden records of the bundle {manifest.name}",
        )
        report.raise_if_failed()
        variant = replace(
            variant, exporter="package", simplified=False, verification=report.to_json(), loss=source.loss
        )
        known = next((found for found in self.parts if found.name == part.name), None)
        if known is None:
            self.parts.append(replace(part, variants=(variant,)))
        else:
            self.parts[self.parts.index(known)] = replace(known, variants=(*known.variants, variant))
        self.reports.append(report)
        self._ledgers.append(self._accounted(variant.file))

    def keep(self, part: PartRecord) -> None:
        """A part of the bundle as it is: files of its variants, golden records and ledger."""
        files = [name for variant in part.variants for name in (variant.file, *variant.external_data)]
        self.copy({name: name for name in files})
        self._copy_golden(part)
        known = read_ledger(self.bundle) or {}
        self._ledgers += [known[variant.file] for variant in part.variants if variant.file in known]
        self.parts.append(part)

    def _copy_golden(self, part: PartRecord) -> None:
        golden = [name for name in self.bundle.manifest.files if name.startswith(f"golden/{part.name}/")]
        self.copy({name: name for name in golden})

    def copy_side_files(self) -> None:
        """All files of the bundle that are neither graphs nor records."""
        for name in self.bundle.manifest.files:
            if not name.startswith(("onnx/", "golden/")) and name not in (MANIFEST_NAME, layout.LEDGER_NAME):
                self.copy({name: name})

    def copy(self, files: Mapping[str, str]) -> None:
        """Copies files of the bundle, by their paths there, to paths in the package; those it lacks are left out."""
        for source, target in files.items():
            if source in self.bundle.manifest.files:
                shutil.copyfile(self.bundle.file(source), self.staging.file(target))

    def copy_tokenizer(self, folder: str = "") -> None:
        """The tokenizer's files, in a folder of the package."""
        names = (layout.TOKENIZER_NAME, layout.TOKENIZER_CONFIG_NAME, "special_tokens_map.json")
        self.copy({name: str(PurePosixPath(folder) / name) for name in names})

    def state_padding(self, folder: str = "") -> None:
        """Makes the copied tokenizer's config name a token with the id that the original fills texts with.

        Raises:
            InputError: the tokenizer has no token of that id.
        """
        config = {**self.json(layout.TOKENIZER_CONFIG_NAME), "pad_token": self._padding_token(folder)}
        self.write_json(str(PurePosixPath(folder) / layout.TOKENIZER_CONFIG_NAME), config)

    def fix_length(self, folder: str = "") -> None:
        """Makes the copied tokenizer cut and fill texts to the context itself, with the id that the original takes."""
        self.state_padding(folder)
        spec, token, tokenizer = self.text_spec, self._padding_token(folder), self._tokenizer(folder)
        tokenizer.enable_truncation(spec.context_length, direction=spec.truncation_side)
        tokenizer.enable_padding(length=spec.context_length, pad_id=spec.pad_token_id, pad_token=token)
        tokenizer.save(str(self.staging.path / folder / layout.TOKENIZER_NAME))

    def _padding_token(self, folder: str) -> str:
        tokenizer, wanted = self._tokenizer(folder), self.text_spec.pad_token_id
        # An added token and a piece of the vocabulary may share an id: the name that is stated comes first.
        names = (self.json(layout.TOKENIZER_CONFIG_NAME).get("pad_token"), tokenizer.id_to_token(wanted))
        for name in names:
            if isinstance(name, str) and tokenizer.token_to_id(name) == wanted:
                return name
        raise self.refusal("a tokenizer with a token that fills texts", f"none of the id {wanted}")

    def _tokenizer(self, folder: str) -> Any:
        path = self.staging.path / folder / layout.TOKENIZER_NAME
        return bounded_tokenizer(read_tokenizer_file(path), str(path))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the bundle; an empty object where it has none."""
        if name not in self.bundle.manifest.files:
            return {}
        return dict(json_object_from_bytes(self.bundle.file(name).read_bytes(), name))

    def write_json(self, name: str, data: Mapping[str, Any] | Sequence[Any]) -> None:
        """A JSON file of the package."""
        self.staging.file(name).write_bytes(layout.json_bytes(data))

    def write_ledger(self) -> None:
        """The ledger of all graphs, the last thing that is written."""
        self.staging.file(layout.LEDGER_NAME).write_bytes(ledger_to_bytes(self._ledgers))

    def _accounted(self, file: str) -> GraphLedger:
        """Weights that have the bytes of one of the bundle's come from where that one does."""
        known: dict[tuple[str, Sequence[int]], LedgerEntry] = {
            (entry.sha256, entry.shape): entry
            for ledger in (read_ledger(self.bundle) or {}).values()
            for entry in ledger.initializers
        }
        found = found_ledger(self.staging.path, file)
        entries = []
        for entry in found.initializers:
            origin = known.get((entry.sha256, entry.shape))
            entries.append(entry if origin is None else entry.made_as(origin))
        return replace(found, initializers=tuple(entries))
