"""Two graphs compared by what they are: interface, opset, structure and weights, whatever nodes are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.look.show import type_text
from vlm_export.lab.alignment import Alignment, align
from vlm_export.lab.canonical import computed_digests, contents, counted, kinds, operator_text
from vlm_export.lab.differences import Difference, named
from vlm_export.lab.module_paths import constant_of, joined, mapped_for_a_while, module_paths, parameter_name

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BLOCK_VALUES = 1 << 22
_SHOWN_VALUES = 8


def graph_differences(left: ir.Model, right: ir.Model, where: str = "", tolerance: float = 0.0) -> Iterator[Difference]:
    """What differs between two graphs.

    Args:
        where: what stands before the names of modules, such as the part.
        tolerance: weights are equal whose values differ by at most this times the tensor's largest absolute value.
    """
    left, right = normalised(left), normalised(right)
    alignment = align(left, right)
    found = [
        *model_differences(left, right, where),
        *alignment_differences(left, right, alignment, where, tolerance),
    ]
    # What was paired explains what differs; that nothing does is told by what the outputs are computed of.
    yield from found or _computed(left, right, where, tolerance)


def model_differences(left: ir.Model, right: ir.Model, where: str) -> Iterator[Difference]:
    """What differs between two models as wholes: interface and versions."""
    yield from _interface(left, right, where)
    yield from _versions(left, right, where)


def alignment_differences(
    left: ir.Model, right: ir.Model, alignment: Alignment, where: str, tolerance: float = 0.0
) -> Iterator[Difference]:
    """What differs between the nodes of an alignment, which may be of a part of the graphs."""
    paths = PairedPaths.of(left, right, alignment, where)
    yield from _structure(alignment, paths, tolerance)
    yield from _weights(alignment, paths, where, tolerance)


def _computed(left: ir.Model, right: ir.Model, where: str, tolerance: float) -> Iterator[Difference]:
    before, after = (computed_digests(model, kinds if tolerance else contents) for model in (left, right))
    for name, text in before.items():
        if text != after[name]:
            yield Difference("structure", where, f"how the output {name!r} is computed", text, after[name])


def normalised(model: ir.Model) -> ir.Model:
    """The model, or a copy without functions, in which a weight that is an input, too, is a weight alone."""
    if not model.functions and not any(value.is_initializer() for value in model.graph.inputs):
        return model
    copy = ir.from_proto(ir.to_proto(model))
    InlinePass()(copy)
    RemoveInitializersFromInputsPass()(copy)
    return copy


@dataclass(frozen=True)
class PairedPaths:
    """Module paths of both graphs, in the names of the left one."""

    left: Mapping[ir.Node, str]
    right: Mapping[ir.Node, str]

    @classmethod
    def of(cls, left: ir.Model, right: ir.Model, alignment: Alignment, where: str) -> PairedPaths:
        """Nodes that only the right has are named by their neighbours, whose names are the left's."""
        names = {other: str(value.name) for value, other, _ in alignment.constants()}
        own = {node: joined(where, path) for node, path in module_paths(left.graph).items()}
        other = {node: joined(where, path) for node, path in module_paths(right.graph, names).items()}
        return cls(own, other | {second: own[first] for first, second in alignment.nodes.items()})


def _interface(left: ir.Model, right: ir.Model, where: str) -> Iterator[Difference]:
    ends = (("input", left.graph.inputs, right.graph.inputs), ("output", left.graph.outputs, right.graph.outputs))
    for kind, before, after in ends:
        mine, theirs = _types(before), _types(after)
        for name in dict.fromkeys([*mine, *theirs]):
            if mine.get(name) != theirs.get(name):
                what = f"{kind} {name!r}"
                yield Difference("interface", where, what, mine.get(name, "none"), theirs.get(name, "none"))
        if list(mine) != list(theirs) and set(mine) == set(theirs):
            yield Difference("interface", where, f"order of {kind}s", ", ".join(mine), ", ".join(theirs))


def _types(values: Sequence[ir.Value]) -> dict[str, str]:
    return {str(value.name): type_text(value) for value in values}


def _versions(left: ir.Model, right: ir.Model, where: str) -> Iterator[Difference]:
    before, after = opset_text(left), opset_text(right)
    if before != after:
        yield Difference("opset", where, "opset", before, after)
    if left.ir_version != right.ir_version:
        yield Difference("opset", where, "IR version", str(left.ir_version), str(right.ir_version))


