"""Where two graphs that should compute the same part: the error of every module by itself, and along the depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx_ir as ir

from vlm_export.api import source_modules
from vlm_export.bundle.manifest import MANIFEST_NAME
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.staging import staged_file
from vlm_export.errors import GraphError, InputError, UsageError, VerificationError
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.lab.alignment import Alignment, align
from vlm_export.lab.diff import are_graphs
from vlm_export.lab.differences import Difference
from vlm_export.lab.graph_diff import alignment_differences, model_differences, normalised
from vlm_export.lab.module_walk import compare_with_modules, without_moved_tensors
from vlm_export.lab.output_diff import LEAST_SAMPLES, row_count, sample_inputs
from vlm_export.lab.plots import error_plot
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.lab.region_walk import MARGIN, LeftSide, RegionError, RegionWalk
from vlm_export.lab.regions import (
    Arrays,
    RegionPair,
    RunRegion,
    last_uses,
    region_model,
    region_pairs,
    region_runner,
    run_region,
)
from vlm_export.lab.value_record import SUFFIX, RecordedPartValues, RecordWriter, ValueRecord, variant_files
from vlm_export.runtime.engines.choice import ONNXRUNTIME, EngineChoice


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        left, right: what was compared, as the user named it.
        samples: rows of inputs that every region was run on.
        regions: in the order of the left graph.
        operator: where in the first region that differs: the first operator whose result differs; "" where none is.
        causes: what of `diff` concerns the nodes of that region, or the whole graph.
        subgraph: where the region was written to, "" where it was not.
    """

    left: str
    right: str
    samples: int
    regions: tuple[RegionError, ...]
    operator: str = ""
    causes: tuple[Difference, ...] = ()
    subgraph: str = ""

    @property
    def first(self) -> RegionError | None:
        """The first region that differs, None where none does."""
        return next((region for region in self.regions if region.parts), None)

    def to_json(self) -> dict[str, Any]:
        """What `bisect --json` prints."""
        return {
            "left": self.left,
            "right": self.right,
            "samples": self.samples,
            "first": None if self.first is None else self.first.to_json(),
            "operator": self.operator,
            "causes": [asdict(cause) for cause in self.causes],
            "subgraph": self.subgraph,
            "regions": [region.to_json() for region in self.regions],
        }

    def raise_if_parted(self) -> None:
        """VerificationError that names the first region that differs."""
        if self.first is None:
            return
        place = f"{self.first.own:.1e}" + (f", at {self.operator}" if self.operator else "")
        raise VerificationError(
            "the two part",
            where=self.first.path,
            expected=f"an error of at most {MARGIN * self.first.floor:.1e} on equal inputs",
            got="; ".join([place, *map(str, self.causes[:3])]),
        )


@dataclass(frozen=True)
class BisectOptions:
    """What the user may choose.

    Attributes:
        part: only this part of bundles; None for all.
        precision: the variant of the left bundle.
        right_precision: the variant of the right one; None for the same.
        inputs: files for the inputs of two graphs (one .npz, or .pb files in order); none: random values.
        output: directory for the first region that differs, of each part in a folder of its own.
        engine: what runs the right side's modules; None: ONNX Runtime without its optimisations, as the left side.
    """

    part: str | None = None
    precision: str = "fp32"
    right_precision: str | None = None
    inputs: Sequence[Path] = ()
    output: Path | None = None
    engine: EngineChoice | None = None

    @property
    def run_right(self) -> RunRegion | None:
        """What runs the right side's modules, None for what runs the left's."""
        return None if self.engine is None else region_runner(self.engine)

    @property
    def right_engine(self) -> str:
        """Name of what runs the right side's modules, with its version where it is ONNX Runtime."""
        own = f"onnxruntime {version('onnxruntime')}"
        return own if self.engine is None or self.engine.engine == ONNXRUNTIME else self.engine.engine


def bisect(left: str | Path, right: str | Path, options: BisectOptions | None = None) -> tuple[Bisection, ...]:
    """Finds where two graphs, the parts of two bundles, or the graphs of a bundle and the modules of its source, part.

    Args:
        left: the directory of a bundle, or a file with a graph.
        right: the same (it may be the left bundle, at another precision), a checkpoint, or a record of the left
            bundle's values (`record_values`), whose version of ONNX Runtime is then held against this one.

    Raises:
        UsageError: a bundle and a graph, or inputs for bundles.
        InputError: one of them is no bundle or graph, or the two have no part in common.
    """
    options = options or BisectOptions()
    if are_graphs(left, right):
        first, second = normalised(open_model(left)), normalised(open_model(right))
        inputs = sample_inputs(first, options.inputs)
        names = (str(left), str(right))
        found = bisect_graphs(first, second, inputs, names=names, output=options.output, run_right=options.run_right)
        return (found,)
    if options.inputs:
        raise UsageError("inputs are for two graphs", got="bundles, which hold inputs of their own")
    names = (str(left), str(right))
    if Path(right).suffix == SUFFIX:
        return _bisect_record(open_bundle(left), ValueRecord(Path(right)), names, options)
    if not (Path(right) / MANIFEST_NAME).exists():
        return _bisect_source(open_bundle(left), names, options)
    return _bisect_bundles(open_bundle(left), open_bundle(right), names, options)


