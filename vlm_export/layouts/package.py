"""A bundle as other software loads it: one directory for each consumer, proved before it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.publish import publication
from vlm_export.errors import UsageError, suggestion
from vlm_export.layouts import (
    fastembed,
    immich,
    openvino,
    sentence_transformers,
    split_pair,
    transformers_js,
    triton,
    typesense,
)
from vlm_export.layouts.packing import Packing
from vlm_export.proof.contract_record import write_record_again
from vlm_export.proof.declared import declared
from vlm_export.proof.report import PartReport


@dataclass(frozen=True)
class Consumer:
    """What a bundle can be packaged for.

    Attributes:
        lay_out: writes what it reads.
        is_bundle: whether the package is a bundle with all of its tasks, too.
    """

    lay_out: Callable[[Packing], None]
    is_bundle: bool = False


CONSUMERS: Mapping[str, Consumer] = {
    "transformers.js": Consumer(transformers_js.lay_out_for_dtypes, is_bundle=True),
    "optimum": Consumer(transformers_js.lay_out, is_bundle=True),
    "immich": Consumer(immich.lay_out),
    "immich-uint8": Consumer(immich.lay_out_from_bytes),
    "fastembed": Consumer(fastembed.lay_out),
    "typesense": Consumer(typesense.lay_out),
    "modern-onnx-clip": Consumer(split_pair.lay_out),
    "clip-as-service": Consumer(split_pair.lay_out_with_mask),
    "sentence-transformers": Consumer(sentence_transformers.lay_out),
    "triton": Consumer(triton.lay_out),
    "openvino": Consumer(openvino.lay_out, is_bundle=True),
}


@dataclass(frozen=True)
class Package:
    """A packaged directory.

    Attributes:
        manifest: all that it says about itself.
        reports: the proof of each graph that was made for the consumer.
        notes: what the consumer does differently, one sentence each.
    """

    manifest: Manifest
    reports: tuple[PartReport, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `package --json` prints."""
        return {
            "verification": [report.to_json() for report in self.reports],
            "notes": list(self.notes),
            "manifest": self.manifest.to_json(),
        }


def package(
    path: str | Path,
    target: str | Path,
    consumer: str,
    *,
    precision: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Package:
    """Writes a bundle as a consumer loads it, every graph proved by the bundle's golden records.

    Args:
        path: the bundle's directory.
        target: the directory that the package becomes; `verify` proves it again on any machine.
        consumer: a name of `CONSUMERS`.
        precision: the variant of the graphs that are made; None for the default of `load`.
        overwrite: replace a package or bundle.
        threads: of the engine that proves; None for as many as there are cores.
        tell: called before something large is written that the bundle has already, with a sentence and its size.

    Raises:
        UsageError: an unknown consumer or variant, or a directory that is there.
        InputError: no bundle, a damaged one, or one that the consumer cannot use.
        VerificationError: a graph does not compute what the original computed; nothing is published.
    """
    return write_package(
        *(path, target, consumer, known_consumer(consumer)),
        precision=precision,
        overwrite=overwrite,
        threads=threads,
        tell=tell,
    )


def write_package(
    path: str | Path,
    target: str | Path,
    name: str,
    consumer: Consumer,
    *,
    precision: str | None,
    overwrite: bool,
    threads: int | None,
    tell: Callable[[str], None] = lambda _: None,
) -> Package:
    """As `package`, for a consumer that is called `name` in the manifest."""
    bundle = open_bundle(path)
    root, place = Path(path).resolve(), Path(target).resolve()
    if place == root or root in place.parents:
        raise UsageError("a package would lie in the bundle that it is made of", where=str(target), got=str(path))
    with publication(Path(target), overwrite=overwrite) as staging:
        chosen_precision = precision or bundle.manifest.default_precision()
        packing = Packing(bundle, staging, name, chosen_precision, threads, tell=tell)
        consumer.lay_out(packing)
        packing.write_ledger()
        manifest = _manifest(packing, Path(target).name, consumer)
        if consumer.is_bundle:
            write_record_again(bundle, staging.path, declared(manifest))
        manifest = staging.commit(manifest)
    return Package(manifest, tuple(packing.reports), tuple(packing.notes))


def known_consumer(name: str) -> Consumer:
    """The consumer of that name; UsageError, with the nearest name, where there is none."""
    if name not in CONSUMERS:
        raise UsageError(
            f"there is no layout for {name!r}",
            expected=", ".join(CONSUMERS),
            fix=suggestion(name, sorted(CONSUMERS)),
        )
    return CONSUMERS[name]


def _manifest(packing: Packing, name: str, consumer: Consumer) -> Manifest:
    old = packing.bundle.manifest
    export = replace(old.export, packaged_for=packing.consumer, warnings=(*old.export.warnings, *packing.notes))
    if consumer.is_bundle:
        return replace(old, name=name, parts=tuple(packing.parts), export=export, files={})
    # What is left is no model of ours: other software asks it.
    export = replace(export, contract=None, keep_fp32={})
    return replace(old, name=name, parts=tuple(packing.parts), tasks=(), export=export, files={})
