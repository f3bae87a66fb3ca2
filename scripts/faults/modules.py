"""Faults of one module, planted in exported graphs of several families, and what `bisect` says of each.

A fault finds its own place: the middle one of the nodes that it can damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

import vlm_export
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.lab.bisect import Bisection, bisect_graphs, part_inputs
from vlm_export.lab.module_paths import constant_of, joined, module_paths, parameter_name

_TESTS = Path(__file__).resolve().parents[2] / "tests" / "data"
_PLAIN = {"exporter": "torchscript", "opset": 17, "threads": 1}
_fresh = count()


@dataclass(frozen=True)
class ModuleFault:
    """One kind of fault.

    Attributes:
        name: for people.
        fits: whether a node can be damaged in this way.
        plant: damages it, and returns a node that stands where the fault is.
    """

    name: str
    fits: Callable[[ir.Node], bool]
    plant: Callable[[ir.Node], ir.Node]


@dataclass(frozen=True)
class Named:
    """A planted fault and what was found: the module that has it, and the one that `bisect` names."""

    fault: ModuleFault
    family: str
    planted: str
    found: Bisection

    @property
    def right(self) -> bool:
        """Whether the module with the fault is named, and no other."""
        return {region.path for region in self.found.regions if region.parts} == {self.planted}


def exported_parts(folder: Path) -> Iterator[tuple[str, OpenBundle, str]]:
    """Exports a tiny model of each family; yields its name, the bundle and the part that gets faults."""
    sources: list[tuple[str, str, str, Mapping[str, Any]]] = [
        ("CLIP", "clip-demo", "vision", {}),
        ("CLIP", "clip-demo", "text", _PLAIN),
        ("SigLIP 2", str(_siglip2(folder / "siglip2")), "vision", {**_PLAIN, "with_tokenizer": False}),
        ("BLIP", "blip-demo-caption", "vision", _PLAIN),
        ("BLIP", "blip-demo-caption", "text_decoder", {}),
        ("MiniCPM-V", str(_TESTS / "minicpmv" / "v2_6"), "vision", {}),
        ("nanoVLM", "nanovlm-demo", "decoder", {}),
    ]
    for number, (family, source, part, options) in enumerate(sources):
        target = folder / f"bundle{number}"
        vlm_export.export(source, target, **options)
        yield family, open_bundle(target), part


def planted_faults(family: str, bundle: OpenBundle, part: str) -> Iterator[Named]:
    """Plants each fault that fits into a part, and bisects."""
    path = bundle.model_files(bundle.manifest.part(part).variant("fp32"))
    sound = ir.load(path)
    inputs = part_inputs(bundle, part, sound)
    for fault in FAULTS:
        faulty = ir.load(path)
        places = [node for node in faulty.graph if fault.fits(node)]
        if not places:
            continue
        place = places[len(places) // 2]
        before = module_paths(faulty.graph)
        node = fault.plant(place)
        planted = joined(part, before[node] if node in before else module_paths(faulty.graph)[node])
        found = bisect_graphs(sound, faulty, inputs, part)
        yield Named(fault, family, planted, found)


def _weight(node: ir.Node, least: int = 2) -> ir.Value | None:
    """The parameter with the most values that a node reads."""
    weights = [
        value
        for value in node.inputs
        if value is not None and value.is_initializer() and parameter_name(str(value.name)) and _size(value) >= least
    ]
    return max(weights, key=_size, default=None)


def _size(value: ir.Value) -> int:
    tensor = constant_of(value)
    return 0 if tensor is None or not tensor.dtype.is_floating_point() else tensor.size


def _weight_fault(name: str, change: Callable[[np.ndarray], np.ndarray], *operators: str) -> ModuleFault:
    def plant(node: ir.Node) -> ir.Node:
        weight = _weight(node)
        assert weight is not None
        assert weight.const_value is not None
        changed = change(weight.const_value.numpy().copy()).astype(np.float32)
        value = ir.val(f"changed.{next(_fresh)}", weight.dtype, weight.shape, const_value=ir.tensor(changed))
        value.name = f"{weight.name}"
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        weight.name = f"sound.{next(_fresh)}"
        graph.initializers[str(value.name)] = value
        node.replace_input_with(list(node.inputs).index(weight), value)
        return node

    def fits(node: ir.Node) -> bool:
        """Weights that were published in bfloat16, say, are not changed by being cut to it."""
        weight = _weight(node) if node.op_type in operators else None
        if weight is None or weight.const_value is None:
            return False
        values = weight.const_value.numpy()
        return not np.array_equal(change(values.copy()), values)

    return ModuleFault(name, fits, plant)


def _negate_one(values: np.ndarray) -> np.ndarray:
    place = int(np.abs(values).argmax())
    values.reshape(-1)[place] *= -1
    return values


def _eight_bits(values: np.ndarray) -> np.ndarray:
    step = np.abs(values).max() / 127
    return np.asarray(np.round(values / step) * step)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.asarray(bits.view(np.float32))


def _exchanged(values: np.ndarray) -> np.ndarray:
    values[[0, 1]] = values[[1, 0]]
    return values


def _behind(node: ir.Node, make: Callable[[ir.Value], list[ir.Node]]) -> ir.Node:
    """Puts nodes between a node's first output and its readers; returns the last of them."""
    value, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    uses = list(value.uses())
    new = make(value)
    graph.insert_after(node, new)
    for use in uses:
        use.node.replace_input_with(use.idx, new[-1].outputs[0])
    return new[-1]


