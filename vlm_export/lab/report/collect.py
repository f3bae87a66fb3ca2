"""Makes a report: proves the bundle again, each check by itself, so that one failure does not hide the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from vlm_export.bundle.ledger import LedgerEntry, check_ledger, read_ledger
from vlm_export.bundle.manifest import PartRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import EnvironmentFailure, VlmExportError
from vlm_export.graph.core.files import open_model
from vlm_export.graph.look.show import describe_model
from vlm_export.lab.module_paths import module_of, parameter_name
from vlm_export.lab.output_diff import median_seconds
from vlm_export.lab.plots import PlottedPoint
from vlm_export.lab.ranges import PartRanges, part_ranges
from vlm_export.lab.report.findings import GraphFacts, OutputProof, Proof, Report, StageProof
from vlm_export.lab.report.pictures import contract_pictures
from vlm_export.lab.report.recorded import recorded_proof
from vlm_export.proof.contract import ContractReport, replay
from vlm_export.proof.engine import engine_label, verifying_start
from vlm_export.proof.golden import iterate_golden
from vlm_export.proof.metrics import Comparison, Deviation
from vlm_export.proof.points import EngineRun, PointResult, sizes_from_inputs
from vlm_export.proof.recheck import verify_variant
from vlm_export.proof.report import PartReport

_NAN = float("nan")
NO_LAYER = "constants"


@dataclass(frozen=True)
class ReportOptions:
    """What the user may choose.

    Attributes:
        run: prove again on this machine; otherwise graphs are not run, and figures are those of the export.
        latency: measure how long one run takes.
        precision: only this variant of each part; None for all.
        providers, threads: of ONNX Runtime, as for `verify`.
    """

    run: bool = True
    latency: bool = False
    precision: str | None = None
    providers: Sequence[str] = ("cpu",)
    threads: int | None = None


def report(bundle: str | Path, options: ReportOptions | None = None) -> Report:
    """Collects what there is to tell of a bundle. What fails is told in the report and raises nothing.

    Raises:
        UsageError: no part has a variant of that precision.
        InputError: it is no bundle, or its manifest is malformed.
        EnvironmentFailure: this machine lacks memory or a package.
    """
    options = options or ReportOptions()
    opened = open_bundle(bundle)
    variants = opened.manifest.chosen(options.precision)
    problems = _Problems()
    for name in opened.manifest.files:
        problems.attempt(partial(opened.file, name))
    for _, variant in variants:
        problems.attempt(partial(check_ledger, opened, variant))
    start = verifying_start(opened, options.providers, options.threads)
    recorded = recorded_proof(opened.manifest, options.precision)
    if options.run:
        proof = _proved(opened, variants, start, options, problems)
    else:
        proof = replace(recorded, problems=(*problems.found, *recorded.problems))
    graphs = tuple(_graph_facts(opened, part, variant) for part, variant in variants)
    if options.latency:
        graphs = tuple(replace(facts, latency=_latency(opened, facts, start)) for facts in graphs)
    pixels = [failure for stage in proof.stages for failure in stage.failures] if options.run else []
    measured, unmeasured = _measured_ranges(opened) if options.run else ((), ())
    proof = replace(proof, not_run=(*proof.not_run, *unmeasured))
    return Report(opened, proof, recorded, graphs, contract_pictures(opened, pixels), measured, options.run)


class _Problems:
    """What failed, each told once; what is this machine's fault goes through."""

    def __init__(self) -> None:
        self.found: list[VlmExportError] = []

    def attempt(self, action: Callable[[], object]) -> None:
        """Runs the action and takes note of its failure."""
        try:
            action()
        except EnvironmentFailure:
            raise
        except VlmExportError as error:
            if str(error) not in map(str, self.found):
                self.found.append(error)


def _proved(
    bundle: OpenBundle,
    variants: Sequence[tuple[PartRecord, VariantRecord]],
    start: Callable[[str, str], EngineRun],
    options: ReportOptions,
    problems: _Problems,
) -> Proof:
    """The graphs on the golden records, and the contract; what fails is added to the problems."""
    outputs, not_run, label = list[OutputProof](), list[str](), engine_label(options.providers)

    def verify(part: PartRecord, variant: VariantRecord) -> None:
        engine = start(part.name, variant.precision)
        found = verify_variant(bundle, part, variant, engine, label)
        outputs.extend(_output_proofs(found))
        not_run.extend(f"{part.name} {variant.precision}: {text}" for text in found.not_run)
        found.raise_if_failed()

    for part, variant in variants:
        problems.attempt(partial(verify, part, variant))
        if (part.name, variant.precision) not in {(output.part, output.variant) for output in outputs}:
            not_run.append(f"{part.name} {variant.precision}: the graph could not be compared")
    contracts: list[ContractReport] = []
    problems.attempt(lambda: contracts.append(replay(bundle, start, precision=options.precision)))
    for contract in contracts:
        for check in contract.checks:
            problems.attempt(replace(contract, checks=(check,)).raise_if_failed)
        not_run += [f"contract: {text}" for text in contract.not_run]
    not_run += [] if contracts else ["contract: it could not be compared"]
    stages = tuple(
        StageProof(check.stage, check.where, check.variant, check.compared, not check.failures, check.failures)
        for contract in contracts
        for check in contract.checks
    )
    made_by = contracts[0].made_by if contracts else {}
    return Proof(label, tuple(outputs), stages, tuple(problems.found), tuple(not_run), made_by)


