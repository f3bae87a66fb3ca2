"""A bundle with its new variants: manifest, ledger and side files that fit them, verified and published in one step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlm_export.bundle import layout
from vlm_export.bundle.ledger import GraphLedger, LedgerEntry, found_ledger, ledger_to_bytes, read_ledger
from vlm_export.bundle.manifest import PRECISIONS, Manifest, PartRecord, VariantRecord
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.publish import Staging
from vlm_export.bundle.quantised import TRANSPOSED
from vlm_export.bundle.safe_files import record_of_file, relative_files
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import VerificationError
from vlm_export.exporting.stages import Stages
from vlm_export.proof.contract import replay
from vlm_export.proof.contract_record import write_record_again
from vlm_export.proof.engine import verifying_start
from vlm_export.proof.recheck import verify_bundle
from vlm_export.quantizing.graphs import QuantisedGraph
from vlm_export.quantizing.result import PartLoss


@dataclass(frozen=True)
class Measured:
    """A part's quantised graph and its loss."""

    part: PartRecord
    graph: QuantisedGraph
    loss: PartLoss


@dataclass(frozen=True)
class Publishing:
    """The bundle, and the directory under construction, which holds the new graphs and nothing else yet.

    Attributes:
        precision: of the new variants.
        threads: of the engine that verifies them.
    """

    bundle: OpenBundle
    staging: Staging
    stages: Stages
    precision: str
    threads: int | None

    def publish(self, measured: Sequence[Measured]) -> Manifest:
        """Puts the bundle with its variants in place; the manifest as it was written.

        Raises:
            VerificationError: a variant does not hold what the ledger and its budget say; nothing is published.
        """
        with self.stages.stage("copy the bundle"):
            variants = {one.part.name: self._variant(one) for one in measured}
            manifest = _with_variants(self.bundle.manifest, variants)
            self._copy(manifest)
            self._write_ledger(measured, variants)
            self._write_config(manifest)
        with self.stages.stage("verify"):
            manifest = self._verified(manifest, variants)
        with self.stages.stage("publish"):
            return self.staging.commit(manifest)

    def _variant(self, one: Measured) -> VariantRecord:
        float32 = one.part.variant(PRECISIONS[0])
        names = [path.relative_to(self.staging.path).as_posix() for path in one.graph.paths]
        oldest, opset = oldest_onnxruntime(one.graph.paths[0])
        return VariantRecord(
            precision=self.precision,
            file=names[0],
            external_data=tuple(names[1:]),
            opset=opset,
            exporter=float32.exporter,
            simplified=float32.simplified,
            oldest_onnxruntime=oldest,
            warnings=float32.warnings,
            loss=one.loss.record,
        )

    def _copy(self, manifest: Manifest) -> None:
        """Every file of the bundle but the graphs that are replaced, once it is found to be the manifest's."""
        old, new = _graph_files(self.bundle.manifest), _graph_files(manifest)
        made = set(relative_files(self.staging.path))
        for name in self.bundle.manifest.files:
            if name not in made and (name not in old or name in new):
                shutil.copyfile(self.bundle.file(name), self.staging.file(name))

    def _write_ledger(self, measured: Sequence[Measured], variants: Mapping[str, VariantRecord]) -> None:
        ledgers = read_ledger(self.bundle)
        if ledgers is None:
            return
        for one in measured:
            variant = variants[one.part.name]
            float32 = ledgers.get(one.part.variant(PRECISIONS[0]).file)
            found = found_ledger(self.staging.path, variant.file)
            ledgers[variant.file] = _accounted(found, float32, one.graph)
        self.staging.file(layout.LEDGER_NAME).write_bytes(ledger_to_bytes(list(ledgers.values())))

    def _write_config(self, manifest: Manifest) -> None:
        """config.json with the data files of all graphs, and the contract's seal on it, where that changes it."""
        path = self.staging.path / layout.CONFIG_NAME
        if not path.is_file():
            return
        before = path.read_bytes()
        variants = [variant for part in manifest.parts for variant in part.variants]
        after = layout.json_bytes(layout.hub_config(json_object_from_bytes(before, layout.CONFIG_NAME), variants))
        if after != before:
            path.write_bytes(after)
            write_record_again(self.bundle, self.staging.path)

    def _verified(self, manifest: Manifest, variants: Mapping[str, VariantRecord]) -> Manifest:
        """The manifest with the proof of the new variants: as `verify` will repeat it."""
        listed = {name: record_of_file(self.staging.path, name) for name in relative_files(self.staging.path)}
        staged = OpenBundle(self.staging.path.resolve(), replace(manifest, files=listed), b"")
        start = verifying_start(staged, ("cpu",), self.threads)
        replay(staged, start, precision=self.precision).raise_if_failed()
        reports = verify_bundle(staged, engine_factory=start, engine_name="cpu", precision=self.precision)
        proved = dict(variants)
        for report in reports:
            if report.part in variants:
                try:
                    report.raise_if_failed()
                except VerificationError as error:
                    error.fix = f"leave part {report.part!r} in float32 with --part, or take a finer precision"
                    raise
                proved[report.part] = replace(variants[report.part], verification=report.to_json())
        return _with_variants(manifest, proved)


