"""Random models that run: fan-out, subgraphs that capture outer tensors, optional inputs, functions, several dtypes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

Array = npt.NDArray[Any]
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_WIDTHS = (4, 6)


@dataclass
class RandomModel:
    """A model and inputs for it, for two sizes of its axis `batch`."""

    model: ir.Model
    feeds: list[dict[str, Array]]


@dataclass
class _Scope:
    """A graph under construction and what its nodes can read, outer tensors included."""

    depth: int
    values: list[ir.Value]
    nodes: list[ir.Node] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    count: int = 0


def random_model(seed: int, size: int = 10) -> RandomModel:
    """The model of a seed: about `size` nodes in the main graph; every tensor has two axes, the first is `batch`."""
    return _Builder(random.Random(seed), size).build()


class _Builder:
    def __init__(self, rng: random.Random, size: int) -> None:
        self._rng, self._size = rng, size
        self._weights_rng = np.random.default_rng(rng.randrange(1 << 30))

    def build(self) -> RandomModel:
        inputs = [_value(f"in_{i}", self._rng.choice(_FLOATS), self._rng.choice(_WIDTHS)) for i in range(2)]
        inputs += [_value("in_int", ir.DataType.INT64, 4), _value("flag", ir.DataType.BOOL, None)]
        scope = _Scope(0, list(inputs))
        default = self._weight(scope, ir.DataType.FLOAT, (1, 4), "default")
        if self._rng.random() < 0.5:
            inputs.append(default)
        # What every model has, for tests that look for it.
        self._emit(scope, "Tanh", [inputs[0]], [_like(inputs[0])])
        self._split(scope)
        for _ in range(self._size - 3):
            self._add_node(scope)
        functions = _functions()
        outputs = self._outputs(scope, self._rng.randint(1, 4))
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=scope.nodes,
            initializers=scope.weights,
            name="main",
            opset_imports={"": 18, "local": 1},
        )
        model = ir.Model(graph, ir_version=10, functions=functions, producer_name="random")
        if self._rng.random() < 0.3:
            for node in graph:
                for value in node.outputs:
                    if value not in outputs:
                        value.type = value.shape = None
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        return RandomModel(ir.from_proto(proto), [self._feeds(inputs[:4], batch) for batch in (1, 3)])

    def _feeds(self, inputs: Sequence[ir.Value], batch: int) -> dict[str, Array]:
        rng, feeds = self._weights_rng, dict[str, Array]()
        for value in inputs:
            assert value.dtype is not None
            shape = () if value.name == "flag" else (batch, _width(value))
            if value.dtype == ir.DataType.BOOL:
                feeds[str(value.name)] = np.array(batch == 1)
            elif value.dtype == ir.DataType.INT64:
                feeds[str(value.name)] = rng.integers(-5, 6, shape)
            else:
                feeds[str(value.name)] = rng.standard_normal(shape).astype(value.dtype.numpy())
        return feeds

    def _outputs(self, scope: _Scope, count: int) -> list[ir.Value]:
        made = [value for node in scope.nodes for value in node.outputs if value.name and _is_table(value)]
        return list(dict.fromkeys([made[-1], *self._rng.sample(made, min(count, len(made)))]))[:count]

    def _add_node(self, scope: _Scope) -> None:
        recipes: list[Callable[[_Scope], None]] = [self._unary, self._binary, self._clip, self._where, self._cast]
        recipes += [self._matmul, self._split, self._reshape, self._dropout, self._constant, self._call, self._unary]
        if scope.depth < 2:
            recipes += [self._if, self._loop]
        self._rng.choice(recipes)(scope)

    def _pick(self, scope: _Scope, dtypes: Sequence[ir.DataType], width: int | None = None) -> ir.Value:
        fit = [v for v in scope.values if v.dtype in dtypes and _is_table(v) and width in (None, _width(v))]
        # Late ones more often, for deep graphs; early ones too, for fan-out.
        return self._rng.choice(fit[-4:] if self._rng.random() < 0.6 else fit)

    def _pair(self, scope: _Scope, dtypes: Sequence[ir.DataType]) -> tuple[ir.Value, ir.Value]:
        left = self._pick(scope, dtypes)
        assert left.dtype is not None
        return left, self._pick(scope, [left.dtype], _width(left))

    def _emit(
        self,
        scope: _Scope,
        op: str,
        inputs: Sequence[ir.Value | None],
        outs: Sequence[tuple[ir.DataType, int | None]],
        **attrs: Any,
    ) -> list[ir.Value]:
        domain = "local" if op == "Blend" else ""
        node = ir.node(
            op, inputs, attrs, domain=domain, num_outputs=len(outs), name=f"n{scope.depth}_{scope.count}_{op}"
        )
        for value, (dtype, width) in zip(node.outputs, outs, strict=True):
            # Names repeat in sibling graphs, which is allowed.
            value.name = f"d{scope.depth}_{scope.count}"
            value.type, value.shape = ir.TensorType(dtype), _shape(width)
            scope.count += 1
        scope.nodes.append(node)
        scope.values += node.outputs
        return list(node.outputs)

    def _weight(self, scope: _Scope, dtype: ir.DataType, shape: tuple[int, ...], name: str = "") -> ir.Value:
        array = (self._weights_rng.standard_normal(shape) / 2).astype(dtype.numpy())
        name = name or f"w{scope.depth}_{scope.count}_{len(scope.weights)}"
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=ir.tensor(array, name=name)
        )
        scope.weights.append(value)
        return value

    def _unary(self, scope: _Scope) -> None:
        value = self._pick(scope, _FLOATS)
        op = self._rng.choice(["Relu", "Neg", "Abs", "Identity", "Tanh", "Sigmoid"])
        self._emit(scope, op, [value], [_like(value)])

    def _binary(self, scope: _Scope) -> None:
        left, right = self._pair(scope, [*_FLOATS, ir.DataType.INT64])
        self._emit(scope, self._rng.choice(["Add", "Sub", "Mul", "Max"]), [left, right], [_like(left)])

    def _clip(self, scope: _Scope) -> None:
        value = self._pick(scope, _FLOATS)
        assert value.dtype is not None
        limit = self._weight(scope, value.dtype, ())
        self._emit(scope, "Clip", [value, *self._rng.choice([(None, limit), (limit,), (limit, None)])], [_like(value)])

    def _where(self, scope: _Scope) -> None:
        left, right = self._pair(scope, _FLOATS)
        (mask,) = self._emit(scope, "Greater", [left, right], [(ir.DataType.BOOL, _width(left))])
        self._emit(scope, "Where", [mask, right, left], [_like(left)])

    def _cast(self, scope: _Scope) -> None:
        value = self._pick(scope, [*_FLOATS, ir.DataType.INT64])
        target = self._rng.choice(_FLOATS)
        self._emit(scope, "Cast", [value], [(target, _width(value))], to=target)

    def _matmul(self, scope: _Scope) -> None:
        value, width = self._pick(scope, _FLOATS), self._rng.choice(_WIDTHS)
        assert value.dtype is not None
        weights = [w for w in scope.weights if w.dtype == value.dtype and w.shape == ir.Shape((_width(value), width))]
        shared = self._rng.choice(weights) if weights else self._weight(scope, value.dtype, (_width(value), width))
        self._emit(scope, "MatMul", [value, shared], [(value.dtype, width)])

    def _split(self, scope: _Scope) -> None:
        value = self._pick(scope, _FLOATS)
        assert value.dtype is not None
        half = (value.dtype, _width(value) // 2)
        left, right = self._emit(scope, "Split", [value], [half, half], axis=1, num_outputs=2)
        parts = self._rng.choice([(right, left), (left, left)])
        self._emit(scope, "Concat", parts, [_like(value)], axis=-1)

    def _reshape(self, scope: _Scope) -> None:
        left, right = self._pair(scope, _FLOATS)
        sizes = ir.node("Shape", [left], num_outputs=1, name=f"n{scope.depth}_{scope.count}_Shape")
        sizes.outputs[0].name = f"d{scope.depth}_{scope.count}"
        scope.count += 1
        scope.nodes.append(sizes)
        self._emit(scope, "Reshape", [right, sizes.outputs[0]], [_like(right)])

    def _dropout(self, scope: _Scope) -> None:
        value = self._pick(scope, _FLOATS)
        # The ratio is left out, and the mask has no name.
        self._emit(scope, "Dropout", [value, None], [_like(value), (ir.DataType.BOOL, None)])
        scope.values.pop().name = ""

    def _constant(self, scope: _Scope) -> None:
        value = self._pick(scope, _FLOATS)
        assert value.dtype is not None
        tensor = ir.tensor(np.full((1, _width(value)), 0.5, value.dtype.numpy()))
        node = ir.node("Constant", [], {"value": tensor}, num_outputs=1, name=f"n{scope.depth}_{scope.count}_Constant")
        node.outputs[0].name = f"d{scope.depth}_{scope.count}"
        scope.count += 1
        scope.nodes.append(node)
        self._emit(scope, "Add", [value, node.outputs[0]], [_like(value)])

    def _call(self, scope: _Scope) -> None:
        left, right = self._pair(scope, _FLOATS)
        self._emit(scope, "Blend", [left, right], [_like(left)], alpha=self._rng.choice([0.25, 0.5]))

    def _body(self, scope: _Scope, values: Sequence[ir.Value] = (), size: int = 3) -> _Scope:
        inner = _Scope(scope.depth + 1, [*scope.values, *values], weights=[], count=10 * len(values))
        for _ in range(self._rng.randint(1, size)):
            self._add_node(inner)
        return inner

    def _if(self, scope: _Scope) -> None:
        like = self._pick(scope, _FLOATS)
        flag = next(value for value in scope.values if value.name == "flag")
        branches = {}
        for name in ("then_branch", "else_branch"):
            inner = self._body(scope)
            result = self._emit(inner, "Identity", [self._pick_like(inner, like)], [_like(like)])
            branches[name] = ir.Graph([], result, nodes=inner.nodes, initializers=inner.weights, name=name)
        self._emit(scope, "If", [flag], [_like(like)], **branches)

    def _pick_like(self, scope: _Scope, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        return self._pick(scope, [like.dtype], _width(like))

    def _loop(self, scope: _Scope) -> None:
        start = self._pick(scope, _FLOATS)
        assert start.dtype is not None
        prefix = f"l{scope.depth}_{scope.count}"
        trip = ir.Value(
            name=f"{prefix}_trip",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([]),
            const_value=ir.tensor(np.array(2), name=f"{prefix}_trip"),
        )
        scope.weights.append(trip)
        names = (f"{prefix}_i", f"{prefix}_go", f"{prefix}_carried")
        step, go = _value(names[0], ir.DataType.INT64, None), _value(names[1], ir.DataType.BOOL, None)
        carried = _value(names[2], start.dtype, _width(start))
        inner = self._body(scope, [carried])
        (again,) = self._emit(inner, "Identity", [go], [(ir.DataType.BOOL, None)])
        result = self._emit(inner, "Tanh", [self._pick_like(inner, start)], [_like(start)])
        body = ir.Graph(
            [step, go, carried], [again, *result], nodes=inner.nodes, initializers=inner.weights, name="body"
        )
        self._emit(scope, "Loop", [trip, None, start], [_like(start)], body=body)


def _functions() -> list[ir.Function]:
    """Blend(x, d0_0) = (x + d0_0) · alpha: its tensors are named as some of the main graph are."""
    alpha = ir.node("Constant", [], num_outputs=1, name="alpha")
    alpha.attributes.add(ir.RefAttr("value_float", "alpha", ir.AttributeType.FLOAT))
    left, right = ir.Value(name="x"), ir.Value(name="d0_0")
    total = ir.node("Add", [left, right], num_outputs=1, name="n0_0_Add")
    factor = ir.node("CastLike", [alpha.outputs[0], left], num_outputs=1, name="like")
    result = ir.node("Mul", [total.outputs[0], factor.outputs[0]], num_outputs=1, name="scale")
    names = ((alpha, "d0_1"), (total, "d0_2"), (factor, "d0_3"), (result, "d0_4"))
    for node, name in names:
        node.outputs[0].name = name
    graph = ir.Graph(
        [left, right], list(result.outputs), nodes=[node for node, _ in names], name="Blend", opset_imports={"": 18}
    )
    attribute = ir.Attr("alpha", ir.AttributeType.FLOAT, None)
    return [ir.Function("local", "Blend", graph=graph, attributes=[attribute])]


def _shape(width: int | None) -> ir.Shape:
    return ir.Shape([]) if width is None else ir.Shape(["batch", width])


def _value(name: str, dtype: ir.DataType, width: int | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=_shape(width))


def _is_table(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2 and value.shape[1] in _WIDTHS


def _width(value: ir.Value) -> int:
    width = value.shape[1] if value.shape is not None else None
    assert isinstance(width, int)
    return width


def _like(value: ir.Value) -> tuple[ir.DataType, int]:
    assert value.dtype is not None
    return value.dtype, _width(value)


def session_of(model: ir.Model) -> ort.InferenceSession:
    """An ONNX Runtime session that runs the graph as it stands."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def compute(model: ir.Model, feeds: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    """Outputs by name for each set of inputs, of which the model takes those that it has."""
    session = session_of(model)
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    results = []
    for feed in feeds:
        arrays = session.run(names, {name: array for name, array in feed.items() if name in wanted})
        results.append(dict(zip(names, map(np.asarray, arrays), strict=True)))
    return results


def same(left: list[dict[str, Array]], right: list[dict[str, Array]]) -> bool:
    """Bit for bit the same outputs, in dtype and shape too, under the same names."""
    return len(left) == len(right) and all(
        a.keys() == b.keys()
        and all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape for name in a)
        and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(left, right, strict=True)
    )


def check(model: ir.Model) -> onnx.ModelProto:
    """ONNX's checker with strict inference; returns the model as inferred.

    Nor may a tensor still count a node as its reader that is no longer in the model.
    """
    graphs = [model.graph, *model.graph.subgraphs()]
    nodes = {node for graph in graphs for node in graph}
    values = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    values += [value for node in nodes for value in node.outputs]
    assert all(user in nodes for value in values for user, _ in value.uses())
    proto = ir.to_proto(model)
    checked = onnx.ModelProto.FromString(proto.SerializeToString())
    for value in (*checked.graph.input, *checked.graph.output):
        # The checker wants shapes of these, also where ONNX cannot tell one: behind a Loop.
        value.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(checked)
    return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=False)


def is_typed(model: ir.Model) -> bool:
    """Whether the main graph states the types of all that its nodes make, the Dropouts' masks apart."""
    return all(value.type is not None for node in model.graph for value in node.outputs if value.name)


