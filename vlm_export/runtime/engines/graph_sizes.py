"""Whether an opened graph has the sizes that the manifest states for its part."""

from __future__ import annotations

from pathlib import Path

from vlm_export.bundle.manifest import PartRecord
from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import Engine


def check_graph_sizes(engine: Engine, part: PartRecord, path: Path) -> None:
    """InputError where an input or output has another number of axes, or another size, than the part's signature.

    Axes without a fixed size in the graph, or in the signature, are left to the run.
    """
    stated = {tensor.name: tensor.shape for tensor in (*part.signature.inputs, *part.signature.outputs)}
    for port in (*engine.inputs, *engine.outputs):
        expected = stated.get(port.name, port.shape)
        pairs = zip(expected, port.shape, strict=False)
        differs = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if differs or len(expected) != len(port.shape):
            raise InputError(
                f"the graph of part {part.name!r} has other sizes than the manifest states",
                where=f"{path}: {port.name}",
                expected=_text(expected),
                got=_text(port.shape),
                fix="copy the bundle again, or export it again with --overwrite",
            )


def _text(shape: tuple[int | str | None, ...]) -> str:
    return f"({', '.join('?' if axis is None else str(axis) for axis in shape)})"
