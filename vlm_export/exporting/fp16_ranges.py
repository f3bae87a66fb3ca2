"""Measures which values of a part's graph leave float16's range, on the inputs that its proof records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from vlm_export.exporting.finishing import write_graph
from vlm_export.exporting.verification import PartVerification
from vlm_export.precision.fp16_ranges import MOST, graph_of_ranges
from vlm_export.runtime.engines.onnxruntime import OrtEngine

_GRAPH = "ranges.onnx"
_SHOWN = 3


def measure_wide(
    graph: ir.Model, verification: PartVerification, scratch: Path, threads: int | None
) -> dict[str, float] | None:
    """Values that float16 does not hold, with room for other inputs: name → the largest finite magnitude.

    Measured at the points of the golden records and at the samples: images, sentences. The engine reads the weights
    from their file, so that memory stays flat. None of a huge part, which is not measured, since every run takes
    minutes; its overflow is left to verification.

    Args:
        graph: in float32.
        scratch: a directory with room for the weights in float32.
    """
    if verification.is_huge:
        return None
    part = verification.part
    points = (part.examples(point.sizes, point.seed) for point in verification.golden_points())
    runs = [*points, *(sample.inputs for sample in verification.samples)]
    peaks = {
        name: max(_magnitude(inputs[name]) for inputs in runs)
        for name in part.signature.input_names
        if np.issubdtype(runs[0][name].dtype, np.floating)
    }
    measured, names = graph_of_ranges(graph)
    # A table of tokens computes nothing.
    if names:
        with TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / _GRAPH
            write_graph(measured, path)
            engine = OrtEngine(path, threads=threads, exact=True, mapped=True)
            for inputs in runs:
                for output, end in engine.run(inputs).items():
                    name = names[output]
                    peaks[name] = max(peaks.get(name, 0.0), _magnitude(end))
    return {name: peak for name, peak in peaks.items() if peak > MOST}


def _magnitude(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> float:
    """The largest finite one; an infinity, as masks have it, is float16's, too."""
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max(initial=0.0))


def wide_warning(wide: Mapping[str, float] | None) -> Iterator[str]:
    """What the manifest says of an export that keeps some values in float32, or that measured none."""
    if wide is None:
        yield "which values leave float16's range was not measured, since every run takes minutes: verification tells"
    elif wide:
        largest = sorted(wide, key=lambda name: -wide[name])[:_SHOWN]
        shown = ", ".join(f"{name} ({wide[name]:.3g})" for name in largest)
        more = "" if len(wide) == len(largest) else f" and {len(wide) - len(largest)} more"
        yield (
            f"{len(wide)} values come near or beyond the end of float16's range, so what makes and reads them stays in "
            f"float32: {shown}{more}"
        )
