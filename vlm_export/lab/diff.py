"""What differs between two bundles, two graphs, or a bundle and its source: interface, structure, weights, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from vlm_export.api import Progress, export_again
from vlm_export.bundle.manifest import MANIFEST_NAME, PartRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.safe_files import check_path
from vlm_export.errors import UsageError
from vlm_export.graph.core.files import open_model
from vlm_export.graph.core.tensors import tensor_slots
from vlm_export.lab.bundle_diff import bundle_differences
from vlm_export.lab.differences import Diff, Measurement, OutputComparison, in_order
from vlm_export.lab.graph_diff import graph_differences
from vlm_export.lab.output_diff import (
    Arrays,
    RunGraph,
    compare_outputs,
    graph_runner,
    median_seconds,
    output_differences,
    sample_inputs,
)
from vlm_export.proof.engine import variant_bytes, verifying_engine
from vlm_export.proof.golden import iterate_golden


@dataclass(frozen=True)
class DiffOptions:
    """What the user may choose about a comparison.

    Attributes:
        tolerance: outputs are equal within this times max(1, largest value), weights within this times their largest.
        precision: only these variants of bundles.
        inputs: files for the inputs of two graphs (one .npz, or .pb files in order); none: random values.
        latency: measure how long a run takes, on the first input.
        threads: of the engine; None for its default.
    """

    tolerance: float = 0.0
    precision: str | None = None
    inputs: Sequence[Path] = ()
    latency: bool = False
    threads: int | None = None


def diff(
    left: str | Path, right: str | Path, options: DiffOptions | None = None, *, progress: Progress | None = None
) -> Diff:
    """Compares two bundles, two graphs, or a bundle with its source, which is exported again in the same way.

    Bundles run on the golden records of the left one.

    Args:
        left: the directory of a bundle, or a file with a graph.
        right: the same, or, of a bundle, a checkpoint as `vlm_export.export` takes it.
        progress: told of the stages of that export; None for silence.

    Raises:
        UsageError: a bundle and a graph, or inputs for bundles.
        InputError: one of them is no bundle, or no graph.
        EnvironmentFailure: a source, without the packages that exporting needs.
    """
    options = options or DiffOptions()
    if are_graphs(left, right):
        return _diff_graphs(Path(left), Path(right), options)
    if options.inputs:
        raise UsageError("inputs are for two graphs", got="bundles, which hold inputs of their own")
    bundle, names = open_bundle(left), (str(left), str(right))
    if (Path(right) / MANIFEST_NAME).exists():
        return diff_bundles(bundle, open_bundle(right), options, names)
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        return diff_bundles(bundle, export_again(bundle, str(right), Path(folder), progress), options, names)


def are_graphs(left: str | Path, right: str | Path) -> bool:
    """Whether two sides are graphs, and not bundles; UsageError where one is and the other is not."""
    for side in (left, right):
        check_path(side, "a bundle, a graph or a source")
    graphs = [Path(side).suffix == ".onnx" and not Path(side).is_dir() for side in (left, right)]
    if any(graphs) and not all(graphs):
        raise UsageError(
            "a graph is compared with a graph, a bundle with a bundle or its source",
            got=f"{left} and {right}",
            fix="name the graph inside the bundle, such as DIR/onnx/text_model.onnx",
        )
    return all(graphs)


def diff_bundles(
    left: OpenBundle, right: OpenBundle, options: DiffOptions, names: tuple[str, str] | None = None
) -> Diff:
    """Compares two opened bundles; names: what the result calls them, None for their directories."""
    differences, outputs = list(bundle_differences(left, right)), list[OutputComparison]()
    measured, not_run = list[Measurement](), list[str]()
    for part in left.manifest.parts:
        for variant in part.variants:
            other = _same_variant(right, part.name, variant.precision)
            if other is None or options.precision not in (None, variant.precision):
                continue
            where = part.name if variant.precision == "fp32" else f"{part.name}({variant.precision})"
            paths = [bundle.model_files(entry) for bundle, entry in ((left, variant), (right, other))]
            first, second = map(open_model, paths)
            differences += graph_differences(first, second, where, options.tolerance)
            sizes = [variant_bytes(bundle.manifest, entry) for bundle, entry in ((left, variant), (right, other))]
            measured.append(Measurement(f"{where} size", sizes[0], sizes[1], "bytes"))
            if part.signature.input_names != right.manifest.part(part.name).signature.input_names:
                not_run.append(f"outputs of {where}: the two take other inputs")
                continue
            runs = [_engine_run(path, size, options) for path, size in zip(paths, sizes, strict=True)]
            found = _outputs_of(left, part, runs[0], runs[1], where, options)
            if not found:
                not_run.append(f"outputs of {where}: {left.root.name} holds no golden records of it")
            outputs += found
            if options.latency and found:
                feeds = next(iterate_golden(left, part.name)).inputs
                measured.append(_latency(runs, feeds, where))
    differences += output_differences(outputs)
    named = names or (str(left.root), str(right.root))
    return Diff(*named, options.tolerance, in_order(differences), tuple(outputs), tuple(measured), tuple(not_run))


def _same_variant(bundle: OpenBundle, part: str, precision: str) -> VariantRecord | None:
    parts = {entry.name: entry for entry in bundle.manifest.parts}
    variants = {} if part not in parts else {entry.precision: entry for entry in parts[part].variants}
    return variants.get(precision)


def _engine_run(path: Path, size_bytes: int, options: DiffOptions) -> RunGraph:
    return verifying_engine(path, weights_bytes=size_bytes, threads=options.threads).run


def _outputs_of(
    bundle: OpenBundle, part: PartRecord, left: RunGraph, right: RunGraph, where: str, options: DiffOptions
) -> tuple[OutputComparison, ...]:
    inputs = (record.inputs for record in iterate_golden(bundle, part.name))
    return compare_outputs(inputs, left, right, where, options.tolerance)


def _diff_graphs(left: Path, right: Path, options: DiffOptions) -> Diff:
    first, second = open_model(left), open_model(right)
    differences = list(graph_differences(first, second, "", options.tolerance))
    measured = [Measurement("size", _graph_bytes(left, first), _graph_bytes(right, second), "bytes")]
    outputs, not_run = tuple[OutputComparison, ...](), list[str]()
    if {str(value.name) for value in first.graph.inputs} == {str(value.name) for value in second.graph.inputs}:
        inputs = sample_inputs(first, options.inputs)
        runs = [graph_runner(model) for model in (first, second)]
        outputs = compare_outputs(inputs, runs[0], runs[1], "", options.tolerance)
        if options.latency:
            measured.append(_latency(runs, inputs[0], ""))
    else:
        not_run.append("outputs: the two take other inputs")
    differences += output_differences(outputs)
    names = (str(left), str(right))
    return Diff(*names, options.tolerance, in_order(differences), outputs, tuple(measured), tuple(not_run))


def _graph_bytes(path: Path, model: ir.Model) -> int:
    """The graph's file with the data files that its tensors lie in."""
    tensors = (slot.tensor for slot in tensor_slots(model))
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in {path, *files})


def _latency(runs: Sequence[RunGraph], feeds: Arrays, where: str) -> Measurement:
    first, second = (1000 * seconds for seconds in median_seconds(runs, feeds))
    return Measurement(f"{where} latency".strip(), first, second, "ms")
