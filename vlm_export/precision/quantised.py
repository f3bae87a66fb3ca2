"""A float32 graph with the weights of its products and tables in fewer bits; ONNX Runtime's quantisers do each one.

Each weight goes through its quantiser alone, in a model of one node, and comes back as nodes and initializers that take
the node's place. Memory holds one weight at a time, and quantised values lie in a scratch file until they are written.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.bundle.quantised import TRANSPOSED, QuantisedFrom
from vlm_export.errors import InputError
from vlm_export.precision.fp16_rules import MOVES
from vlm_export.precision.one_node import (
    Quantiser,
    block_quantiser,
    dynamic_quantiser,
    one_node_model,
    static_quantiser,
)
from vlm_export.precision.recipes import Recipe
from vlm_export.precision.smoothing import smooth, smoothed_by

Array = npt.NDArray[Any]
_MICROSOFT = "com.microsoft"
_LEVELS = 127
_IR_VERSION_OF_INT4 = 10
_BLOCK_VALUES = 1 << 22
# Models of one node are cycles of references, which hold their weights until Python's collector comes by. It counts
# objects and not bytes, and these are few objects of many bytes.
_MOST_GARBAGE_BYTES = 1 << 28
# Between a product and an output these change nothing that another product would have to repair.
_BEHIND_LAST = MOVES | {"Add", "Div", "Mul", "Sub"}


@dataclass(frozen=True)
class Quantised:
    """A quantised graph.

    Attributes:
        model: whose tensors lie in the scratch file, and in the files of the float32 model.
        weights: name of an initializer of the graph → which float32 weight it holds.
        kept: float32 weights of products and tables that stay, each with the reason.
        smoothed: name of an initializer of the graph that smoothing scaled → the norm's weight that tells by how much.
    """

    model: ir.Model
    weights: Mapping[str, QuantisedFrom]
    kept: Mapping[str, str]
    smoothed: Mapping[str, str]


@dataclass(frozen=True)
class Calibration:
    """What a static recipe measured on a part's inputs.

    Attributes:
        ranges: tensor of `calibrated_tensors` → its smallest and largest value, once norms are smoothed.
        largest: value of `smoothable` → largest magnitude of each channel (C,), before.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    largest: Mapping[str, Array] = field(default_factory=dict)


