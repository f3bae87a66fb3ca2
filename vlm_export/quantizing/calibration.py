"""Ranges of activations, calibrated by onnxruntime's own histograms on what a part was fed; one input at a time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.graph.core.files import Storage, save_model
from vlm_export.precision.one_node import quiet
from vlm_export.precision.quantised import calibrated_tensors, split_gemms
from vlm_export.precision.recipes import Recipe
from vlm_export.quantizing.task_runs import Feeds
from vlm_export.runtime.engines.onnxruntime import OrtEngine

PERCENTILE = 99.999
"""Of the values, those within the range; the others are cut. Less than all, so that one value decides no range."""
_BINS = 2048


def calibrated_ranges(
    model: ir.Model, recipe: Recipe, feeds: Sequence[Feeds], scratch: Path, threads: int | None
) -> dict[str, tuple[float, float]]:
    """Tensor → smallest and largest value, for `precision.quantised.quantise`.

    Args:
        feeds: inputs of the part, none of which is measured later.
        scratch: a folder with room for the graph.

    Raises:
        InputError: there are no inputs to calibrate on.
    """
    if not feeds:
        raise InputError(
            "a part has no inputs to calibrate on",
            where=str(model.graph.name),
            expected="images or texts that lead to it",
            fix="name more with --images and --texts, or take int8, whose ranges are not calibrated",
        )
    work = model.clone()
    split_gemms(work.graph)
    names = calibrated_tensors(model, recipe)
    if not names:
        return {}
    values = {str(value.name): value for node in work.graph for value in node.outputs}
    outputs = {str(value.name) for value in work.graph.outputs}
    for name in names:
        if name in values and name not in outputs:
            work.graph.outputs.append(values[name])
    paths = save_model(work, scratch / "calibration.onnx", storage=Storage())
    engine = OrtEngine(paths[0], threads=threads)
    with quiet(), redirect_stdout(io.StringIO()):
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector("percentile", False, _BINS, 0, PERCENTILE, "same")
        for one in feeds:
            seen: Mapping[str, object] = {**one, **engine.run(one)}
            collector.collect({name: [seen[name]] for name in names})
        found = collector.compute_collection_result()
    for path in paths:
        path.unlink()
    return {name: (float(limits[0]), float(limits[1])) for name, limits in found.items()}
