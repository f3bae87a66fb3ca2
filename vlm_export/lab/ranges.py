"""The tensors of a bundle on real inputs: what float16 and TensorRT lose of them, and what to keep in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from vlm_export.bundle.manifest import PartRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, UsageError, VerificationError, suggestion
from vlm_export.graph.core.files import open_model
from vlm_export.lab.graph_diff import normalised
from vlm_export.lab.module_paths import constant_of, joined, module_paths, parameter_name
from vlm_export.lab.output_diff import row_count
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.lab.tensor_stats import TensorStats
from vlm_export.lab.value_walk import walk_values
from vlm_export.precision.fp16 import planned_copy
from vlm_export.precision.fp16_ranges import MOST, halved_values
from vlm_export.precision.fp16_rules import LARGEST_FLOAT16, MOVES
from vlm_export.proof.metrics import json_number

Kind = Literal[
    "non-finite",
    "overflow",
    "near-overflow",
    "flushed",
    "denormal",
    "zero",
    "constant",
    "dead-channels",
    "saturated",
    "kept",
    "mask",
]
"""Kinds of findings, worst first."""

KINDS: tuple[Kind, ...] = get_args(Kind)
# Of a tensor's values: a few small ones are in every tensor.
_LEAST_FLUSHED = 0.01
_LEAST_DENORMAL = 0.1
_LEAST_SATURATED = 0.5
_BLOCK_VALUES = 1 << 24


@dataclass(frozen=True)
class Finding:
    """One thing about one tensor.

    Attributes:
        where: part and module, such as `text.blocks.7.mlp`.
        operator: what makes the tensor; "weight" and "input" for what is not computed.
        tensor: its name in the graph.
        what: a sentence without its end.
        share: of the tensor's values, rows or channels that it concerns.
        peak: the tensor's largest finite magnitude.
    """

    kind: Kind
    where: str
    operator: str
    tensor: str
    what: str
    share: float
    peak: float


@dataclass(frozen=True)
class KeptOperator:
    """An operator that is to stay in float32, and why: a sentence about the value that it makes or reads."""

    where: str
    operator: str
    tensor: str
    reason: str


@dataclass(frozen=True)
class PartRanges:
    """What was found of one part.

    Attributes:
        samples: rows of inputs that it ran on.
        tensors: every float tensor that depends on an input, by name, in the graph's order.
        wide: tensors that float16 does not hold, with room for other inputs → largest magnitude; the names are what
            `precision.fp16.convert_to_fp16` takes as `wide`.
        keep: the operators that this keeps in float32, and that half precision would else not.
        not_run: what was not looked at, one sentence each.
    """

    part: str
    samples: int
    tensors: Mapping[str, TensorStats]
    findings: tuple[Finding, ...]
    wide: Mapping[str, float]
    keep: tuple[KeptOperator, ...]
    not_run: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "samples": self.samples,
            "plan": {"wide": dict(self.wide), "keep_fp32": [asdict(entry) for entry in self.keep]},
            "tensors": {name: stats.to_json() for name, stats in self.tensors.items()},
            "not_run": list(self.not_run),
        }


@dataclass(frozen=True)
class Ranges:
    """What was found of a bundle's parts."""

    parts: tuple[PartRanges, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all parts, worst first."""
        found = [finding for part in self.parts for finding in part.findings]
        return tuple(sorted(found, key=lambda one: (KINDS.index(one.kind), -_badness(one))))

    def of(self, kinds: Collection[Kind]) -> tuple[Finding, ...]:
        """Those of some kinds."""
        return tuple(finding for finding in self.findings if finding.kind in kinds)

    def raise_if_any(self, kinds: Collection[Kind]) -> None:
        """VerificationError for the first finding of these kinds."""
        found = self.of(kinds)
        if found:
            raise VerificationError(
                f"a tensor is not what it must be: {found[0].kind}",
                where=found[0].where,
                expected=f"no finding of the kinds {', '.join(kinds)}",
                got=f"{found[0].tensor} {found[0].what}" + (f", and {len(found) - 1} more" if len(found) > 1 else ""),
            )

    def to_json(self) -> dict[str, Any]:
        """What `ranges --json` prints."""
        findings = [{name: json_number(value) for name, value in asdict(one).items()} for one in self.findings]
        return {"findings": findings, "parts": [part.to_json() for part in self.parts]}


def _badness(finding: Finding) -> float:
    return finding.peak if finding.kind in ("overflow", "near-overflow", "kept") else finding.share


def ranges(bundle: str | Path, *, parts: Sequence[str] | None = None) -> Ranges:
    """Runs the float32 graphs on golden records and on the contract's images and texts, and looks at every tensor.

    Args:
        bundle: the bundle's directory.
        parts: only these; None for all.

    Raises:
        InputError: no such bundle or part, or one without a float32 graph.
        GraphError: a graph cannot be run.
    """
    opened = open_bundle(bundle)
    names = [part.name for part in opened.manifest.parts] if parts is None else parts
    return Ranges(tuple(part_ranges(opened, opened.manifest.part(name)) for name in names))


def checked_kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of these names; UsageError for a name of none."""
    for name in names:
        if name not in KINDS:
            raise UsageError(f"there is no kind of finding {name!r}", fix=suggestion(name, KINDS))
    return tuple(kind for kind in KINDS if kind in names)


def part_ranges(bundle: OpenBundle, part: PartRecord) -> PartRanges:
    """What `ranges` finds of one part of an opened bundle."""
    if "fp32" not in [variant.precision for variant in part.variants]:
        raise InputError(
            "ranges are measured on a float32 graph",
            where=f"part {part.name}",
            got=", ".join(variant.precision for variant in part.variants),
            fix="export with --precision fp32",
        )
    model = normalised(open_model(bundle.model_files(part.variant("fp32"))))
    inputs = real_inputs(bundle, part)
    stats: dict[ir.Value, TensorStats] = {}
    for value, array in walk_values(model, inputs) if inputs else ():
        if array.dtype.kind == "f":
            measured = stats.setdefault(value, TensorStats())
            measured.add(array)
            _add_saturation(measured, value.producer(), array)
    not_run = [] if inputs else ["tensors: the bundle holds no golden records of the part"]
    plan, why = _plan(model, part.name, stats)
    if why:
        not_run.append(f"what to keep in float32: {why}")
    findings = [*_Findings(model, part.name, plan.halved).of(stats), *_weight_findings(model, part.name)]
    tensors = {str(value.name): measured for value, measured in stats.items()}
    samples = sum(map(row_count, inputs))
    return PartRanges(part.name, samples, tensors, tuple(findings), plan.wide, plan.keep, tuple(not_run))


def _add_saturation(stats: TensorStats, node: ir.Node | None, array: Any) -> None:
    if node is None or node.domain not in ("", "ai.onnx"):
        return
    if node.op_type == "Softmax":
        axis = node.attributes.get("axis")
        stats.add_softmax(array, -1 if axis is None else axis.as_int())
    elif node.op_type == "Sigmoid":
        stats.add_sigmoid(array)


@dataclass(frozen=True)
class _Plan:
    """What half precision makes of a part; halved: names of what float16 would hold, None where that is unknown."""

    halved: Collection[str] | None
    wide: Mapping[str, float]
    keep: tuple[KeptOperator, ...]


def _plan(model: ir.Model, part: str, stats: Mapping[ir.Value, TensorStats]) -> tuple[_Plan, str]:
    """The plan of the fp16 conversion with what was measured, and why there is none."""
    try:
        work, base = planned_copy(model)
        halved = {str(value.name) for value in (*halved_values(work.graph, base), *work.graph.inputs)}
        wide = {
            str(value.name): measured.peak
            for value, measured in stats.items()
            if value.name in halved and measured.peak > MOST
        }
        work_wide, planned = planned_copy(model, wide)
    except InputError as error:
        return _Plan(None, {}, ()), error.what
    before = {_made(node) for node in base.float32_nodes}
    kept = [node for node in work_wide.graph if node in planned.float32_nodes and _made(node) not in before]
    paths = {_made(node): path for node, path in module_paths(model.graph).items()}
    entries = (_kept(node, joined(part, paths.get(_made(node), "")), wide) for node in kept)
    return _Plan(halved, wide, tuple(entries)), ""


def _made(node: ir.Node) -> str:
    """What tells a node in copies of its graph."""
    return str(node.outputs[0].name)


def _kept(node: ir.Node, where: str, wide: Mapping[str, float]) -> KeptOperator:
    for verb, values in (("makes", node.outputs), ("reads", node.inputs)):
        for value in values:
            if value is not None and value.name in wide:
                text = f"{verb} {value.name}, which reaches {wide[str(value.name)]:.3g}"
                return KeptOperator(where, node.op_type, _made(node), text)
    return KeptOperator(where, node.op_type, _made(node), "moves values between operators that stay in float32")


class _Findings:
    """What of a part's tensors is worth telling."""

    def __init__(self, model: ir.Model, part: str, halved: Collection[str] | None) -> None:
        self._part, self._halved = part, halved
        self._paths = module_paths(model.graph)

    def of(self, stats: Mapping[ir.Value, TensorStats]) -> Iterator[Finding]:
        for value, measured in stats.items():
            node = value.producer()
            # What only moves holds nothing that its source does not.
            if node is not None and node.op_type in MOVES:
                continue
            path = "" if node is None else self._paths.get(node, "")
            operator = "input" if node is None else node.op_type
            for kind, what, share in self._told(value, measured):
                yield Finding(kind, joined(self._part, path), operator, str(value.name), what, share, measured.peak)

    def _told(self, value: ir.Value, stats: TensorStats) -> Iterator[tuple[Kind, str, float]]:
        is_halved = self._halved is None or value.name in self._halved
        lost = stats.nans + stats.infinities
        if lost:
            text = f"has {stats.nans} NaN and {stats.infinities} infinite values"
            yield "non-finite", text, stats.share(lost)
        elif stats.minus_infinities:
            text = f"holds -inf in {stats.share(stats.minus_infinities):.1%} of its values, as masks do"
            yield "mask", text, stats.share(stats.minus_infinities)
        yield from _range_findings(stats, is_halved)
        # Positions and masks are counts, which the rules keep: of those a constant says nothing.
        if is_halved:
            yield from _content_findings(stats)
        if stats.saturable and stats.saturated / stats.saturable > _LEAST_SATURATED:
            share = stats.saturated / stats.saturable
            yield "saturated", f"is 0 or 1 to float16 in {share:.1%} of its rows", share


def _range_findings(stats: TensorStats, is_halved: bool) -> Iterator[tuple[Kind, str, float]]:
    if stats.beyond:
        share = stats.share(stats.beyond)
        text = f"reaches {stats.peak:.3g}; {share:.2%} of its values are beyond {LARGEST_FLOAT16:.0f}"
        yield ("overflow", text, share) if is_halved else ("kept", f"{text}; it stays in float32", share)
    elif stats.peak > MOST and is_halved:
        yield "near-overflow", f"reaches {stats.peak:.3g}, near the end of float16's range ({LARGEST_FLOAT16:.0f})", 0.0
    if not is_halved:
        return
    if (share := stats.share(stats.flushed)) >= _LEAST_FLUSHED:
        yield "flushed", f"becomes zero in float16 in {share:.1%} of its values", share
    if (share := stats.share(stats.denormal)) >= _LEAST_DENORMAL:
        yield "denormal", f"is zero or a denormal in float16 in {share:.1%} of its values", share


def _content_findings(stats: TensorStats) -> Iterator[tuple[Kind, str, float]]:
    if stats.is_constant:
        where = f"in all {stats.samples} samples"
        if stats.peak == 0:
            yield "zero", f"is zero everywhere {where}", 1.0
        else:
            yield "constant", f"is {stats.smallest:.6g} everywhere {where}", 1.0
    elif stats.dead and stats.alive is not None:
        share = stats.dead / stats.alive.size
        yield "dead-channels", f"{stats.dead} of {stats.alive.size} channels are zero in all samples", share


def _weight_findings(model: ir.Model, part: str) -> Iterator[Finding]:
    """Weights beyond float16, and those that are zero or become it; lone numbers are the conversion's own care."""
    paths = module_paths(model.graph)
    for value in model.graph.initializers.values():
        tensor = constant_of(value)
        if tensor is None or tensor.size <= 1 or tensor.dtype != ir.DataType.FLOAT:
            continue
        stats = TensorStats()
        flat = np.asarray(tensor.numpy()).reshape(-1)
        for start in range(0, flat.size, _BLOCK_VALUES):
            stats.add(flat[start : start + _BLOCK_VALUES])
        reader = next((use.node for use in value.uses() if use.node in paths), None)
        where = joined(part, "" if reader is None else paths[reader])
        name = parameter_name(str(value.name))
        for kind, what, share in _range_findings(stats, is_halved=True):
            yield Finding(kind, where, "weight", name or str(value.name), what, share, stats.peak)
        # Exporters add biases of zeros; a parameter of the model that is zero was not trained, or not loaded.
        if name and stats.is_constant and stats.peak == 0:
            yield Finding("zero", where, "weight", name, "is zero everywhere", 1.0, 0.0)
        if stats.nans or stats.infinities:
            what = f"has {stats.nans} NaN and {stats.infinities} infinite values"
            share = stats.share(stats.nans + stats.infinities)
            yield Finding("non-finite", where, "weight", name or str(value.name), what, share, stats.peak)
