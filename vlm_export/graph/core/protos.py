"""Every graph and tensor of a model in protobuf's form: the main graph, functions, and what is nested in them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def graph_protos(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all nested graphs, those of functions included; function bodies are no graphs themselves."""
    yield model.graph
    for attribute in attribute_protos(model):
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def attribute_protos(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Attributes of all nodes, at every depth."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        for attribute in waiting.pop().attribute:
            yield attribute
            waiting += attribute.g.node
            waiting += (node for graph in attribute.graphs for node in graph.node)


def tensor_protos(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers of all graphs, and tensors in attributes."""
    for graph in graph_protos(model):
        yield from graph.initializer
    for attribute in attribute_protos(model):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