class Scratch:
    """A file that tensors are put into, one behind the other."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        path.write_bytes(b"")

    def put(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """The same tensor, whose values are in the file."""
        raw = tensor.tobytes()
        with self._path.open("ab") as file:
            file.write(raw)
        start, self._end = self._end, self._end + len(raw)
        shape = ir.Shape(tensor.shape.numpy())
        folder = self._path.parent
        return ir.ExternalTensor(
            self._path.name, start, len(raw), tensor.dtype, shape=shape, name=name, base_dir=str(folder)
        )


def quantise(
    model: ir.Model,
    recipe: Recipe,
    scratch: Path,
    *,
    reduce_range: bool = False,
    calibration: Calibration | None = None,
    keep: Mapping[str, str] | None = None,
    by_steps: bool = False,
) -> Quantised:
    """A copy whose weights have fewer bits, and whose inputs and outputs are the model's own.

    Args:
        model: sorted, in float32, its functions inlined.
        scratch: a file that is written, and must stay until the result is saved.
        reduce_range: weights of 7 bits, for CPUs without VNNI, whose sums of products of 8 bits overflow.
        calibration: of a static recipe.
        keep: weights of `changed_weights` that stay in float32 nevertheless, each with the reason.
        by_steps: the graph has a cache and is fed token by token, as in `step_accuracy_level` of a recipe.

    Raises:
        InputError: a weight is larger than one file of ONNX can be.
    """
    work = model.clone()
    split_gemms(work.graph)
    calibration = calibration or Calibration()
    smooth(work.graph, calibration.largest)
    kept = kept_weights(work.graph, recipe) | dict(keep or {})
    quantiser = _quantiser(recipe, reduce_range, calibration.ranges, by_steps=by_steps)
    return _Quantisation(work, recipe, Scratch(scratch), quantiser, kept).run()


class _Quantisation:
    def __init__(
        self, model: ir.Model, recipe: Recipe, scratch: Scratch, quantiser: Quantiser, kept: Mapping[str, str]
    ) -> None:
        self._model, self._graph, self._recipe, self._scratch = model, model.graph, recipe, scratch
        self._quantiser, self._kept = quantiser, kept
        self._opsets = {domain: version for domain, version in model.graph.opset_imports.items() if domain == ""}
        self._weights: dict[str, QuantisedFrom] = {}
        self._smoothed: dict[str, str] = {}
        self._values: dict[str, ir.Value] = {}
        self._garbage_bytes = 0

    def run(self) -> Quantised:
        for node in list(self._graph):
            weight = _changed_weight(node, self._recipe, self._kept)
            if weight is None:
                continue
            if node.op_type == "MatMul":
                self._replace_product(node, weight)
            elif node.op_type == "Gather":
                self._replace_table(node, weight)
            else:
                self._replace_convolution(node, weight)
        remove_unused(self._graph)
        if any(node.domain == _MICROSOFT for node in self._graph):
            self._graph.opset_imports[_MICROSOFT] = 1
        if any(node.op_type == "GatherBlockQuantized" for node in self._graph):
            # The first version of the file format that has integers of 4 bits.
            self._model.ir_version = max(self._model.ir_version or 0, _IR_VERSION_OF_INT4)
        # Norms, and weights that stay in float32.
        for name, value in self._graph.initializers.items():
            if (norm := smoothed_by(value)) is not None:
                self._smoothed[name] = norm
        return Quantised(self._model, self._weights, self._kept, self._smoothed)

    def _replace_product(self, node: ir.Node, weight: ir.Value) -> None:
        tensor = constant(weight)
        inserted = self._inserted(node, tensor, 1, self._quantiser)
        name, source, transposed = str(weight.name), *source_of(weight)
        if self._recipe.kind != "weight-only":
            zero = f"{name}_zero_point"
            row = QuantisedFrom(source, f"{name}_scale", zero, 8, "channels", axis=1, transposed=transposed)
            self._weights[f"{name}_quantized"] = row
            if (norm := smoothed_by(weight)) is not None:
                self._smoothed[f"{name}_quantized"] = norm
        else:
            bits = self._recipe.bits
            zeros = None if self._recipe.symmetric else f"{name}_zero_points"
            size = self._recipe.block_size
            row = QuantisedFrom(
                source, f"{name}_scales", zeros, bits, "product-blocks", block_size=size, transposed=transposed
            )
            self._weights[f"{name}_Q{bits}"] = row
        self._take_place(node, inserted)

    def _replace_convolution(self, node: ir.Node, weight: ir.Value) -> None:
        tensor, name = constant(weight), str(weight.name)
        inserted = self._inserted(node, tensor, 1, self._quantiser)
        row = QuantisedFrom(name, f"{name}_scale", f"{name}_zero_point", 8, "channels", axis=0)
        self._weights[f"{name}_quantized"] = row
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and f"{bias.name}_quantized" in self._graph.initializers:
            scale, zero = f"{bias.name}_quantized_scale", f"{bias.name}_quantized_zero_point"
            self._weights[f"{bias.name}_quantized"] = QuantisedFrom(str(bias.name), scale, zero, 32, "channels", axis=0)
        self._take_place(node, inserted)

    def _replace_table(self, node: ir.Node, table: ir.Value) -> None:
        tensor, name, size = constant(table), f"{table.name}.rows", self._recipe.block_size
        if self._recipe.table_bits == 4:
            assert size is not None
            renamed = ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
            inserted = self._inserted(node, renamed, 0, block_quantiser(self._recipe, 4, by_steps=False))
            zeros = None if self._recipe.symmetric else f"{name}_zero_points"
            row = QuantisedFrom(str(table.name), f"{name}_scales", zeros, 4, "table-blocks", block_size=size)
            self._weights[f"{name}_Q4"] = row
        else:
            inserted = self._looked_up_in_bytes(node, tensor, name)
            row = QuantisedFrom(str(table.name), f"{name}_scale", None, 8, "channels", axis=0)
            self._weights[f"{name}_quantized"] = row
        self._take_place(node, inserted)

    def _looked_up_in_bytes(self, node: ir.Node, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """Rows of 8 bits times the scale of each: both are looked up by the same ids."""
        if f"{name}_quantized" not in self._values:
            levels, scales = row_levels(tensor.numpy())
            self._initializer(ir.tensor(levels, name=f"{name}_quantized"))
            self._initializer(ir.tensor(scales, name=f"{name}_scale"))
        ids, shape, out = node.inputs[1], node.outputs[0].shape, str(node.outputs[0].name)
        rows = self._node("Gather", [self._values[f"{name}_quantized"], ids], {"axis": 0}, f"{out}.levels", node)
        steps = self._node("Gather", [self._values[f"{name}_scale"], ids], {"axis": 0}, f"{out}.scales", node)
        numbers = self._node("Cast", [rows], {"to": ir.DataType.FLOAT}, f"{out}.numbers", node)
        made = self._node("Mul", [numbers, steps], {}, f"{out}.dequantised", node)
        rows.type, steps.type = ir.TensorType(ir.DataType.INT8), ir.TensorType(ir.DataType.FLOAT)
        numbers.type = made.type = ir.TensorType(ir.DataType.FLOAT)
        rows.shape = numbers.shape = made.shape = shape
        return made

    def _node(
        self, operator: str, inputs: list[ir.Value | None], attributes: dict[str, object], name: str, before: ir.Node
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = name
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _inserted(
        self,
        node: ir.Node,
        weight: ir.TensorProtocol,
        position: int,
        quantiser: Quantiser,
    ) -> ir.Value:
        """Puts what the quantiser makes of the node before it; the value that has its output.

        What another node's quantisation made under the same names is taken again: the activation that several
        products read is quantised once, and so is a weight that several read.
        """
        self._collect(weight.nbytes)
        made = self._quantised_alone(node, weight, position, quantiser)
        other, weight_value = node.inputs[1 - position], node.inputs[position]
        assert other is not None
        known: dict[ir.Value, ir.Value] = {made.graph.inputs[0]: other}
        # A bias that the quantiser leaves is the graph's own.
        own = {str(value.name): value for value in node.inputs if value is not None and value is not other}
        for name, value in made.graph.initializers.items():
            if name in own and own[name] is not weight_value:
                known[value] = own[name]
                continue
            if name not in self._values and value.const_value is not None:
                self._initializer(value.const_value)
            known[value] = self._values[name]
        for inner in list(made.graph):
            names = [str(value.name) for value in inner.outputs]
            if all(name in self._values for name in names):
                known |= {value: self._values[str(value.name)] for value in inner.outputs}
                continue
            inputs = [None if value is None else known[value] for value in inner.inputs]
            before = other.producer()
            if before is not None and before.op_type == inner.op_type and list(before.inputs) == inputs:
                # A convolution reads another one's result, which is quantised and taken back already.
                known[inner.outputs[0]] = other
                continue
            copy = ir.node(
                inner.op_type,
                inputs,
                dict(inner.attributes),
                domain=inner.domain,
                num_outputs=len(inner.outputs),
                name=inner.name,
            )
            for old, new in zip(inner.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = old.name, old.type, None
                known[old] = self._values[str(old.name)] = new
            self._graph.insert_before(node, copy)
        result = known[made.graph.outputs[0]]
        del self._values[str(result.name)]
        return result

    def _collect(self, size_bytes: int) -> None:
        """Frees what earlier weights left behind where with this one, of that size, it may be much."""
        self._garbage_bytes += size_bytes
        if self._garbage_bytes > _MOST_GARBAGE_BYTES:
            gc.collect()
            self._garbage_bytes = size_bytes

    def _quantised_alone(
        self, node: ir.Node, weight: ir.TensorProtocol, position: int, quantiser: Quantiser
    ) -> ir.Model:
        """What the quantiser makes of the node in a model of its own, sorted; InputError where it fails."""
        alone = node_alone(node, weight, position)
        try:
            made = ir.from_proto(quantiser(one_node_model(alone, weight, position, self._opsets)))
        except (AssertionError, RuntimeError, ValueError) as error:
            # What onnxruntime's quantisers raise where numbers do not suit them.
            raise InputError(
                "ONNX Runtime's quantiser fails on a weight",
                where=f"tensor {weight.name}",
                expected="finite numbers of float32",
                got=f"{type(error).__name__}: {error}"[:200],
                fix="leave this part out with --part",
            ) from error
        made.graph.sort()
        if made.graph.initializers.keys() == {str(weight.name)}:
            raise InputError(
                "ONNX Runtime's quantiser leaves a weight as it is",
                where=f"tensor {weight.name}",
                expected="a matrix of float32",
                got=f"{weight.dtype} {list(weight.shape.numpy())}",
                fix="leave this part out with --part",
            )
        return made

    def _initializer(self, tensor: ir.TensorProtocol) -> None:
        name = str(tensor.name)
        if name in self._graph.initializers:
            raise InputError(
                "the graph has a tensor of a name that quantisation gives", where=name, fix="rename it: graph rename"
            )
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
        value.const_value = self._scratch.put(tensor, name)
        self._graph.register_initializer(value)
        self._values[name] = value

    def _take_place(self, node: ir.Node, made: ir.Value) -> None:
        old = node.outputs[0]
        name = str(old.name)
        made.shape, made.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        made.name = name


def _quantiser(
    recipe: Recipe, reduce_range: bool, ranges: Mapping[str, tuple[float, float]], *, by_steps: bool
) -> Quantiser:
    if recipe.kind == "dynamic":
        return dynamic_quantiser(reduce_range=reduce_range)
    if recipe.kind == "static":
        return static_quantiser(ranges, reduce_range=reduce_range)
    return block_quantiser(recipe, recipe.bits, by_steps=by_steps)


def calibrated_tensors(model: ir.Model, recipe: Recipe) -> list[str]:
    """Names of the tensors whose ranges a static recipe needs, in the graph's order, of a copy that it will make."""
    work = model.clone()
    split_gemms(work.graph)
    kept, found = kept_weights(work.graph, recipe), dict[str, None]()
    for node in work.graph:
        if _changed_weight(node, recipe, kept) is None or node.op_type == "Gather":
            continue
        found[str(node.inputs[0].name)] = None  # type: ignore[union-attr]
        if node.op_type == "Conv":
            found[str(node.outputs[0].name)] = None
    return list(found)


