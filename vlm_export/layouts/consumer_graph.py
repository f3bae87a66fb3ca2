"""A bundle's encoders as other software wants them: names, dtypes, unit length, or both encoders in one graph.

Each step changes the graph, its signature and what its golden records become, so that what is written can be held
against what the original computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from vlm_export.bundle.opened import OpenBundle
from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.core.files import open_model
from vlm_export.graph.core.interface import apply_signature
from vlm_export.graph.core.names import fresh_name, names_in
from vlm_export.graph.core.replace_uses import place_behind, replace_uses
from vlm_export.graph.edits.compose import compose
from vlm_export.graph.edits.io_edits import rename_tensors, set_dtype
from vlm_export.proof.golden import GoldenRecord, iterate_golden
from vlm_export.proof.points import Arrays
from vlm_export.specs import ImageSpec
from vlm_export.specs.signature import Axis, DType, Signature, TensorSpec
from vlm_export.specs.tasks import EncoderSpec, ScoreSpec

Records = Callable[[], Iterator[GoldenRecord]]
_AXES_AS_INPUT = 18  # of ReduceL2 and ReduceMean


@dataclass(frozen=True)
class ConsumerGraph:
    """A graph, its signature, and its golden records, which are read when they are asked for."""

    model: ir.Model
    signature: Signature
    records: Records

    def finished(self) -> ConsumerGraph:
        """With the signature's axes written into the graph."""
        apply_signature(self.model, self.signature)
        return self


def encoder_graph(bundle: OpenBundle, encoder: EncoderSpec, precision: str) -> ConsumerGraph:
    """The graph of an encoder with its embedding as the only output, float32 (B, D)."""
    part = bundle.manifest.part(encoder.part)
    model = open_model(bundle.model_files(part.variant(precision)))
    outputs = [value for value in model.graph.outputs if value.name == encoder.output]
    model.graph.outputs[:] = outputs
    kept = tuple(spec for spec in part.signature.outputs if spec.name == encoder.output)
    remove_dead_code(model)
    signature = _pruned(replace(part.signature, outputs=kept))

    def records() -> Iterator[GoldenRecord]:
        for record in iterate_golden(bundle, encoder.part):
            yield GoldenRecord(record.inputs, {encoder.output: record.outputs[encoder.output]})

    graph = ConsumerGraph(model, signature, records)
    return _mean_pooled(graph) if encoder.pooling == "mean" else graph


def _pruned(signature: Signature) -> Signature:
    """Without axes that no tensor has."""
    named = {size for spec in (*signature.inputs, *signature.outputs) for size in spec.shape}
    return replace(signature, axes=tuple(axis for axis in signature.axes if axis.name in named))


def _mean_pooled(graph: ConsumerGraph) -> ConsumerGraph:
    """The mean over the second axis of the output (B, L, D)."""
    (spec,) = graph.signature.outputs
    node = _reduction("ReduceMean", graph.model, graph.model.graph.outputs[0], 1, keepdims=0)
    _append(graph.model, spec.name, node)
    pooled = replace(spec, shape=(spec.shape[0], spec.shape[2]))
    return replace(
        graph,
        signature=_pruned(replace(graph.signature, outputs=(pooled,))),
        records=_mapped(graph.records, outputs=lambda outputs: {spec.name: outputs[spec.name].mean(axis=1)}),
    )


def unit_length(graph: ConsumerGraph) -> ConsumerGraph:
    """The only output divided by its length."""
    (spec,) = graph.signature.outputs
    value = graph.model.graph.outputs[0]
    length = _reduction("ReduceL2", graph.model, value, -1, keepdims=1)
    _append(graph.model, spec.name, length, ir.node("Div", [value, length.outputs[0]]))
    return replace(graph, records=_mapped(graph.records, outputs=_all(_unit)))


def renamed(graph: ConsumerGraph, names: Mapping[str, str]) -> ConsumerGraph:
    """With other names of inputs and outputs; those that are not there are left out."""
    signature = graph.signature
    known = _names(signature)
    names = {old: new for old, new in names.items() if old in known and old != new}
    inner = names_in(graph.model.graph)
    taken = {new for new in names.values() if new in inner and new not in known}
    rename_tensors(graph.model, {name: fresh_name(f"{name}_inside", inner) for name in taken})
    rename_tensors(graph.model, names)
    inputs, outputs = (
        tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )

    def new_names(arrays: Arrays) -> Arrays:
        return {names.get(name, name): array for name, array in arrays.items()}

    return ConsumerGraph(
        graph.model,
        replace(signature, inputs=inputs, outputs=outputs),
        _mapped(graph.records, inputs=new_names, outputs=new_names),
    )