def _bisect_bundles(
    left: OpenBundle, right: OpenBundle, names: tuple[str, str], options: BisectOptions
) -> tuple[Bisection, ...]:
    shared = [part.name for part in left.manifest.parts if part.name in {p.name for p in right.manifest.parts}]
    chosen = shared if options.part is None else [left.manifest.part(options.part).name]
    if not chosen or not set(chosen) <= set(shared):
        raise InputError("the two bundles have no such part in common", where=" and ".join(names), got=str(chosen))
    precisions = options.precision, options.right_precision or options.precision
    found = []
    for name in chosen:
        first, second = (
            open_model(bundle.model_files(bundle.manifest.part(name).variant(precision)))
            for bundle, precision in zip((left, right), precisions, strict=True)
        )
        labels = [f"{side} {name} {precision}" for side, precision in zip(names, precisions, strict=True)]
        output = None if options.output is None else options.output / name
        inputs = part_inputs(left, name, first)
        sides = (labels[0], labels[1])
        found.append(
            bisect_graphs(first, second, inputs, name, names=sides, output=output, run_right=options.run_right)
        )
    return tuple(found)


def record_values(
    path: str | Path, target: str | Path, *, part: str | None = None, precision: str = "fp32", overwrite: bool = False
) -> tuple[str, ...]:
    """Writes what this ONNX Runtime makes of every module of a bundle, for `bisect` under another version.

    Args:
        path: the directory of the bundle.
        target: the file, whose name ends with `.npz`.
        part: only this part; None for all that have the variant.
        precision: the variant.
        overwrite: replace a file.

    Returns:
        The names of the recorded parts.

    Raises:
        UsageError: another file name, a file that is there, or no part has such a variant.
        InputError: no bundle, no such part, or a damaged one.
    """
    if Path(target).suffix != SUFFIX:
        raise UsageError("a record is an .npz file", expected=f"a name that ends with {SUFFIX}", got=str(target))
    bundle = open_bundle(path)
    parts = [entry for entry in bundle.manifest.parts if part in (None, entry.name)]
    chosen = [entry for entry in parts if precision in {variant.precision for variant in entry.variants}]
    if not chosen:
        bundle.manifest.part(part or bundle.manifest.parts[0].name).variant(precision)
    with staged_file(target, "record", overwrite=overwrite) as staged, ZipFile(staged, "w") as archive:
        writer = RecordWriter(archive)
        for entry in chosen:
            variant = entry.variant(precision)
            graph = open_model(bundle.model_files(variant))
            inputs = part_inputs(bundle, entry.name, graph)
            writer.start(entry.name, variant_files(bundle, variant), precision, inputs)
            sides = normalised(graph), normalised(open_model(bundle.model_files(variant)))
            walk, steps = _walk(*sides, align(*sides), inputs)
            for pair, done in steps:
                writer.add(str(pair.left.output.name), *walk.left_values(pair))
                walk.forget(done)
            writer.end()
        writer.close()
    return tuple(entry.name for entry in chosen)


def _bisect_record(
    bundle: OpenBundle, record: ValueRecord, names: tuple[str, str], options: BisectOptions
) -> tuple[Bisection, ...]:
    """The recorded values against what this ONNX Runtime makes of the same graphs."""
    recorded = record.head.parts
    chosen = list(recorded) if options.part is None else [options.part]
    if not set(chosen) <= set(recorded):
        raise InputError(
            "the record has no such part", where=names[1], expected=", ".join(recorded), got=str(options.part)
        )
    if options.right_precision is not None:
        raise UsageError("a record is compared with its own variant", got=f"also {options.right_precision}")
    found = []
    for name in chosen:
        record.check_graph(bundle, name, options.precision)
        path = bundle.model_files(bundle.manifest.part(name).variant(options.precision))
        labels = (
            f"{names[1]} {name} in onnxruntime {record.head.onnxruntime}",
            f"{names[0]} {name} in {options.right_engine}",
        )
        output = None if options.output is None else options.output / name
        found.append(
            bisect_graphs(
                open_model(path),
                open_model(path),
                record.inputs(name),
                name,
                names=labels,
                output=output,
                run_right=options.run_right or run_region,
                left_side=RecordedPartValues(record, name),
            )
        )
    return tuple(found)


