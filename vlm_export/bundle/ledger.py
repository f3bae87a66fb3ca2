"""The ledger of weights: where every initializer of a bundle's graphs comes from, and the digest of its values.

`ledger.json` is written at the export. A weight that is replaced later is found, also where the manifest's own digests
were made anew. Reading needs neither torch nor onnx, and memory stays flat: values are hashed where they are mapped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

from vlm_export.bundle.layout import LEDGER_NAME
from vlm_export.bundle.manifest import Count, Sha256, VariantRecord, is_ir
from vlm_export.bundle.onnx_protobuf import StoredTensor, read_onnx
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.openvino_ir import constant_digests, read_ir
from vlm_export.bundle.quantised import QuantisedFrom
from vlm_export.bundle.safe_files import opened_real_file, record_of_file
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError, VerificationError
from vlm_export.specs.codec import Spec

NO_LEDGER = "the ledger of weights: the bundle has none, so weights that were replaced cannot be told"
_SCHEMA = 1
_SPAN_BYTES = 64 << 20


@dataclass(frozen=True)
class CheckpointTensor(Spec):
    """A stored tensor: its key, and what became of it on its way to a parameter, such as "cast from float16"."""

    key: str
    transformation: str


@dataclass(frozen=True)
class LedgerEntry(Spec):
    """One initializer.

    Attributes:
        name: in the graph.
        data_type: the number of TensorProto.DataType.
        shape: of the values.
        sha256: of the values as they are stored.
        parameters: names of the module's parameters that it is made of; none for a constant of the code.
        transformation: what became of them: "as it is", "transposed", "cast to float16", …
        checkpoint: the stored tensors that the parameters are made of.
        unrounded: of a constant that float16 rounded, the numbers before that, one for each value, or none where they
            are too many to record; None where nothing was rounded, or a parameter tells.
        quantised: of a weight in fewer bits, which initializer of the part's float32 graph it holds, and how.
        smoothed_by: of what smoothing scaled, the norm's weight: in the float32 graph it is so many times what it is
            here, a power of two for each channel, by which rows of products were multiplied and the norm divided.
    """

    name: str
    data_type: Count
    shape: tuple[Count, ...]
    sha256: Sha256
    parameters: tuple[str, ...] = ()
    transformation: str = ""
    checkpoint: tuple[CheckpointTensor, ...] = ()
    unrounded: tuple[float, ...] | None = None
    quantised: QuantisedFrom | None = None
    smoothed_by: str | None = None
    NEWER: ClassVar[frozenset[str]] = frozenset({"quantised", "smoothed_by"})

    def made_as(self, other: LedgerEntry) -> LedgerEntry:
        """This one, made of what another initializer is made of, in the same way."""
        return replace(
            self,
            parameters=other.parameters,
            transformation=other.transformation,
            checkpoint=other.checkpoint,
            unrounded=other.unrounded,
        )

    def check(self) -> None:
        if self.unrounded is not None and len(self.unrounded) not in (0, prod(self.shape)):
            raise self.refusal("unrounded", "a number for each value, or none")


@dataclass(frozen=True)
class GraphLedger(Spec):
    """The initializers of one graph, in the order of the file.

    Attributes:
        file: the graph's path in the bundle.
        sha256: of that file, which holds every node and attribute.
        initializers: one for each initializer.
    """

    file: str
    sha256: Sha256
    initializers: tuple[LedgerEntry, ...]


@dataclass(frozen=True)
class _Ledger(Spec):
    schema: Literal[1]
    graphs: tuple[GraphLedger, ...]


def found_ledger(root: Path, graph: str) -> GraphLedger:
    """A graph as it lies in a bundle, with its digests; nothing is said yet of where its initializers come from.

    Args:
        root: the bundle.
        graph: the graph's path relative to it, whose references to data files were checked (`check_graph`).

    Raises:
        InputError: the file is not a well-formed model, or a data file is not there.
    """
    if is_ir(graph):
        constants = read_ir(root, graph)
        digests = constant_digests(root, graph, constants)
        entries = [LedgerEntry(one.name, one.data_type, one.shape, digests[one.name]) for one in constants]
        return GraphLedger(graph, record_of_file(root, graph).sha256, tuple(entries))
    with ExitStack() as stack:
        data = _mapped(stack, root, graph)
        files: dict[str, mmap.mmap] = {}
        tensors = [tensor for tensor in read_onnx(data, str(root / graph)).tensors if tensor.is_initializer]
        found = []
        for tensor in reversed(tensors):  # read_onnx takes them from the end
            digest = hashlib.sha256()
            for source, start, end in _spans(tensor, data, files, stack, root, posixpath.dirname(graph)):
                with memoryview(source) as view:
                    for at in range(start, end, _SPAN_BYTES):
                        with view[at : min(at + _SPAN_BYTES, end)] as part:
                            digest.update(part)
            found.append(LedgerEntry(tensor.name, tensor.data_type, tuple(tensor.dims), digest.hexdigest()))
    return GraphLedger(graph, record_of_file(root, graph).sha256, tuple(found))


def _spans(
    tensor: StoredTensor, data: mmap.mmap, files: dict[str, mmap.mmap], stack: ExitStack, root: Path, folder: str
) -> Iterator[tuple[mmap.mmap, int, int]]:
    if not tensor.is_external:
        yield from ((data, start, end) for start, end in tensor.spans)
        return
    stated = dict(tensor.external)
    name = posixpath.join(folder, stated.get("location", ""))
    if name not in files:
        files[name] = _mapped(stack, root, name)
    start, length = int(stated.get("offset", "0")), int(stated.get("length", "0"))
    yield files[name], start, min(start + length, len(files[name]))


def _mapped(stack: ExitStack, root: Path, name: str) -> mmap.mmap:
    descriptor = stack.enter_context(opened_real_file(root, name))
    if os.fstat(descriptor).st_size == 0:
        raise InputError("a file of a graph is empty", where=str(root / name), fix="export the model again")
    return stack.enter_context(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def ledger_to_bytes(graphs: Sequence[GraphLedger]) -> bytes:
    """`ledger.json`: one line for each initializer, so that two ledgers can be compared line by line."""
    lines = []
    for graph in graphs:
        entries = ",\n   ".join(json.dumps(entry.to_json()) for entry in graph.initializers)
        head = f'"file": {json.dumps(graph.file)}, "sha256": "{graph.sha256}"'
        lines.append(f'  {{{head}, "initializers": [\n   {entries}]}}')
    return (f'{{"schema": {_SCHEMA}, "graphs": [\n' + ",\n".join(lines) + "]}\n").encode()


def ledger_from_bytes(raw: bytes, where: str) -> Mapping[str, GraphLedger]:
    """Path of a graph → its ledger; InputError where the file is malformed."""
    ledger = _Ledger.from_json(json_object_from_bytes(raw, where), where)
    return {graph.file: graph for graph in ledger.graphs}


def ledger_differences(recorded: GraphLedger, found: GraphLedger) -> list[str]:
    """What a graph holds and its ledger does not, or the other way round; one phrase each."""
    expected, present = ({entry.name: entry for entry in graph.initializers} for graph in (recorded, found))
    differences = [f"{name} is gone" for name in expected if name not in present]
    differences += [f"{name} was added" for name in present if name not in expected]
    for name, entry in expected.items():
        other = present.get(name)
        if other is None:
            continue
        if (entry.data_type, entry.shape) != (other.data_type, other.shape):
            differences.append(f"{name} has another type or shape: {list(other.shape)} instead of {list(entry.shape)}")
        elif entry.sha256 != other.sha256:
            differences.append(f"{_named(entry)} has other values")
    if not differences and recorded.sha256 != found.sha256:
        differences.append("its nodes, their attributes or its interface differ")
    return differences


def _named(entry: LedgerEntry) -> str:
    keys = ", ".join(tensor.key for tensor in entry.checkpoint)
    return f"{entry.name} (made of {keys})" if keys else entry.name


def summary(differences: Sequence[str], limit: int = 5) -> str:
    """The first differences, and how many there are."""
    more = f"; and {len(differences) - limit} more" if len(differences) > limit else ""
    return "; ".join(differences[:limit]) + more


def read_ledger(bundle: OpenBundle) -> dict[str, GraphLedger] | None:
    """Path of a graph → its ledger, None where the bundle has none; InputError where it is malformed."""
    if LEDGER_NAME not in bundle.manifest.files:
        return None
    path = bundle.file(LEDGER_NAME)
    return dict(ledger_from_bytes(path.read_bytes(), str(path)))


def check_ledger(bundle: OpenBundle, variant: VariantRecord) -> tuple[str, ...]:
    """Every initializer and node of the variant's graph is the one that the export wrote.

    Returns:
        What could not be checked, for the report.

    Raises:
        VerificationError: names the initializers that were replaced, added or left out, or says that nodes were.
    """
    ledger = read_ledger(bundle)
    if ledger is None:
        return (NO_LEDGER,)
    bundle.model_files(variant)
    recorded = ledger.get(variant.file)
    differences = ["the ledger does not list it"]
    if recorded is not None:
        differences = ledger_differences(recorded, found_ledger(bundle.root, variant.file))
    if differences:
        raise VerificationError(
            "a graph is not the one that was exported",
            where=variant.file,
            expected=f"the weights and nodes that {LEDGER_NAME} records",
            got=summary(differences),
            fix="do not use this bundle; export the model again",
        )
    return ()