def with_input_dtypes(graph: ConsumerGraph, dtypes: Mapping[str, DType]) -> ConsumerGraph:
    """With other dtypes of inputs, which the graph converts; those that are not there are left out."""
    wanted = {name: dtype for name, dtype in dtypes.items() if name in graph.signature.input_names}
    set_dtype(graph.model, wanted)
    inputs = tuple(replace(spec, dtype=wanted.get(spec.name, spec.dtype)) for spec in graph.signature.inputs)

    def converted(arrays: Arrays) -> Arrays:
        return {name: array.astype(wanted.get(name, array.dtype)) for name, array in arrays.items()}

    return ConsumerGraph(graph.model, replace(graph.signature, inputs=inputs), _mapped(graph.records, inputs=converted))


def from_levels(graph: ConsumerGraph, image: ImageSpec, records: Records) -> ConsumerGraph:
    """Takes prepared images as RGB bytes, uint8 (B, H, W, 3), and normalises them itself.

    Args:
        records: of such inputs, since pixels of the graph's own records may be no levels of bytes.
    """
    (spec,) = graph.signature.inputs
    old = graph.model.graph.inputs[0]
    batch, channels, height, width = spec.shape
    value = ir.val(str(old.name), ir.DataType.UINT8, ir.Shape([batch, height, width, channels]))
    old.name = fresh_name(f"{old.name}_prepared", names_in(graph.model.graph))
    constants = {
        name: _constant(graph.model, f"pixel_{name}", np.asarray(numbers, np.float32))
        for name, numbers in (("factor", image.rescale_factor), ("mean", image.mean), ("std", image.std))
    }
    nodes = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})]
    for kind, name in (("Mul", "factor"), ("Sub", "mean"), ("Div", "std")):
        nodes.append(ir.node(kind, [nodes[-1].outputs[0], constants[name]]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 3, 1, 2]}))
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = old.type, old.shape
    replace_uses(old, nodes[-1].outputs[0])
    graph.model.graph.inputs[:] = [value]
    for node in reversed(nodes):
        place_behind(None, graph.model.graph, node)
    bytes_spec = replace(spec, dtype="uint8", shape=(batch, height, width, channels))
    return ConsumerGraph(graph.model, replace(graph.signature, inputs=(bytes_spec,)), records)


def with_mask(graph: ConsumerGraph, ids: str, mask: str = "attention_mask") -> ConsumerGraph:
    """With a mask of the ids' dtype and shape among the inputs; where the model reads none, nothing reads it."""
    if mask in graph.signature.input_names:
        return graph
    like = next(spec for spec in graph.signature.inputs if spec.name == ids)
    dtype = ir.DataType.from_numpy(np.dtype(like.dtype))
    graph.model.graph.inputs.append(ir.val(mask, dtype, ir.Shape(like.shape)))
    return ConsumerGraph(
        graph.model,
        replace(graph.signature, inputs=(*graph.signature.inputs, replace(like, name=mask))),
        _mapped(graph.records, inputs=lambda arrays: {**arrays, mask: np.ones_like(arrays[ids])}),
    )


def masked_by_padding(graph: ConsumerGraph, ids: str, pad: int, mask: str = "attention_mask") -> ConsumerGraph:
    """Without the mask among the inputs: what has the id of the padding is padding.

    Records whose texts have that id among their own tokens are left out.
    """
    (spec,) = (spec for spec in graph.signature.inputs if spec.name == mask)
    values = {str(value.name): value for value in graph.model.graph.inputs}
    of_ids = next(entry for entry in graph.signature.inputs if entry.name == ids)
    same = ir.node("Equal", [values[ids], _constant(graph.model, "pad_id", np.asarray(pad, of_ids.dtype))])
    other = ir.node("Not", [same.outputs[0]])
    cast = ir.node("Cast", [other.outputs[0]], {"to": int(ir.DataType.from_numpy(np.dtype(spec.dtype)))})
    cast.outputs[0].type, cast.outputs[0].shape = values[mask].type, values[mask].shape
    replace_uses(values[mask], cast.outputs[0])
    graph.model.graph.inputs[:] = [value for value in graph.model.graph.inputs if value is not values[mask]]
    for node in (cast, other, same):
        place_behind(None, graph.model.graph, node)
    inputs = tuple(entry for entry in graph.signature.inputs if entry is not spec)

    def records() -> Iterator[GoldenRecord]:
        for record in graph.records():
            own, seen = record.inputs[ids], record.inputs[mask] != 0
            if not (own[seen] == pad).any():
                yield GoldenRecord({ids: np.where(seen, own, own.dtype.type(pad))}, record.outputs)

    return ConsumerGraph(graph.model, replace(graph.signature, inputs=inputs), records)