def _bisect_source(bundle: OpenBundle, names: tuple[str, str], options: BisectOptions) -> tuple[Bisection, ...]:
    """The float32 graphs against the PyTorch modules that the source fills."""
    if options.precision != "fp32":
        raise UsageError(
            "a source is compared with the float32 graphs",
            got=options.precision,
            fix=f"compare the variants: vlm-export bisect {names[0]} --against {options.precision}",
        )
    if options.engine is not None:
        raise UsageError("a source is compared with ONNX Runtime", got=f"the engine {options.engine.engine}")
    found = []
    with source_modules(bundle, names[1]) as modules:
        for part in bundle.manifest.parts:
            if options.part not in (None, part.name):
                continue
            graph = normalised(open_model(bundle.model_files(part.variant(options.precision))))
            inputs, own = part_inputs(bundle, part.name, graph), modules[part.name]
            walk = compare_with_modules(graph, own.names, partial(own.values, inputs=inputs), inputs, part.name)
            kept, subgraph = without_moved_tensors(list(walk)), ""
            first = next((one for one in kept if one.error.parts), None)
            if first is not None and options.output is not None:
                model = region_model(graph, first.region, first.feeds)
                subgraph = _written(options.output / part.name, model, first.feeds, first.expected)
            labels = (f"{names[1]} {part.name} in PyTorch", f"{names[0]} {part.name}")
            rows, errors = sum(map(row_count, inputs)), tuple(one.error for one in kept)
            found.append(Bisection(*labels, rows, errors, subgraph=subgraph))
    if not found:
        raise InputError("the bundle has no such part", where=names[0], got=str(options.part))
    return tuple(found)


def part_inputs(bundle: OpenBundle, part: str, model: ir.Model) -> list[Arrays]:
    """What a part is run on by its bundle's own means; where that has fewer than 8 rows, also random inputs."""
    inputs = real_inputs(bundle, bundle.manifest.part(part))
    if sum(map(row_count, inputs)) < LEAST_SAMPLES:
        try:
            inputs += sample_inputs(model)
        except GraphError:
            # A decoder's cache and masks go together, which random values do not.
            if not inputs:
                raise
    return inputs


def bisect_graphs(
    left: ir.Model,
    right: ir.Model,
    inputs: Sequence[Arrays],
    where: str = "",
    *,
    names: tuple[str, str] = ("left", "right"),
    output: Path | None = None,
    run_right: RunRegion | None = None,
    left_side: LeftSide | None = None,
) -> Bisection:
    """Compares two graphs region by region.

    Args:
        inputs: sets of inputs that both take, by name; together at least 8 rows say something about most faults.
        where: what stands before the names of modules, such as the part.
        names: what the two are called in the result.
        output: a directory for the first region that differs, as a model with its inputs and what is expected; made.
        run_right: another engine for the right graph; None for the left one's.
        left_side: what computes the left graph; None for this ONNX Runtime.

    Raises:
        GraphError: no tensor of the two corresponds, or the left graph does not run.
    """
    left, right = normalised(left), normalised(right)
    alignment = align(left, right)
    walk, steps = _walk(left, right, alignment, inputs, run_right, left_side)
    errors, operator, subgraph, causes = list[RegionError](), "", "", list[Difference]()
    for pair, done in steps:
        error = walk.compare(pair, where)
        if error.parts and not any(before.parts for before in errors):
            operator, saved = walk.first_operator(pair), walk.saved(pair)
            concerned = alignment.within(set(pair.left.nodes), set(pair.right.nodes))
            causes = [*model_differences(left, right, where), *alignment_differences(left, right, concerned, where)]
            subgraph = "" if output is None or saved is None else _written(output, *saved)
        errors.append(error)
        walk.forget(done)
    rows = sum(map(row_count, inputs))
    return Bisection(*names, rows, tuple(errors), operator, tuple(causes), subgraph)


def _walk(
    left: ir.Model,
    right: ir.Model,
    alignment: Alignment,
    inputs: Sequence[Arrays],
    run_right: RunRegion | None = None,
    left_side: LeftSide | None = None,
) -> tuple[RegionWalk, list[tuple[RegionPair, set[ir.Value]]]]:
    """A walk over two normalised graphs, and its regions with what none reads after each."""
    pairs = region_pairs(left, right, alignment)
    ends = [{value.name for value in model.graph.outputs} for model in (left, right)]
    if not pairs or not (alignment.nodes or ends[0] & ends[1]):
        raise GraphError("no tensor of the two graphs corresponds", fix="compare them by their outputs: diff")
    steps = list(zip(pairs, last_uses(pairs, alignment), strict=True))
    return RegionWalk(left, right, alignment, inputs, run_right, left_side), steps


def _written(folder: Path, model: ir.Model, inputs: Arrays, expected: Array) -> str:
    """Writes the region's model, its inputs and what the left graph makes of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "region.onnx"
    save_model(model, path, storage=Storage(), overwrite=True)
    for name, arrays in (("inputs", dict(inputs)), ("expected", {str(model.graph.outputs[0].name): expected})):
        np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)
    return str(path)


def bisection_plot(found: Bisection) -> str:
    """The errors along the depth as an SVG document, the floor drawn in."""
    labels = [region.path for region in found.regions]
    first = next((index for index, region in enumerate(found.regions) if region.parts), None)
    lines = {
        "error of all before": [region.total for region in found.regions],
        "error of the module": [region.own for region in found.regions],
        "floor": [region.floor for region in found.regions],
    }
    return error_plot(f"{found.left} against {found.right}", labels, lines, first)