def normal_form(model: ir.Model, *, infos: bool = True) -> Any:
    """All that the model's file says, where the order of nodes, attributes and weights does not matter.

    Args:
        infos: False leaves out types and shapes of tensors that are no inputs or outputs.
    """
    proto = ir.to_proto(model)
    head = (proto.ir_version, proto.producer_name, _entries(proto.metadata_props), _entries(proto.opset_import))
    functions = sorted((f.domain, f.name, list(f.input), list(f.output), _nodes(f.node)) for f in proto.functions)
    return head, functions, _graph_form(proto.graph, infos)


def _graph_form(graph: onnx.GraphProto, infos: bool) -> Any:
    interface = [[text.SerializeToString() for text in values] for values in (graph.input, graph.output)]
    known = _entries(graph.value_info) if infos else []
    return graph.name, interface, _entries(graph.initializer), known, _nodes(graph.node, infos)


def _nodes(nodes: Sequence[onnx.NodeProto], infos: bool = True) -> list[Any]:
    return sorted(
        (n.domain, n.op_type, n.name, list(n.input), list(n.output), sorted(_attribute(a, infos) for a in n.attribute))
        for n in nodes
    )


def _attribute(attribute: onnx.AttributeProto, infos: bool) -> tuple[str, str]:
    is_graph = attribute.type == onnx.AttributeProto.GRAPH
    return attribute.name, repr(_graph_form(attribute.g, infos)) if is_graph else str(attribute.SerializeToString())


def _entries(entries: Sequence[Any]) -> list[bytes]:
    return sorted(entry.SerializeToString() for entry in entries)