def paired(text: ConsumerGraph, image: ConsumerGraph, score: ScoreSpec) -> ConsumerGraph:
    """Both encoders in one graph with batches of their own, as transformers' CLIPModel answers.

    Inputs: those of the text, then the image's. Outputs: logits_per_image float32 (images, texts), logits_per_text
    float32 (texts, images), text_embeds float32 (texts, D) and image_embeds float32 (images, D), both of unit length.
    """
    text, image = (
        _with_batch(renamed(unit_length(side), {side.signature.outputs[0].name: name}), batch)
        for side, name, batch in ((text, "text_embeds", "text_batch"), (image, "image_embeds", "image_batch"))
    )
    model = compose(text.model, image.model, (), prefix_first="text.", prefix_second="image.")
    graph = model.graph
    names = [(side, name) for side, of in (("text", text), ("image", image)) for name in _names(of.signature)]
    rename_tensors(model, {f"{side}.{name}": name for side, name in names})
    for node in graph:
        for value in node.outputs:
            # Both towers called their batch by one name.
            value.shape = value.shape if value.is_graph_output() else None
    embeds = {str(value.name): value for value in graph.outputs}
    transposed = ir.node("Transpose", [embeds["image_embeds"]], {"perm": [1, 0]})
    product = ir.node("MatMul", [embeds["text_embeds"], transposed.outputs[0]])
    factor = _constant(model, "logit_scale_factor", np.asarray(score.scale, np.float32))
    scaled = ir.node("Mul", [product.outputs[0], factor])
    bias = _constant(model, "logit_bias", np.asarray(score.logit_bias, np.float32))
    by_text = ir.node("Add", [scaled.outputs[0], bias])
    by_image = ir.node("Transpose", [by_text.outputs[0]], {"perm": [1, 0]})
    graph.extend([transposed, product, scaled, by_text, by_image])
    texts, images = "text_batch", "image_batch"
    logits = (("logits_per_image", by_image, (images, texts)), ("logits_per_text", by_text, (texts, images)))
    specs = []
    for name, node, shape in logits:
        value = node.outputs[0]
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        specs.append(TensorSpec(name, "float32", shape))
    graph.outputs[:] = [by_image.outputs[0], by_text.outputs[0], embeds["text_embeds"], embeds["image_embeds"]]
    signature = Signature(
        (*text.signature.inputs, *image.signature.inputs),
        (*specs, *text.signature.outputs, *image.signature.outputs),
        _united(text.signature.axes, image.signature.axes),
    )

    def records() -> Iterator[GoldenRecord]:
        for words, pixels in zip(text.records(), image.records(), strict=False):
            embeds = {**words.outputs, **pixels.outputs}
            first, second = embeds["text_embeds"].astype(np.float64), embeds["image_embeds"].astype(np.float64)
            scores = (first @ second.T * score.scale + score.logit_bias).astype(np.float32)
            outputs = {"logits_per_image": scores.T.copy(), "logits_per_text": scores, **embeds}
            yield GoldenRecord({**words.inputs, **pixels.inputs}, outputs)

    return ConsumerGraph(model, signature, records)


def filled(graph: ConsumerGraph, ids: str, pad: int) -> ConsumerGraph:
    """Takes texts of any length up to the one that the graph was made for, and fills them with `pad` itself.

    For consumers that fill a batch up to its longest text, where the model was trained with padding up to its context.
    """
    (spec,) = (spec for spec in graph.signature.inputs if spec.name == ids)
    length = spec.shape[1]
    if isinstance(length, str):
        return graph
    value = next(value for value in graph.model.graph.inputs if value.name == ids)
    # More than is needed, then cut: so no length is computed.
    pads = _constant(graph.model, "fill_widths", np.asarray([0, 0, 0, length], np.int64))
    padding = ir.node("Pad", [value, pads, _constant(graph.model, "fill_id", np.asarray(pad, spec.dtype))])
    start, end, axis = (_constant(graph.model, f"fill_{i}", np.asarray([i], np.int64)) for i in (0, length, 1))
    cut = ir.node("Slice", [padding.outputs[0], start, end, axis])
    cut.outputs[0].type, cut.outputs[0].shape = value.type, value.shape
    replace_uses(value, cut.outputs[0], besides=padding)
    value.shape = ir.Shape([spec.shape[0], "sequence"])
    place_behind(None, graph.model.graph, cut)
    place_behind(None, graph.model.graph, padding)
    open_spec = replace(spec, shape=(spec.shape[0], "sequence"))

    def cut_short(arrays: Arrays) -> Arrays:
        own = np.flatnonzero((arrays[ids] != pad).any(axis=0))
        return {**arrays, ids: arrays[ids][:, : 1 + (own[-1] if len(own) else 0)]}

    inputs = tuple(open_spec if entry is spec else entry for entry in graph.signature.inputs)
    axes = (*graph.signature.axes, Axis("sequence", 1, length))
    return ConsumerGraph(
        graph.model, Signature(inputs, graph.signature.outputs, axes), _mapped(graph.records, inputs=cut_short)
    )