def changed_weights(model: ir.Model, recipe: Recipe) -> dict[str, int]:
    """Weights that a recipe changes, in the graph's order → how many nodes read each, of a copy that it will make."""
    work = model.clone()
    split_gemms(work.graph)
    kept = kept_weights(work.graph, recipe)
    weights = [weight for node in work.graph if (weight := _changed_weight(node, recipe, kept)) is not None]
    return dict(Counter(str(weight.name) for weight in weights))


def _changed_weight(node: ir.Node, recipe: Recipe, kept: Mapping[str, str]) -> ir.Value | None:
    """The weight of a product, a table or a convolution that does not stay as it is."""
    weight = product_weight(node) or table_weight(node)
    if weight is None and recipe.convolutions:
        weight = convolution_weight(node)
    return None if weight is None or str(weight.name) in kept else weight


def convolution_weight(node: ir.Node) -> ir.Value | None:
    """The float32 weight of a Conv, None where it is computed, or where the Conv reads an input of the graph: it sees
    pixels, whose steps of 8 bits are those of the image already, and stays as it is."""
    if node.op_type != "Conv" or node.domain or _reads_input(node):
        return None
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not _is_float_constant(bias):
        return None
    return weight if weight is not None and _is_float_constant(weight) else None


def _reads_input(node: ir.Node) -> bool:
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _BEHIND_LAST:
        computed = [v for v in maker.inputs if v is not None and not v.is_initializer()]
        value = computed[0] if computed else None
    return value is None or value.is_graph_input()