def _constant(number: float) -> ir.Value:
    return ir.val(f"planted.{next(_fresh)}", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(number)))


def _held(node: ir.Node, value: ir.Value) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.initializers[str(value.name)] = value
    return value


def _overflow(node: ir.Node) -> ir.Node:
    """A part of the layer in float16, whose values are beyond it."""
    large, small = _held(node, _constant(1e6)), _held(node, _constant(1e-6))

    def make(value: ir.Value) -> list[ir.Node]:
        scaled = ir.node("Mul", [value, large])
        half = ir.node("Cast", scaled.outputs, {"to": ir.DataType.FLOAT16})
        whole = ir.node("Cast", half.outputs, {"to": ir.DataType.FLOAT})
        return [scaled, half, whole, ir.node("Mul", [whole.outputs[0], small])]

    return _behind(node, make)


def _wrong_at_one_size(node: ir.Node) -> ir.Node:
    """A fused operator that is wrong where the first axis is 2."""
    two = ir.val(f"planted.{next(_fresh)}", ir.DataType.INT64, [1], const_value=ir.tensor(np.array([2], np.int64)))
    _held(node, two)
    factor = _held(node, _constant(0.01))

    def make(value: ir.Value) -> list[ir.Node]:
        size = ir.node("Shape", [value], {"start": 0, "end": 1})
        equal = ir.node("Equal", [size.outputs[0], two])
        number = ir.node("Cast", equal.outputs, {"to": ir.DataType.FLOAT})
        share = ir.node("Mul", [number.outputs[0], factor])
        added = ir.node("Mul", [value, share.outputs[0]])
        return [size, equal, number, share, added, ir.node("Add", [value, added.outputs[0]])]

    return _behind(node, make)


def _cut_off(node: ir.Node) -> ir.Node:
    """Values are clipped, as a wrong range of a quantised tensor does."""
    low, high = _held(node, _constant(-0.5)), _held(node, _constant(0.5))
    return _behind(node, lambda value: [ir.node("Clip", [value, low, high])])


def _coarse(node: ir.Node) -> ir.Node:
    """Values are rounded to steps of 1/16, as a wrong scale of a quantised tensor does."""
    fine, back = _held(node, _constant(16.0)), _held(node, _constant(1 / 16))

    def make(value: ir.Value) -> list[ir.Node]:
        scaled = ir.node("Mul", [value, fine])
        whole = ir.node("Round", scaled.outputs)
        return [scaled, whole, ir.node("Mul", [whole.outputs[0], back])]

    return _behind(node, make)


def _softmax_of_opset_12(node: ir.Node) -> ir.Node:
    """Before opset 13 all axes from the first named one on were one; a wrong conversion keeps that."""
    graph, value = node.graph, node.inputs[0]
    assert isinstance(graph, ir.Graph)
    shape = ir.node("Shape", [value])
    flat = ir.node("Flatten", [value], {"axis": 1})
    softmax = ir.node("Softmax", flat.outputs, {"axis": 1})
    new = ir.node("Reshape", [softmax.outputs[0], shape.outputs[0]])
    ir.convenience.replace_nodes_and_values(graph, node, [node], [shape, flat, softmax, new], node.outputs, new.outputs)
    return new


def _twice(node: ir.Node) -> ir.Node:
    return _behind(node, lambda value: [ir.node(node.op_type, [value])])


def _replaced_by(operator: str) -> Callable[[ir.Node], ir.Node]:
    def plant(node: ir.Node) -> ir.Node:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        new = ir.node(operator, list(node.inputs))
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
        return new

    return plant


