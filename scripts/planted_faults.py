"""Plants faults in bundles and graphs and writes what the proof says of each into docs/planted-faults.md.

Each fault is planted in a copy of a bundle of a tiny CLIP that transformers saved, and verified twice: by the record in
the bundle alone (`verify DIR`), and with the original (`verify DIR --source`). Faults of float16 graphs are planted in
each layer of a tiny CLIP. Faults of modules are planted in graphs of five families, for `bisect`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from faults.checkpoint import write_checkpoint
from faults.half import HalfVerdict, part_graphs, verdicts
from faults.modules import Named, exported_parts, planted_faults
from faults.plant import FAULTS, Fault

from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import VerificationError, VlmExportError
from vlm_export.exporting.contract import OriginalSide, original_side, repeat_contract, sides_of, source_tokenizer
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.exporting.tokenizers.files import ResolvedTokenizer
from vlm_export.family import Checkpoint, Model
from vlm_export.models.registry import recognise
from vlm_export.proof import contract
from vlm_export.proof.contract import ContractReport, StartEngine
from vlm_export.proof.points import EngineRun
from vlm_export.runtime.engines.onnxruntime import OrtEngine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "planted-faults.md"
_HEAD = """# Planted faults

Written by `python scripts/planted_faults.py`. Each fault is planted in a copy of a small bundle whose manifest is then
hashed again, so that no check of files alone can see it; "record" is `vlm-export verify DIR`, "original" is
`vlm-export verify DIR --source SOURCE`. The message is the first that the verification gives.

| fault | in | record | original | message |
| --- | --- | --- | --- | --- |
"""
_HALF_HEAD = """
## Float16 graphs

Each fault is planted in the graphs of a tiny CLIP of three layers before they become float16, as a wrong back end or
converter would leave it. "Rounded" is the graph as float16 hardware computes it, "float32" the same nodes in float32
with weights that are not rounded ([numerics](numerics.md#noise)); both name the relative error of the worst row, and
"of gate" is what of the nearest gate was seen. The ledger compares each weight with the checkpoint's.

| fault | part | layer | rounded | of gate | float32 | of gate | found by |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_MODULE_HEAD = """
## Modules that `bisect` names

Each fault is planted in one module of a graph, which `vlm-export bisect` then compares with the sound graph. A row is
right where the module with the fault is named, and no other.

| fault | family | module with the fault | named | its own error | right |
| --- | --- | --- | --- | --- | --- |
"""
_LONGEST_MESSAGE = 160
_COPY = "copy"


@dataclass(frozen=True)
class Proved:
    """A bundle, its checkpoint and model, and what the original makes of the contract's inputs."""

    bundle: Path
    checkpoint: Checkpoint
    model: Model
    tokenizer: ResolvedTokenizer | None
    original: OriginalSide


@dataclass(frozen=True)
class Verdict:
    """The error of a verification's first failure, None where the fault was not seen."""

    record: VlmExportError | None
    original: VlmExportError | None


@contextmanager
def proved(folder: Path) -> Iterator[Proved]:
    """Writes a checkpoint into the folder, exports it, and runs the original once for all faults."""
    source, bundle = write_checkpoint(folder / "checkpoint"), folder / "bundle"
    export_bundle(str(source), bundle, ExportOptions(opset=17, exporter="torchscript", threads=1))
    checkpoint = open_checkpoint(str(source))
    with ScratchStore(folder / "weights.bin") as store:
        model, tokenizer = source_tokenizer(
            open_bundle(bundle), recognise(checkpoint).build(checkpoint, store), checkpoint
        )
        original = original_side(model, sides_of(checkpoint, None, with_texts=True))
        yield Proved(bundle, checkpoint, model, tokenizer, original)


def verdict(fault: Fault, at: Proved, folder: Path) -> Verdict:
    """Plants the fault in a copy of the bundle and verifies that."""
    copy = folder / _COPY
    shutil.copytree(at.bundle, copy)
    try:
        fault.plant(copy)
        with ExitStack() as stack:
            if fault.prepare is not None:
                prepare = fault.prepare
                replacement = lambda image, spec, **_: prepare(image, spec)  # noqa: E731
                stack.enter_context(mock.patch.object(contract, "preprocess_image", replacement))
            return check(copy, at)
    finally:
        shutil.rmtree(copy)


def check(root: Path, at: Proved) -> Verdict:
    """Verifies a bundle by its record, and with the original."""
    return Verdict(
        _error(lambda: contract.replay(open_bundle(root), _start(root))),
        _error(lambda: _repeated(open_bundle(root), at, root)),
    )


def _repeated(bundle: OpenBundle, at: Proved, root: Path) -> ContractReport:
    return repeat_contract(bundle, at.model, at.checkpoint, at.tokenizer, _start(root), original=at.original)


def _start(root: Path) -> StartEngine:
    def start(part: str, precision: str) -> EngineRun:
        bundle = open_bundle(root)
        return OrtEngine(bundle.model_files(bundle.manifest.part(part).variant(precision)), threads=1, exact=True).run

    return start


def _error(verify: Callable[[], ContractReport]) -> VlmExportError | None:
    try:
        verify().raise_if_failed()
    except VlmExportError as error:
        return error
    return None


def row(fault: Fault, found: Verdict) -> str:
    """A line of the page's table."""
    error = found.record or found.original
    where = "" if error is None else error.where.rpartition(f"/{_COPY}/")[2]
    text = "" if error is None else f"{where}: {error.got}".replace("|", "\\|").replace("\n", " ")
    short = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…"
    seen = [_seen(found.record), _seen(found.original)]
    return f"| {fault.name} | {fault.named} | {seen[0]} | {seen[1]} | {short} |\n"


def _seen(error: VlmExportError | None) -> str:
    if error is None:
        return "not seen"
    return "fails" if isinstance(error, VerificationError) else "refused"


def half_row(found: HalfVerdict) -> str:
    """A line of the table of float16 graphs."""
    name = "none" if found.fault is None else found.fault.name
    numbers = [f"{seen.seen:.1e} | {seen.share:.2g}" for seen in (found.rounded, found.unrounded)]
    return f"| {name} | {found.part} | {found.layer} | {' | '.join(numbers)} | {found.found_by or 'passes'} |\n"


def module_row(found: Named) -> str:
    """A line of the table of modules."""
    first = found.found.first
    named = "none" if first is None else first.path
    error = "" if first is None else f"{first.own:.1e}"
    right = "yes" if found.right else "no"
    return f"| {found.fault.name} | {found.family} | {found.planted} | {named} | {error} | {right} |\n"


def module_rows(folder: Path) -> Iterator[str]:
    """The lines of all families."""
    for family, bundle, part in exported_parts(folder):
        yield from map(module_row, planted_faults(family, bundle, part))


def page(folder: Path) -> str:
    """The whole page."""
    with proved(folder) as at:
        contract_rows = "".join(row(fault, verdict(fault, at, folder)) for fault in FAULTS)
    with part_graphs(folder / "half") as parts:
        half_rows = "".join(map(half_row, verdicts(parts)))
    modules = "".join(module_rows(folder / "modules"))
    return _HEAD + contract_rows + _HALF_HEAD + half_rows + _MODULE_HEAD + modules


def main(arguments: list[str] | None = None) -> int:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    with TemporaryDirectory() as folder:
        PAGE.write_text(page(Path(folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
