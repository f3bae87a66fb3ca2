"""What a layout works with: the bundle, the directory under construction, and the graphs that are proved on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from vlm_export.bundle import layout
from vlm_export.bundle.ledger import GraphLedger, LedgerEntry, found_ledger, ledger_to_bytes, read_ledger
from vlm_export.bundle.manifest import PartRecord, VariantRecord
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.publish import Staging
from vlm_export.errors import InputError
from vlm_export.graph.core.files import Storage, save_model
from vlm_export.layouts.consumer_graph import ConsumerGraph, encoder_graph
from vlm_export.proof.engine import engine_label, verifying_engine
from vlm_export.proof.gates import laxest_variant, variant_gate
from vlm_export.proof.golden import write_golden
from vlm_export.proof.recheck import judge_records
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import CPU
from vlm_export.specs import ImageSpec, TextSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec

_DATA_ABOVE_BYTES = 64 << 20


@dataclass
class Packing:
    """A packaged directory under construction.

    Attributes:
        consumer: its name, for messages.
        precision: of the graphs.
        threads: of the engine that proves them.
        parts, reports: of the graphs so far.
        notes: what the consumer does differently, one sentence each; shown and recorded.
    """

    bundle: OpenBundle
    staging: Staging
    consumer: str
    precision: str
    threads: int | None = None
    parts: list[PartRecord] = field(default_factory=list)
    reports: list[PartReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
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

    def image(self) -> ConsumerGraph:
        """The image encoder, whose input is `pixel_values` float32 (B, 3, H, W)."""
        if self.embed.image is None:
            raise self.refusal("an image encoder", "a bundle of a text encoder alone")
        graph = encoder_graph(self.bundle, self.embed.image, self.precision)
        if self.image_spec and graph.signature.input_names != ("pixel_values",):
            raise self.refusal("an image encoder of pixels alone", ", ".join(graph.signature.input_names))
        return graph

    def text(self) -> ConsumerGraph:
        """The text encoder, whose inputs are `input_ids` int64 (B, L) and, where it reads one, `attention_mask`."""
        if self.embed.text is None:
            raise self.refusal("a text encoder", "a bundle of an image encoder alone")
        graph = encoder_graph(self.bundle, self.embed.text, self.precision)
        if self.text_spec and not {*graph.signature.input_names} <= {"input_ids", "attention_mask"}:
            raise self.refusal("a text encoder of ids and a mask", ", ".join(graph.signature.input_names))
        return graph

    def refusal(self, expected: str, got: str) -> InputError:
        """The error for what the consumer cannot do with this bundle."""
        where = self.bundle.manifest.name
        return InputError(f"{self.consumer} cannot use this bundle", where=where, expected=expected, got=got)

    def add(self, part: str, file: str, graph: ConsumerGraph) -> None:
        """Writes a graph and its golden records, and proves it.

        Args:
            part: what the graph is called in the package's manifest.
            file: its path in the package; weights above 64 MiB lie beside it.

        Raises:
            VerificationError: the graph does not compute what the original computed.
        """
        graph = graph.finished()
        path = self.staging.file(file)
        save_model(graph.model, path, storage=Storage(), overwrite=False)
        names = sorted(entry.relative_to(self.staging.path).as_posix() for entry in path.parent.glob(f"{path.name}*"))
        data = tuple(name for name in names if name != file)
        records = list(graph.records())
        write_golden(self.staging.path, part, records)
        size = sum((self.staging.path / name).stat().st_size for name in names)
        engine = verifying_engine(path, weights_bytes=size, threads=self.threads)
        # What it is made of may be quantised: then it is held to the same budget.
        source = laxest_variant(self.bundle.manifest, self.precision)
        report = judge_records(
            PartRecord(part, graph.signature, (VariantRecord(self.precision, file),)),
            self.precision,
            variant_gate(part, source),
            records,
            engine.run,
            engine_label((CPU,)),
            reference=f"golden records of the bundle {self.bundle.manifest.name}",
        )
        report.raise_if_failed()
        opset = graph.model.graph.opset_imports[""]
        variant = VariantRecord(
            self.precision,
            file,
            data,
            opset=opset,
            exporter="package",
            simplified=False,
            oldest_onnxruntime=oldest_onnxruntime(path)[0],
            verification=report.to_json(),
            loss=source.loss,
        )
        self.parts.append(PartRecord(part, graph.signature, (variant,)))
        self.reports.append(report)
        self._ledgers.append(self._accounted(file))

    def keep(self, part: PartRecord) -> None:
        """A part of the bundle as it is: files of its variants, golden records and ledger."""
        files = [name for variant in part.variants for name in (variant.file, *variant.external_data)]
        self.copy({name: name for name in files})
        golden = [name for name in self.bundle.manifest.files if name.startswith(f"golden/{part.name}/")]
        self.copy({name: name for name in golden})
        known = read_ledger(self.bundle) or {}
        self._ledgers += [known[variant.file] for variant in part.variants if variant.file in known]
        self.parts.append(part)

    def copy(self, files: Mapping[str, str]) -> None:
        """Copies files of the bundle, by their paths there, to paths in the package; those it lacks are left out."""
        for source, target in files.items():
            if source in self.bundle.manifest.files:
                shutil.copyfile(self.bundle.file(source), self.staging.file(target))

    def copy_tokenizer(self, folder: str = "") -> None:
        """The tokenizer's files, in a folder of the package."""
        names = (layout.TOKENIZER_NAME, layout.TOKENIZER_CONFIG_NAME, "special_tokens_map.json")
        self.copy({name: str(PurePosixPath(folder) / name) for name in names})

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the bundle; an empty object where it has none."""
        if name not in self.bundle.manifest.files:
            return {}
        data: dict[str, Any] = json.loads(self.bundle.file(name).read_text(encoding="utf-8"))
        return data

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """A JSON file of the package."""
        self.staging.file(name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

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
        entries = [
            replace(
                entry,
                parameters=origin.parameters,
                transformation=origin.transformation,
                checkpoint=origin.checkpoint,
                unrounded=origin.unrounded,
            )
            if (origin := known.get((entry.sha256, entry.shape))) is not None
            else entry
            for entry in found.initializers
        ]
        return replace(found, initializers=tuple(entries))