def _is_float_constant(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and value.is_initializer() and tensor.dtype == ir.DataType.FLOAT


def node_alone(node: ir.Node, weight: ir.TensorProtocol, position: int) -> ir.Node:
    """A copy of the node that reads the weight under the tensor's name; it belongs to no graph."""
    values = [
        None
        if value is None
        else ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
        for value in node.inputs
    ]
    values[position] = ir.Value(name=weight.name)
    copy = ir.node(node.op_type, values, dict(node.attributes), name=node.name)
    copy.outputs[0].name, copy.outputs[0].shape = node.outputs[0].name, node.outputs[0].shape
    return copy


def kept_weights(graph: ir.Graph, recipe: Recipe) -> dict[str, str]:
    """Weights of products and tables that stay in float32, each with the reason."""
    kept: dict[str, str] = {}
    products = [weight for node in graph if (weight := product_weight(node)) is not None]
    total = sum(constant(weight).size for weight in products)
    last = set(_last_products(graph))
    # Together: a decoder hands out the keys and values of each of its layers.
    few = sum(constant(weight).size for weight in last) <= recipe.kept_share * total
    for weight in products:
        size = constant(weight).size
        if size < recipe.least_values:
            kept[str(weight.name)] = f"it has {size} values"
        elif weight in last and few:
            kept[str(weight.name)] = "the last product before an output"
    for node in graph:
        table = table_weight(node)
        if table is None:
            continue
        tensor = constant(table)
        if recipe.table_bits is None:
            kept[str(table.name)] = "a table"
        elif tensor.size < recipe.least_values:
            kept[str(table.name)] = f"it has {tensor.size} values"
        elif recipe.table_bits == 4 and tensor.shape.numpy()[1] % (recipe.block_size or 1):
            kept[str(table.name)] = "its rows are no whole number of blocks"
        elif _counts(tensor):
            kept[str(table.name)] = "it holds whole numbers, which count something and are no weights"
    return kept


def _counts(tensor: ir.TensorProtocol) -> bool:
    """Whether a table holds whole numbers alone, such as the borders that positions are told by: a step of rounding
    would move a border, and choose other rows."""
    table = tensor.numpy()
    step = max(1, _BLOCK_VALUES // table.shape[1])
    blocks = (table[start : start + step] for start in range(0, len(table), step))
    return all(np.array_equal(block, np.rint(block)) for block in blocks)


def _last_products(graph: ir.Graph) -> Iterator[ir.Value]:
    """Weights of products behind which an output has no other product."""
    for output in graph.outputs:
        value: ir.Value | None = output
        while value is not None and (node := value.producer()) is not None:
            weight = product_weight(node)
            if weight is not None:
                yield weight
                break
            if node.op_type not in _BEHIND_LAST or node.domain:
                break
            computed = [v for v in node.inputs if v is not None and v.producer() is not None]
            value = computed[0] if computed else None


def product_weight(node: ir.Node) -> ir.Value | None:
    """The float32 matrix that a MatMul multiplies with, None where it is computed or no matrix."""
    if node.op_type != "MatMul" or node.domain:
        return None
    return _float_matrix(node.inputs[1])


def table_weight(node: ir.Node) -> ir.Value | None:
    """The float32 table (rows, columns) that a Gather looks rows up in, None where it is computed or no table."""
    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return None
    ids = node.inputs[1]
    if ids is None or ids.const_value is not None or ids.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return _float_matrix(node.inputs[0])


def _float_matrix(value: ir.Value | None) -> ir.Value | None:
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    tensor = value.const_value
    return value if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 else None


def constant(value: ir.Value) -> ir.TensorProtocol:
    """The values of an initializer."""
    assert value.const_value is not None
    return value.const_value


_TRANSPOSED_FROM = "vlm_export.transposed_from"


def source_of(weight: ir.Value) -> tuple[str, bool]:
    """Name of the initializer of the float32 graph, and whether this one is its transpose."""
    source = weight.meta.get(_TRANSPOSED_FROM)
    return (str(weight.name), False) if source is None else (str(source), True)


def split_gemms(graph: ir.Graph) -> None:
    """Makes a product and a sum of each Gemm with a constant matrix, which the quantisers know no other form of."""
    for node in list(graph):
        if node.op_type != "Gemm" or node.domain or node.attributes.get_int("transA", 0) != 0:
            continue
        factors = (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0))
        weight = _float_matrix(node.inputs[1])
        if weight is None or factors != (1.0, 1.0):
            continue
        if node.attributes.get_int("transB", 0):
            weight = _transposed(graph, weight)
        old, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        product = ir.node("MatMul", [node.inputs[0], weight], name=node.name)
        made = product.outputs[0]
        graph.insert_before(node, product)
        if bias is not None:
            made.name, made.type, made.shape = f"{old.name}.product", old.type, old.shape
            total = ir.node("Add", [made, bias], name=f"{node.name}.bias")
            graph.insert_before(node, total)
            made = total.outputs[0]
        name, made.type, made.shape = str(old.name), old.type, old.shape
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        made.name = name
    remove_unused(graph)


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    name, tensor = f"{weight.name}{TRANSPOSED}", constant(weight)
    if name in graph.initializers:
        return graph.initializers[name]
    rows, columns = tensor.shape.numpy()
    value = ir.Value(name=name, shape=ir.Shape((columns, rows)), type=ir.TensorType(tensor.dtype))
    value.const_value = ir.LazyTensor(
        partial(_transpose, tensor, name), dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=name
    )
    value.meta[_TRANSPOSED_FROM] = weight.name
    graph.register_initializer(value)
    return value


def _transpose(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)


def remove_unused(graph: ir.Graph) -> None:
    """Takes initializers out that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


def row_levels(table: Array) -> tuple[Array, Array]:
    """int8 (R, C) from -127 to 127, and the scale of each row, float32 (R, 1); a few rows at a time."""
    levels = np.empty(table.shape, np.int8)
    scales = np.empty((len(table), 1), np.float32)
    step = max(1, _BLOCK_VALUES // table.shape[1])
    for start in range(0, len(table), step):
        rows = table[start : start + step]
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest / np.float32(_LEVELS), np.float32(1))
        scales[start : start + step] = scale
        levels[start : start + step] = np.rint(rows / scale).astype(np.int8)
    return levels, scales