def _moves_four_axes(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return node.op_type == "Transpose" and order is not None and len(order.as_ints()) == 4


def _last_axes_swapped(node: ir.Node) -> ir.Node:
    order = list(node.attributes["perm"].as_ints())
    node.attributes["perm"] = ir.AttrInt64s("perm", [*order[:2], order[3], order[2]])
    return node


def _attribute(name: str, value: float) -> Callable[[ir.Node], ir.Node]:
    def plant(node: ir.Node) -> ir.Node:
        is_whole = isinstance(value, int)
        node.attributes[name] = ir.AttrInt64(name, int(value)) if is_whole else ir.AttrFloat32(name, value)
        return node

    return plant


def _is_mask(node: ir.Node) -> bool:
    """A sum that only a softmax reads."""
    readers = [use.node.op_type for use in node.outputs[0].uses()] if node.op_type == "Add" else []
    return readers == ["Softmax"]


def _is_residual(node: ir.Node) -> bool:
    return (
        node.op_type == "Add"
        and all(value is not None and constant_of(value) is None for value in node.inputs)
        and len(list(node.outputs[0].uses())) > 1
    )


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and _weight(node) is not None


def _first_for_sum(node: ir.Node) -> ir.Node:
    """Readers take the first term alone; the sum stays where it is, and nobody needs it."""
    first = node.inputs[0]
    assert first is not None
    for use in list(node.outputs[0].uses()):
        use.node.replace_input_with(use.idx, first)
    return node


def _reads_activation(node: ir.Node) -> bool:
    return node.op_type in ("Erf", "Sigmoid", "Tanh")


def _scales_by_constant(node: ir.Node) -> bool:
    tensors = [constant_of(value) for value in node.inputs] if node.op_type in ("Mul", "Div") else []
    return any(tensor is not None and tensor.size == 1 and tensor.dtype == ir.DataType.FLOAT for tensor in tensors)


def _other_scale(node: ir.Node) -> ir.Node:
    index = next(i for i, value in enumerate(node.inputs) if constant_of(value) is not None)
    tensor = constant_of(node.inputs[index])
    assert tensor is not None
    node.replace_input_with(index, _held(node, _constant(float(tensor.numpy().reshape(-1)[0]) * 0.94)))
    return node


FAULTS = (
    _weight_fault("the sign of one weight", _negate_one, "MatMul", "Gemm", "Conv"),
    _weight_fault("a matrix 0.1 % too large", lambda values: values * 1.001, "MatMul", "Gemm", "Conv"),
    _weight_fault(
        "stale weights: a matrix with its rows in another order", lambda v: np.roll(v, 1, 0), "MatMul", "Gemm"
    ),
    _weight_fault("a bias left out", np.zeros_like, "Add"),
    _weight_fault("a norm's scale of another layer", lambda values: values + 0.01, "LayerNormalization", "Mul"),
    ModuleFault("another epsilon", lambda node: node.op_type == "LayerNormalization", _attribute("epsilon", 3e-5)),
    ModuleFault("softmax over another axis", lambda node: node.op_type == "Softmax", _attribute("axis", -2)),
    ModuleFault("the mask lost", _is_mask, _first_for_sum),
    ModuleFault("a residual lost", _is_residual, _first_for_sum),
    ModuleFault("another activation", _reads_activation, _replaced_by("Softsign")),
    ModuleFault("a scale of the code changed", _scales_by_constant, _other_scale),
    _weight_fault("weights rounded to eight bits", _eight_bits, "MatMul", "Gemm", "Conv"),
    _weight_fault("weights cut to bfloat16", _bfloat16, "MatMul", "Gemm", "Conv"),
    _weight_fault("two rows of a matrix exchanged", _exchanged, "MatMul", "Gemm", "Conv"),
    _weight_fault("a matrix that is all zeros", np.zeros_like, "MatMul", "Gemm"),
    _weight_fault("a norm's scale left out", np.ones_like, "LayerNormalization"),
    ModuleFault("a residual subtracted", _is_residual, _replaced_by("Sub")),
    ModuleFault("two axes swapped", _moves_four_axes, _last_axes_swapped),
    ModuleFault("a softmax as opset 12 has it", lambda node: node.op_type == "Softmax", _softmax_of_opset_12),
    ModuleFault("the activation twice", _reads_activation, _twice),
    ModuleFault("values cut off", _is_product, _cut_off),
    ModuleFault("values rounded to coarse steps", _is_product, _coarse),
    ModuleFault("overflow of float16", _is_product, _overflow),
    ModuleFault(
        "a fused operator that is wrong at one size", lambda node: node.op_type == "Softmax", _wrong_at_one_size
    ),
)


def _siglip2(folder: Path) -> Path:
    """A tiny SigLIP 2 of patches, as transformers saves its image encoder with both towers."""
    import torch

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config={**sizes, "num_patches": 16, "patch_size": 4}))
    with torch.no_grad():
        for parameter in model.parameters():
            # No two are equal, which the exporter would store once.
            parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(folder)
    return folder