def opset_text(model: ir.Model) -> str:
    """Domains with versions, of those that nodes use: exporters list others, too."""
    used = {"" if node.domain == "ai.onnx" else node.domain for node in model.graph.all_nodes()}
    declared = {"" if name == "ai.onnx" else name: version for name, version in model.opset_imports.items()}
    return ", ".join(f"{name or 'ai.onnx'} {declared[name]}" for name in sorted(used) if name in declared)


def _structure(alignment: Alignment, paths: PairedPaths, tolerance: float) -> Iterator[Difference]:
    """Nodes that one side lacks, by module; equal changes of several layers are one difference."""
    only: dict[str, tuple[list[str], list[str]]] = {}
    for side, nodes, own in ((0, alignment.left_only, paths.left), (1, alignment.right_only, paths.right)):
        for node in nodes:
            only.setdefault(own.get(node, ""), ([], []))[side].append(operator_text(node))
    found: dict[tuple[str, str, str], list[str]] = {}
    for path, (before, after) in only.items():
        gone, new = Counter(before), Counter(after)
        what = "operators" if gone != new else "connections of operators"
        found.setdefault((what, counted(before), counted(after)), []).append(path)
    for change in alignment.changed:
        key = (f"{operator_text(change.left)}'s {change.name}", change.before, change.after)
        found.setdefault(key, []).append(paths.left.get(change.left, ""))
    for left, right, readers in alignment.constants():
        if is_parameter(left) or is_parameter(right):
            continue
        if _apart(left, right, tolerance):
            places = [paths.left[node] for node in readers if node in paths.left]
            found.setdefault(("a constant", _small_text(left), _small_text(right)), []).extend(places)
    for node, first, second in alignment.strays:
        sides = (_source_text(first, paths.left), _source_text(second, paths.right))
        found.setdefault((f"what {operator_text(node)} reads", *sides), []).append(paths.left.get(node, ""))
    for first, second in alignment.ends:
        if not {first.producer(), second.producer()} & {*alignment.left_only, *alignment.right_only}:
            sides = (_source_text(first, paths.left), _source_text(second, paths.right))
            producer = first.producer()
            place = "" if producer is None else paths.left.get(producer, "")
            found.setdefault((f"the output {first.name!r}", *sides), []).append(place)
    for (what, mine, theirs), places in found.items():
        yield Difference("structure", _places(places), what, mine, theirs)


def _source_text(value: ir.Value, paths: Mapping[ir.Node, str]) -> str:
    """What makes a tensor: an operator of a module, an input or a constant."""
    node = value.producer()
    if node is None or constant_of(value) is not None:
        return f"input {value.name}" if constant_of(value) is None else "a constant"
    return f"{operator_text(node)} of {paths.get(node) or 'no module'}"


