"""Items of the checklist that are read from the graphs and the manifest, without running anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.bundle.manifest import PartRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.graph.core.names import captured_or_read
from vlm_export.graph.core.onnxruntime_session import run_in_onnxruntime
from vlm_export.graph.core.operators import RANDOM
from vlm_export.graph.passes.constant_fold import fold_all_constants, fold_constants
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.lab.checklist import Seen
from vlm_export.lab.differences import named
from vlm_export.lab.module_paths import constant_of
from vlm_export.lab.regions import varying_values
from vlm_export.proof.declared import version_difference

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# How large their results are depends on values.
_SIZED_BY_DATA = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_LOSSES = frozenset({"NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"})
_TRAINING_DOMAIN = "ai.onnx.preview.training"
_WITHOUT_WORK = frozenset({"Cast", "CastLike", "Dropout", "Identity"})


@dataclass(frozen=True)
class OpenedVariant:
    """A variant with its graph; label: part and precision."""

    part: PartRecord
    record: VariantRecord
    model: ir.Model

    @property
    def label(self) -> str:
        return f"{self.part.name} {self.record.precision}"


def check_eval_mode(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """No Dropout drops, and no norm takes its statistics from the batch."""
    count = 0
    for variant in variants:
        for node in variant.model.graph.all_nodes():
            if node.op_type not in ("Dropout", "BatchNormalization") or node.domain not in ("", "ai.onnx"):
                continue
            count += 1
            if node.op_type == "Dropout" and _drops(node):
                seen.failures.append(f"{variant.label}: Dropout {node.name!r} may be in training mode")
            if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", False):
                seen.failures.append(f"{variant.label}: BatchNormalization {node.name!r} is in training mode")
    seen.evidence.append(f"{count} Dropout and BatchNormalization nodes looked at")


def _drops(node: ir.Node) -> bool:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_of(mode)
    return mode is not None and (tensor is None or bool(tensor.numpy().item()))


def check_training_operators(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """Nothing that only training needs, and nothing that draws random numbers."""
    for variant in variants:
        for node in variant.model.graph.all_nodes():
            is_drawn = node.op_type in RANDOM - {"Dropout"} and node.domain in ("", "ai.onnx")
            is_training = node.op_type in _LOSSES or node.op_type.endswith("Grad")
            if is_drawn or is_training or node.domain.startswith(_TRAINING_DOMAIN):
                seen.failures.append(f"{variant.label}: {node.op_type} {node.name!r}")
    seen.evidence.append(f"operators of {len(variants)} graphs")


def check_control_flow(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """No branch, loop or size depends on what is fed."""
    for variant in variants:
        varying = varying_values(variant.model.graph)
        for node in variant.model.graph:
            depends = any(value in varying for value in captured_or_read(node))
            if depends and node.op_type in _CONTROL_FLOW | _SIZED_BY_DATA:
                seen.failures.append(f"{variant.label}: {node.op_type} {node.name!r} depends on an input")
    seen.evidence.append(f"looked for {', '.join(sorted(_CONTROL_FLOW | _SIZED_BY_DATA))}")


def check_names(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """Nodes have names of their own, and inputs and outputs those of the signature."""
    count = 0
    for variant in variants:
        graph, signature = variant.model.graph, variant.part.signature
        counts = Counter(str(node.name or "") for node in graph)
        count += len(counts)
        if nameless := counts.pop("", 0):
            seen.failures.append(f"{variant.label}: {nameless} nodes have no name")
        if twice := [name for name, number in counts.items() if number > 1]:
            seen.failures.append(f"{variant.label}: several nodes have one name: {named(twice)}")
        for kind, values, expected in (
            ("inputs", graph.inputs, signature.input_names),
            ("outputs", graph.outputs, signature.output_names),
        ):
            got = tuple(str(value.name) for value in values)
            if got != expected:
                seen.failures.append(
                    f"{variant.label}: the {kind} are {', '.join(got)}, the signature names {', '.join(expected)}"
                )
    seen.evidence.append(f"{count} nodes with names of their own")


def check_simplified(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """Nothing is left that returns its input, and no product, convolution or resize of constants."""
    moves: Counter[str] = Counter()
    small = 0
    for variant in variants:
        copy = variant.model.clone()
        removed = Counter(remove_noops(copy))
        without_work = {name: number for name, number in removed.items() if name in _WITHOUT_WORK}
        moves += removed - Counter(without_work)
        if without_work:
            text = ", ".join(f"{number} {name}" for name, number in without_work.items())
            seen.failures.append(f"{variant.label}: nodes that return their input: {text}")
        if folded := fold_constants(copy, run_in_onnxruntime):
            seen.failures.append(f"{variant.label}: products of constants can be folded: {folded.initializers}")
        small += fold_all_constants(copy).initializers
    seen.evidence.append("looked for nodes that return their input, and for products of constants")
    left = [f"{number} {name} that does nothing" for name, number in moves.items()]
    left += [f"{small} small results of constants"] if small else []
    seen.evidence += [f"could go as well: {text}" for text in left]


def check_interfaces(variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """Types and axes of the graphs are those of the signatures."""
    for variant in variants:
        signature = variant.part.signature
        graph = variant.model.graph
        ends = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
        for tensor in (*signature.inputs, *signature.outputs):
            value = ends.get(tensor.name)
            if value is None or value.shape is None:
                continue
            for position, (entry, size) in enumerate(zip(tensor.shape, value.shape, strict=False)):
                where = f"{variant.label}: {tensor.name}, axis {position}"
                if isinstance(entry, str) and isinstance(size, int) and not _is_single(variant.part, entry):
                    seen.failures.append(f"{where}: {entry!r} is fixed at {size} in the graph")
                if isinstance(entry, int) and entry != size:
                    seen.failures.append(f"{where}: {entry} in the signature, {size} in the graph")
    for part in dict.fromkeys(variant.part.name for variant in variants):
        axes = next(variant.part.signature.axes for variant in variants if variant.part.name == part)
        seen.evidence.append(f"{part}: {', '.join(axis.name for axis in axes) or 'none'}")


def _is_single(part: PartRecord, name: str) -> bool:
    axis = part.signature.axis(name)
    return axis.minimum == axis.maximum


def check_gates(bundle: OpenBundle, variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """The export's own proof is on record, and passed."""
    for variant in variants:
        report = variant.record.verification
        if report is None:
            seen.failures.append(f"{variant.label}: the manifest records no comparison with the original")
        elif report.get("passed") is not True:
            seen.failures.append(f"{variant.label}: the comparison with the original failed")
        else:
            points = report.get("points")
            count = sum(points.values()) if isinstance(points, Mapping) else 0
            seen.evidence.append(f"{variant.label}: {count} points")
    contract = bundle.manifest.export.contract
    if contract is None:
        seen.failures.append("the manifest records no proof of the contract, from images and texts to vectors")
    elif contract.get("passed") is not True:
        seen.failures.append("the contract, from images and texts to vectors, failed")
    else:
        seen.evidence.append(f"contract: {len(contract.get('checks', ()))} checks")


def check_oldest_runtime(bundle: OpenBundle, variants: Sequence[OpenedVariant], seen: Seen) -> None:
    """What the manifest says of each graph's opset and oldest engine is what the graph needs."""
    for variant in variants:
        if difference := version_difference(bundle, variant.record):
            seen.failures.append(f"{variant.label}: {difference}")
        seen.evidence.append(f"{variant.label}: {variant.record.oldest_onnxruntime}")