def _output_proofs(found: PartReport) -> Iterator[OutputProof]:
    worst = found.worst
    named = [failure.output for _, failure in found.failures if failure.output]
    for name in dict.fromkeys([*worst, *named]) or ("",):
        comparison, seen = worst.get(name), found.seen.get(name)
        gate = None if found.floor is None else found.floor.gate(name)
        floor = None if found.floor is None else found.floor.outputs.get(name)
        dots = tuple(_dot(point, name) for point in found.points)
        max_abs, cosine = (_NAN, _NAN) if comparison is None else (comparison.max_abs, comparison.cosine)
        at_floor, at_gate, at_worst = (_NAN if one is None else one.row_error for one in (floor, gate, seen))
        numbers = (max_abs, cosine, at_floor, at_gate, at_worst)
        failed = sum(dot.failed for dot in dots)
        yield OutputProof(found.part, found.variant, name, len(found.points), *numbers, failed, dots)


def _dot(point: PointResult, output: str) -> PlottedPoint:
    failed = any(failure.output in (output, "") for failure in point.failures)
    return PlottedPoint(str(point), _error(point.deviations.get(output), point.comparisons.get(output)), failed)


def _error(deviation: Deviation | None, comparison: Comparison | None) -> float:
    """The relative error of a row; where no floor judges the output, the largest difference over the largest value."""
    if deviation is not None:
        return deviation.row_error
    if comparison is None or not comparison.max_reference_abs:
        return _NAN
    return comparison.max_abs / comparison.max_reference_abs


def _graph_facts(bundle: OpenBundle, part: PartRecord, variant: VariantRecord) -> GraphFacts:
    size = sum(bundle.manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))
    facts = GraphFacts(part.name, variant.precision, variant.file, size, {}, {}, None)
    try:
        recorded = (read_ledger(bundle) or {}).get(variant.file)
        entries = None if recorded is None else recorded.initializers
        model = open_model(bundle.model_files(variant))
    except EnvironmentFailure:
        raise
    except VlmExportError as error:
        return replace(facts, refusal=error.what)
    operators = describe_model(model)["operators"]
    return replace(facts, operators=operators, layer_bytes=_layer_bytes(model, entries or ()), ledger=entries)


def _layer_bytes(model: ir.Model, entries: Sequence[LedgerEntry]) -> dict[str, int]:
    made_of = {entry.name: entry.parameters[0] for entry in entries if entry.parameters}
    sizes: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            sizes[_layer(made_of.get(name) or parameter_name(name))] += value.const_value.nbytes
    return dict(sizes)


def _layer(parameter: str) -> str:
    """The module up to the first number, such as `blocks.7`: a layer, or what stands outside of all layers."""
    steps = module_of(parameter).split(".") if parameter else [NO_LAYER]
    number = next((index for index, step in enumerate(steps) if step.isdigit()), len(steps))
    return ".".join(steps[: number + 1])


def _measured_ranges(bundle: OpenBundle) -> tuple[tuple[PartRanges, ...], tuple[str, ...]]:
    """What the tensors of each part are on real inputs, and which parts could not be measured."""
    found, refused = list[PartRanges](), list[str]()
    for part in bundle.manifest.parts:
        try:
            found.append(part_ranges(bundle, part))
        except EnvironmentFailure:
            raise
        except VlmExportError as error:
            refused.append(f"ranges of {part.name}: {error.what}")
    return tuple(found), tuple(refused)


def _latency(bundle: OpenBundle, facts: GraphFacts, start: Callable[[str, str], EngineRun]) -> str:
    try:
        record = next(iterate_golden(bundle, facts.part), None)
        if record is None:
            return "not measured: the bundle holds no golden record of the part"
        (seconds,) = median_seconds([start(facts.part, facts.variant)], record.inputs)
    except EnvironmentFailure:
        raise
    except VlmExportError as error:
        return f"not measured: {error.what}"
    sizes = sizes_from_inputs(bundle.manifest.part(facts.part).signature, record.inputs)
    at = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    return f"{1000 * seconds:.3g} ms" + (f" ({at})" if at else "")