def _places(paths: Sequence[str]) -> str:
    """`text.blocks.*.mlp (12 places)`, where equal things happen in many layers."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_LAYER.sub("*", path), []).append(path)
    texts = [form if len(set(own)) > 1 else own[0] for form, own in groups.items()]
    count = f" ({len(paths)} places)" if len(paths) > 1 else ""
    return named(texts) + count


def is_parameter(value: ir.Value) -> bool:
    """Whether a constant is a weight of the model, and no number of the code."""
    tensor = constant_of(value)
    if tensor is None or tensor.size <= 1:
        return False
    return tensor.size > _SHOWN_VALUES or bool(parameter_name(str(value.name)))


def _small_text(value: ir.Value) -> str:
    tensor = constant_of(value)
    assert tensor is not None
    array = np.asarray(tensor.numpy())
    # The shortest digits that tell the number from its neighbours.
    text = ", ".join(map(str, array.reshape(-1)))
    return text if array.ndim == 0 else f"[{text}]"


def _weights(alignment: Alignment, paths: PairedPaths, where: str, tolerance: float) -> Iterator[Difference]:
    """Weights in one place with other values, the most changed first; then other dtypes, which concern many."""
    changed: list[tuple[float, Difference]] = []
    dtypes: dict[tuple[str, str], list[str]] = {}
    for left, right, readers in alignment.constants():
        if not (is_parameter(left) or is_parameter(right)):
            continue
        before, after = _tensors(left, right)
        name = parameter_name(str(left.name))
        # A constant of the code is told by who reads it.
        place = joined(where, name) if name else named(path for node in readers if (path := paths.left.get(node)))
        what = "" if name else f"a constant of {before.size} values: "
        if before.dtype != after.dtype:
            dtypes.setdefault((before.dtype.name.lower(), after.dtype.name.lower()), []).append(place)
        difference = _apart(left, right, tolerance)
        if isinstance(difference, WeightDifference):
            changed.append((difference.relative, Difference("weights", place, f"{what}{difference}")))
        elif difference is not None:
            changed.append((float("inf"), Difference("weights", place, f"{what}shape", *difference)))
    yield from (entry for _, entry in sorted(changed, key=lambda item: -item[0]))
    for (before_type, after_type), names in dtypes.items():
        yield Difference("weights", _places(names), "dtype", before_type, after_type)


def _tensors(left: ir.Value, right: ir.Value) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    before, after = constant_of(left), constant_of(right)
    assert before is not None
    assert after is not None
    return before, after


def _apart(left: ir.Value, right: ir.Value, tolerance: float) -> WeightDifference | tuple[str, str] | None:
    """How two constants differ: by their values, or by their shapes; None where they do not."""
    before, after = _tensors(left, right)
    if before.shape != after.shape:
        return str(list(before.shape.numpy())), str(list(after.shape.numpy()))
    with mapped_for_a_while(before, after):
        found = weight_difference(before, after)
    return None if found.is_within(max(tolerance, _rounding(before, after))) else found


def _rounding(left: ir.TensorProtocol, right: ir.TensorProtocol) -> float:
    """How far values of two dtypes may be apart by rounding alone, as a share of the largest."""
    halves = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8}
    return 0.0 if left.dtype == right.dtype else max(halves.get(left.dtype, 0.0), halves.get(right.dtype, 0.0))


@dataclass(frozen=True)
class WeightDifference:
    """How far two tensors of one shape are apart.

    Attributes:
        changed: number of values that differ, of `size`.
        max_abs: largest difference; infinite where only one side is finite.
        largest: largest absolute value of the first.
        row: index on axis 0 that holds all that changed, None where several do.
    """

    changed: int
    size: int
    max_abs: float
    largest: float
    row: int | None = None

    @property
    def relative(self) -> float:
        """The largest difference over the largest value."""
        return self.max_abs / self.largest if self.largest else float(self.max_abs > 0)

    def is_within(self, tolerance: float) -> bool:
        """Whether the two are equal, or differ by at most this times the largest value."""
        return not self.changed or (tolerance > 0 and self.max_abs <= tolerance * self.largest)

    def __str__(self) -> str:
        place = "" if self.row is None else f", all in row {self.row}"
        return (
            f"{self.changed} of {self.size} values differ{place}, by at most {self.max_abs:.3g} "
            f"({self.relative:.2g} of the largest value)"
        )


def weight_difference(left: ir.TensorProtocol, right: ir.TensorProtocol) -> WeightDifference:
    """Compares two tensors of one shape in blocks, so that memory stays flat."""
    before, after = _numbers(left, right)
    changed, max_abs, largest, rows = 0, 0.0, 0.0, set[int]()
    height = len(before) if before.ndim > 1 else 0
    width = max(1, before.size // max(1, height))
    flat, other = before.reshape(-1), after.reshape(-1)
    for start in range(0, flat.size, _BLOCK_VALUES):
        blocks = [array[start : start + _BLOCK_VALUES] for array in (flat, other)]
        # float64 does not hold all integers of 64 bits.
        first, second = (block.astype(np.longdouble if block.dtype.kind in "iu" else np.float64) for block in blocks)
        differs = ~((blocks[0] == blocks[1]) | (np.isnan(first) & np.isnan(second)))
        with np.errstate(invalid="ignore"):
            largest = max(largest, float(np.abs(first[np.isfinite(first)]).max(initial=0.0)))
        if differs.any():
            places = np.flatnonzero(differs)
            changed += len(places)
            with np.errstate(invalid="ignore"):
                gaps = np.abs(first[places] - second[places])
            max_abs = max(max_abs, float(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf).max()))
            if height and len(rows) < 2:
                rows |= set(np.unique((places + start) // width)[:2].tolist())
    only = next(iter(rows)) if len(rows) == 1 and height > 1 else None
    return WeightDifference(changed, int(flat.size), max_abs, largest, only)


def _numbers(left: ir.TensorProtocol, right: ir.TensorProtocol) -> tuple[Array, Array]:
    """Arrays of real numbers that are apart as the tensors are."""
    before, after = np.asarray(left.numpy()), np.asarray(right.numpy())
    if ir.DataType.STRING in (left.dtype, right.dtype):
        return np.zeros(before.shape), (before != after).astype(np.float64)
    return _real(before), _real(after)


def _real(array: Array) -> Array:
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], axis=-1)
    # bfloat16 and float8 are dtypes that numpy cannot compare.
    return array if array.dtype.kind in "biuf" else array.astype(np.float32)
