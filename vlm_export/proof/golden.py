"""Golden records: inputs with the Reference's outputs, kept in the bundle as ONNX standard test data.

With them a machine without torch can prove its own engine again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_export.bundle.layout import golden_directory
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.proof.grid import Attention, GridPoint, grid_for, point_bytes
from vlm_export.proof.metrics import describe_array
from vlm_export.proof.points import Arrays
from vlm_export.proof.tensor_proto import bytes_from_tensor, tensor_from_bytes
from vlm_export.specs.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from vlm_export.family import Part, Reference
    from vlm_export.proof.samples import Sample

MAX_FILE_BYTES = 256 << 20
_MAX_RECORD_BYTES = 32 << 20
_SEEDS = (1000, 1001)  # not the grid's: the records are inputs that the grid has not seen


@dataclass(frozen=True)
class GoldenRecord:
    """Inputs of a part and the Reference's outputs for them, by name in the signature's order."""

    inputs: Arrays
    outputs: Arrays


def golden_points(signature: Signature, attention: Attention | None = None) -> tuple[GridPoint, ...]:
    """The points to record: batches 1 and 2 and every size of the other axes, a few rows in all.

    Axes are cut where a record would take more than `_MAX_RECORD_BYTES` (a decoder's logits at full length); what
    takes more at the smallest sizes is left out, but for the smallest.

    Args:
        attention: as for `grid_for`.
    """
    points = grid_for(signature, seeds=_SEEDS, budget_rows=1, budget_bytes=_MAX_RECORD_BYTES, attention=attention)
    sizes = [point_bytes(signature, point.sizes) for point in points]
    fitting = tuple(point for point, size in zip(points, sizes, strict=True) if size <= _MAX_RECORD_BYTES)
    return fitting or (points[sizes.index(min(sizes))],)


def golden_from_reference(
    part: Part, reference: Reference, points: Sequence[GridPoint], samples: Sequence[Sample] = ()
) -> list[GoldenRecord]:
    """Runs the Reference on the examples of every point and on the samples."""
    signature = part.signature
    records = []
    for inputs in (*(part.examples(point.sizes, point.seed) for point in points), *(s.inputs for s in samples)):
        outputs = reference(inputs)
        records.append(
            GoldenRecord(
                {name: inputs[name] for name in signature.input_names},
                {name: outputs[name] for name in signature.output_names},
            )
        )
    return records


def write_golden(directory: Path, part: str, records: Iterable[GoldenRecord]) -> tuple[str, ...]:
    """Writes the records under the bundle's directory; returns the paths written, relative to it."""
    written: list[str] = []
    for index, record in enumerate(records):
        folder = golden_directory(part, index)
        (directory / folder).mkdir(parents=True)
        for prefix, arrays in (("input", record.inputs), ("output", record.outputs)):
            for i, (name, array) in enumerate(arrays.items()):
                written.append(f"{folder}/{prefix}_{i}.pb")
                (directory / written[-1]).write_bytes(bytes_from_tensor(array, name))
    return tuple(written)


def iterate_golden(bundle: OpenBundle, part: str) -> Iterator[GoldenRecord]:
    """The records of a part, checked against its signature, one at a time; none when the bundle has none."""
    signature = bundle.manifest.part(part).signature
    index = 0
    while f"{golden_directory(part, index)}/input_0.pb" in bundle.manifest.files:
        folder = golden_directory(part, index)
        yield GoldenRecord(
            _read_tensors(bundle, f"{folder}/input", signature.inputs),
            _read_tensors(bundle, f"{folder}/output", signature.outputs),
        )
        index += 1


def _read_tensors(bundle: OpenBundle, prefix: str, specs: Sequence[TensorSpec]) -> Arrays:
    arrays = {}
    for i, spec in enumerate(specs):
        path = f"{prefix}_{i}.pb"
        if path not in bundle.manifest.files:
            raise InputError("a golden record is incomplete", where=path, fix="export the model again")
        size_bytes = bundle.manifest.files[path].size_bytes
        if size_bytes > MAX_FILE_BYTES:
            raise InputError("a golden file is too large", where=path, expected=f"at most {MAX_FILE_BYTES} bytes")
        name, array = tensor_from_bytes(bundle.file(path).read_bytes(), path)
        fixed = [(entry, size) for entry, size in zip(spec.shape, array.shape, strict=False) if isinstance(entry, int)]
        fits = array.ndim == len(spec.shape) and all(entry == size for entry, size in fixed)
        if name != spec.name or array.dtype.name != spec.dtype or not fits:
            raise InputError(
                "a golden tensor does not fit its part's signature",
                where=path,
                expected=f"{spec.name} {spec.dtype} {spec.shape}",
                got=f"{name[:80]} {describe_array(array)}",
                fix="export the model again",
            )
        arrays[spec.name] = array
    return arrays