def _graph_files(manifest: Manifest) -> set[str]:
    variants = [variant for part in manifest.parts for variant in part.variants]
    return {name for variant in variants for name in (variant.file, *variant.external_data)}


def _with_variants(manifest: Manifest, variants: Mapping[str, VariantRecord]) -> Manifest:
    """The manifest with a variant for each named part, in the place of one of the same precision, or behind all."""
    parts = []
    for part in manifest.parts:
        new = variants.get(part.name)
        if new is not None:
            others = [variant for variant in part.variants if variant.precision != new.precision]
            part = replace(part, variants=(*others, new))
        parts.append(part)
    return replace(manifest, parts=tuple(parts))


def _accounted(found: GraphLedger, float32: GraphLedger | None, graph: QuantisedGraph) -> GraphLedger:
    """The ledger of a quantised graph: every initializer is a weight's levels, scales or zero points, or as it was."""
    weights, smoothed = graph.weights, graph.smoothed
    told = {} if float32 is None else {entry.name: entry for entry in float32.initializers}
    helpers = {
        name: (kind, stated)
        for stated in weights.values()
        for name, kind in ((stated.scales, "scales"), (stated.zero_points, "zero points"))
        if name is not None
    }
    entries = []
    for entry in found.initializers:
        if entry.name in weights:
            stated = weights[entry.name]
            entry = replace(_of(entry, told, stated.weight, f"quantised to {stated.bits} bits"), quantised=stated)
        elif entry.name in helpers:
            kind, stated = helpers[entry.name]
            entry = _of(entry, told, stated.weight, f"{kind} of the quantised weight")
        elif entry.name in told:
            entry = entry.made_as(told[entry.name])
        elif (source := told.get(entry.name.removesuffix(TRANSPOSED))) is not None:
            entry = replace(entry.made_as(source), transformation=f"{source.transformation}, transposed")
        else:
            entry = replace(entry, transformation="a constant of the quantiser")
        if entry.name in smoothed:
            how = f"{entry.transformation}, smoothed"
            entry = replace(entry, transformation=how, smoothed_by=smoothed[entry.name])
        entries.append(entry)
    return replace(found, initializers=tuple(entries))


def _of(entry: LedgerEntry, told: Mapping[str, LedgerEntry], weight: str, what: str) -> LedgerEntry:
    before = told.get(weight)
    if before is None:
        return replace(entry, transformation=what)
    how = f"{before.transformation}, {what}"
    return replace(entry, parameters=before.parameters, transformation=how, checkpoint=before.checkpoint)
