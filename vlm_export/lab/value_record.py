"""What one ONNX Runtime makes of every module of a bundle's graphs, as a file that `bisect` reads under another one.

The file is an .npz archive: an array for each module's output in each set of inputs, the inputs themselves, and
`record.json`, which names them. Arrays are written and read one module at a time, so that memory stays bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import onnx_ir as ir

from vlm_export.bundle.manifest import FileRecord, Sha256, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.lab.regions import Arrays
from vlm_export.specs.codec import Spec, between, not_empty

SUFFIX = ".npz"
_HEAD = "record.json"
_FIX = "record it again, under the other version: vlm-export bisect DIR --record FILE.npz"


@dataclass(frozen=True)
class RecordedTensor(Spec):
    """A tensor of the graph: its floor as `RegionError` states it, 0 for inputs."""

    name: str
    floor: Annotated[float, between(0)] = 0.0


@dataclass(frozen=True)
class RecordedPart(Spec):
    """A part's graph and what is recorded of it.

    Attributes:
        precision: of the variant.
        files: sha256 of the graph and of its data files, in the manifest's order.
        sets: number of sets of inputs.
        inputs, outputs: of the graph, and of its modules in order.
    """

    precision: str
    files: tuple[Sha256, ...]
    sets: Annotated[int, between(1)]
    inputs: Annotated[tuple[RecordedTensor, ...], not_empty("at least one input")]
    outputs: Annotated[tuple[RecordedTensor, ...], not_empty("at least one module")]


@dataclass(frozen=True)
class RecordHead(Spec):
    """`record.json`: the version of ONNX Runtime that computed, and the parts by name."""

    schema: Literal[1]
    onnxruntime: str
    parts: Mapping[str, RecordedPart]


class RecordWriter:
    """Writes a record to a file that is open for writing; `close` finishes it."""

    def __init__(self, archive: ZipFile) -> None:
        self._archive, self._parts = archive, dict[str, RecordedPart]()

    def start(self, part: str, files: Sequence[FileRecord], precision: str, inputs: Sequence[Arrays]) -> None:
        """A part, with the sets of inputs that its modules are run on."""
        self._part, self._sets = part, len(inputs)
        self._stated = precision, tuple(file.sha256 for file in files)
        self._inputs = tuple(RecordedTensor(name) for name in inputs[0])
        self._outputs: list[RecordedTensor] = []
        for place, tensor in enumerate(self._inputs):
            self._write("inputs", place, [feeds[tensor.name] for feeds in inputs])

    def add(self, name: str, arrays: Sequence[Array], floor: float) -> None:
        """The output of the part's next module, in every set."""
        self._write("outputs", len(self._outputs), arrays)
        self._outputs.append(RecordedTensor(name, floor))

    def end(self) -> None:
        """Ends the part."""
        self._parts[self._part] = RecordedPart(*self._stated, self._sets, self._inputs, tuple(self._outputs))

    def close(self) -> None:
        head = RecordHead(1, version("onnxruntime"), self._parts)
        self._archive.writestr(_HEAD, json.dumps(head.to_json(), indent=1))

    def _write(self, kind: str, place: int, arrays: Sequence[Array]) -> None:
        for number, array in enumerate(arrays):
            with self._archive.open(_member(self._part, kind, place, number), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


class RecordedPartValues:
    """The left side of a comparison: what the other runtime computed, in place of running the left graph here."""

    def __init__(self, record: ValueRecord, part: str) -> None:
        self._record, self._part = record, part
        self._places = {tensor.name: place for place, tensor in enumerate(record.head.parts[part].outputs)}

    def run(self, model: ir.Model, feeds: Sequence[Arrays]) -> list[dict[str, Array]]:
        """The recorded outputs of a module; InputError where one of the model's is none of any module."""
        names = [str(value.name) for value in model.graph.outputs]
        arrays = {name: self._record.arrays(self._part, "outputs", self._place(name)) for name in names}
        return [{name: arrays[name][number] for name in names} for number in range(len(feeds))]

    def floor(self, model: ir.Model, _feeds: Sequence[Arrays], _expected: Sequence[Array]) -> float:
        """As the recording runtime measured it."""
        place = self._place(str(model.graph.outputs[-1].name))
        return self._record.head.parts[self._part].outputs[place].floor

    def _place(self, name: str) -> int:
        if name not in self._places:
            raise InputError("the record has no such tensor", where=str(self._record.path), got=name, fix=_FIX)
        return self._places[name]


class ValueRecord:
    """An opened record.

    Raises:
        InputError: the file is no record, or a damaged one; also when its arrays are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with ZipFile(path) as archive, _stored(archive, _HEAD) as file:
                content = file.read(MAX_JSON_BYTES + 1)
        # zipfile and zlib raise classes of their own.
        except Exception as error:
            raise self._damaged(error) from error
        self.head = RecordHead.from_json(json_object_from_bytes(content, f"{path}: {_HEAD}"), f"{path}: {_HEAD}")

    def inputs(self, part: str) -> list[Arrays]:
        """The sets of inputs of a part."""
        recorded = self.head.parts[part]
        arrays = [(tensor.name, self.arrays(part, "inputs", place)) for place, tensor in enumerate(recorded.inputs)]
        return [{name: found[number] for name, found in arrays} for number in range(recorded.sets)]

    def arrays(self, part: str, kind: str, place: int) -> list[Array]:
        """A tensor in every set."""
        try:
            with ZipFile(self.path) as archive:
                found = []
                for number in range(self.head.parts[part].sets):
                    with _stored(archive, _member(part, kind, place, number)) as file:
                        found.append(np.lib.format.read_array(file, allow_pickle=False))
                return found
        # zipfile, zlib and numpy raise classes of their own.
        except Exception as error:
            raise self._damaged(error) from error

    def check_graph(self, bundle: OpenBundle, part: str, precision: str) -> None:
        """InputError where a bundle's variant is not the graph that was recorded."""
        recorded = self.head.parts[part]
        variant = bundle.manifest.part(part).variant(precision)
        files = tuple(file.sha256 for file in variant_files(bundle, variant))
        if (recorded.precision, recorded.files) != (precision, files):
            raise InputError(
                f"the record is of another graph of the part {part!r}",
                where=str(self.path),
                expected=f"{precision}, sha256 {files[0][:16]}…",
                got=f"{recorded.precision}, sha256 {recorded.files[0][:16] if recorded.files else 'none'}…",
                fix=f"name its variant with --precision {recorded.precision}, or {_FIX}",
            )

    def _damaged(self, error: Exception) -> InputError:
        got = f"{type(error).__name__}: {error}"[:200]
        return InputError("this is no record of a bundle's values", where=str(self.path), got=got, fix=_FIX)


def variant_files(bundle: OpenBundle, variant: VariantRecord) -> list[FileRecord]:
    """The manifest's records of a variant's graph and data files."""
    return [bundle.manifest.files[name] for name in (variant.file, *variant.external_data)]


def _stored(archive: ZipFile, name: str) -> IO[bytes]:
    """A member as it is written here: a compressed one could grow without bound."""
    if archive.getinfo(name).compress_type != ZIP_STORED:
        raise BadZipFile(f"{name} is compressed")
    return archive.open(name)


def _member(part: str, kind: str, place: int, number: int) -> str:
    return f"{part}/{kind}/{place}.{number}.npy"
