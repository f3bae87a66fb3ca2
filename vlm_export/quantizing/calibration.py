"""Ranges and outliers of activations, calibrated on what a part was fed, one input at a time.

Ranges are those of onnxruntime's own histograms.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.graph.core.files import Storage, save_model
from vlm_export.precision.one_node import quiet
from vlm_export.precision.quantised import Calibration, calibrated_tensors, split_gemms
from vlm_export.precision.recipes import Recipe
from vlm_export.precision.smoothing import smooth, smoothable
from vlm_export.quantizing.task_runs import Feeds
from vlm_export.runtime.engines.onnxruntime import Array, OrtEngine

PERCENTILE = 99.999
"""Of the values, those within the range; the others are cut. Less than all, so that one value decides no range."""
_BINS = 2048


def calibrated(
    model: ir.Model, recipe: Recipe, feeds: Sequence[Feeds], scratch: Path, threads: int | None
) -> Calibration:
    """What a static recipe needs, for `precision.quantised.quantise`.

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
    largest = _largest(work, feeds, scratch, threads) if recipe.smooths else {}
    smooth(work.graph, largest)
    return Calibration(_ranges(work, calibrated_tensors(model, recipe), feeds, scratch, threads), largest)


def _largest(model: ir.Model, feeds: Sequence[Feeds], scratch: Path, threads: int | None) -> dict[str, Array]:
    names = [one.value for one in smoothable(model.graph)]
    found: dict[str, Array] = {}
    for seen in _runs(model, names, feeds, scratch, threads):
        for name in names:
            channels = np.abs(seen[name]).reshape(-1, seen[name].shape[-1]).max(axis=0)
            found[name] = np.maximum(channels, found.get(name, channels))
    return found


def _ranges(
    model: ir.Model, names: Sequence[str], feeds: Sequence[Feeds], scratch: Path, threads: int | None
) -> dict[str, tuple[float, float]]:
    if not names:
        return {}
    with quiet(), redirect_stdout(io.StringIO()):
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector("percentile", False, _BINS, 0, PERCENTILE, "same")
        for seen in _runs(model, names, feeds, scratch, threads):
            collector.collect({name: [seen[name]] for name in names})
        found = collector.compute_collection_result()
    return {name: (float(limits[0]), float(limits[1])) for name, limits in found.items()}


def _runs(
    model: ir.Model, names: Sequence[str], feeds: Sequence[Feeds], scratch: Path, threads: int | None
) -> Iterator[Mapping[str, Array]]:
    """The named values of the graph, and its inputs, for each of the inputs."""
    if not names:
        return
    work = model.clone()
    values = {str(value.name): value for node in work.graph for value in node.outputs}
    outputs = {str(value.name) for value in work.graph.outputs}
    for name in names:
        if name in values and name not in outputs:
            work.graph.outputs.append(values[name])
    paths = save_model(work, scratch / "calibration.onnx", storage=Storage())
    engine = OrtEngine(paths[0], threads=threads)
    for one in feeds:
        yield {**one, **engine.run(one)}
    for path in paths:
        path.unlink()