def also_named(graph: ConsumerGraph, name: str) -> ConsumerGraph:
    """The only output once more under another name, behind it."""
    (spec,) = graph.signature.outputs
    value = graph.model.graph.outputs[0]
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
    graph.model.graph.append(node)
    graph.model.graph.outputs.append(node.outputs[0])
    return ConsumerGraph(
        graph.model,
        replace(graph.signature, outputs=(spec, replace(spec, name=name))),
        _mapped(graph.records, outputs=lambda outputs: {**outputs, name: outputs[spec.name]}),
    )


def as_one_token(graph: ConsumerGraph) -> ConsumerGraph:
    """The only output (B, D) as states of a single token (B, 1, D), for consumers that pool states themselves."""
    (spec,) = graph.signature.outputs
    value = graph.model.graph.outputs[0]
    axes = _constant(graph.model, "token_axis", np.asarray([1], np.int64))
    _append(graph.model, spec.name, ir.node("Unsqueeze", [value, axes]))
    states = replace(spec, shape=(spec.shape[0], 1, spec.shape[1]))
    return replace(
        graph,
        signature=replace(graph.signature, outputs=(states,)),
        records=_mapped(graph.records, outputs=_all(lambda rows: rows[:, None])),
    )


def in_order(graph: ConsumerGraph, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ConsumerGraph:
    """With these inputs and outputs in this order; outputs may be left out, inputs may not."""
    signature = graph.signature
    by_name = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    values = {str(value.name): value for value in (*graph.model.graph.inputs, *graph.model.graph.outputs)}
    graph.model.graph.inputs[:] = [values[name] for name in inputs]
    graph.model.graph.outputs[:] = [values[name] for name in outputs]
    kept = replace(
        signature,
        inputs=tuple(by_name[name] for name in inputs),
        outputs=tuple(by_name[name] for name in outputs),
    )
    return ConsumerGraph(
        graph.model,
        _pruned(kept),
        _mapped(
            graph.records,
            inputs=lambda arrays: {name: arrays[name] for name in inputs},
            outputs=lambda arrays: {name: arrays[name] for name in outputs},
        ),
    )


def _with_batch(graph: ConsumerGraph, batch: str) -> ConsumerGraph:
    """With another name for the axis `batch`."""

    def other(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(batch if size == "batch" else size for size in spec.shape))

    signature = graph.signature
    axes = tuple(replace(axis, name=batch) if axis.name == "batch" else axis for axis in signature.axes)
    inputs, outputs = tuple(map(other, signature.inputs)), tuple(map(other, signature.outputs))
    return replace(graph, signature=Signature(inputs, outputs, axes))


def _names(signature: Signature) -> tuple[str, ...]:
    return (*signature.input_names, *signature.output_names)


def _united(first: tuple[Axis, ...], second: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple({axis.name: axis for axis in (*first, *second)}.values())


def _mapped(
    records: Records,
    inputs: Callable[[Arrays], Arrays] = lambda arrays: arrays,
    outputs: Callable[[Arrays], Arrays] = lambda arrays: arrays,
) -> Records:
    def mapped() -> Iterator[GoldenRecord]:
        for record in records():
            yield GoldenRecord(inputs(record.inputs), outputs(record.outputs))

    return mapped


def _all(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {name: change(array) for name, array in arrays.items()}


def _unit(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    return np.asarray((exact / np.linalg.norm(exact, axis=-1, keepdims=True)).astype(rows.dtype))


def _reduction(kind: str, model: ir.Model, value: ir.Value, axis: int, *, keepdims: int) -> ir.Node:
    """The operator at the model's opset, whose axes are an attribute up to 17 and an input from 18."""
    if model.graph.opset_imports.get("", 0) < _AXES_AS_INPUT:
        return ir.node(kind, [value], {"axes": [axis], "keepdims": keepdims})
    axes = _constant(model, f"{kind}_axes", np.asarray([axis], np.int64))
    return ir.node(kind, [value, axes], {"keepdims": keepdims})


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    unique = fresh_name(name, names_in(model.graph))
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    model.graph.initializers[unique] = value
    return value


def _append(model: ir.Model, name: str, *nodes: ir.Node) -> None:
    """Puts nodes behind the only output; the last node's output takes its place and its name."""
    old = model.graph.outputs[0]
    new = nodes[-1].outputs[0]
    old.name, new.name = fresh_name(f"{name}_before", names_in(model.graph)), name
    new.type = old.type
    model.graph.extend(nodes)
    model.graph.outputs[0] = new
