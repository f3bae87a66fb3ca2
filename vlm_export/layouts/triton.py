"""Triton: a model repository in `models/`, with a configuration for each encoder, and an ensemble from image bytes.

Facts: triton-inference-server/onnxruntime_backend and core, `docs/user_guide/model_configuration.md` (with
`max_batch_size` above 0 the first axis is the batch and stands in no `dims`) and `model_repository.md` (every folder of
a repository is a model, which is why this one lies in a folder of its own; each has a folder for its version, also an
ensemble, which has no file of its own); core, `src/ensemble_utils.cc` at 1b3d5b80 (a step without batches may feed one
with them, where the shapes with the batch agree). The dynamic batcher puts requests of one shape together: images of
any size are prepared one request at a time, and their pixels, all of one size, are batched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from PIL import Image

from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.core.files import open_model
from vlm_export.layouts.consumer_graph import ConsumerGraph, encoder_graph, renamed
from vlm_export.layouts.packing import Packing
from vlm_export.proof.gates import PIXELS_FROM_UINT8
from vlm_export.proof.golden import GoldenRecord, iterate_golden
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs.signature import Signature, TensorSpec

_MAX_BATCH = 64
_FLOAT32 = "fp32"
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
_ENSEMBLE_VERSION = "An ensemble has a folder for its version, and no file of its own.\n"


def lay_out(packing: Packing) -> None:
    """A model for each encoder that the bundle has, and where it prepares images in a graph, an ensemble of both."""
    task = packing.embed
    if task.image is not None:
        vision = encoder_graph(packing.bundle, task.image, packing.precision)
        pixels = _pixels_graph(packing, vision)
        _add_model(packing, "vision", vision)
        if pixels is not None:
            _add_model(packing, PIXELS_FROM_UINT8, pixels, _FLOAT32, batched=False)
            _add_ensemble(packing, pixels.signature, vision.signature)
    if task.text is not None:
        _add_model(packing, "text", encoder_graph(packing.bundle, task.text, packing.precision))
        packing.copy_tokenizer()
    packing.notes.append("the configuration was not tried with a Triton server")


def _add_model(
    packing: Packing, name: str, graph: ConsumerGraph, precision: str | None = None, *, batched: bool = True
) -> None:
    packing.add(name, f"models/{name}/1/model.onnx", graph, precision)
    batching = "dynamic_batching { max_queue_delay_microseconds: 2000 }\n" if batched else ""
    head = f'backend: "onnxruntime"\nmax_batch_size: {_MAX_BATCH if batched else 0}\n'
    _write_config(packing, name, head + _interface(graph.signature, batched=batched) + batching)


def _add_ensemble(packing: Packing, pixels: Signature, vision: Signature) -> None:
    """Images of any size to embeddings, by the name of the bundle's own part."""
    (between,), (prepared,) = vision.inputs, pixels.outputs
    interface = Signature(pixels.inputs, vision.outputs, pixels.axes)
    steps = ",\n".join(
        f'    {{ model_name: "{model}", model_version: -1,\n'
        f'      input_map {{ key: "{taken.name}", value: "{taken_as}" }},\n'
        f'      output_map {{ key: "{made.name}", value: "{made_as}" }} }}'
        for model, taken, taken_as, made, made_as in (
            (PIXELS_FROM_UINT8, pixels.inputs[0], pixels.inputs[0].name, prepared, between.name),
            ("vision", between, between.name, vision.outputs[0], vision.outputs[0].name),
        )
    )
    scheduling = f"ensemble_scheduling {{\n  step [\n{steps}\n  ]\n}}\n"
    body = 'platform: "ensemble"\nmax_batch_size: 0\n' + _interface(interface, batched=False) + scheduling
    _write_config(packing, "vision_from_uint8", body)
    packing.staging.file("models/vision_from_uint8/1/ensemble.txt").write_text(_ENSEMBLE_VERSION, encoding="utf-8")


def _write_config(packing: Packing, name: str, body: str) -> None:
    packing.staging.file(f"models/{name}/config.pbtxt").write_text(f'name: "{name}"\n{body}', encoding="utf-8")


def _interface(signature: Signature, *, batched: bool) -> str:
    inputs, outputs = (
        ",\n".join(_tensor(spec, batched=batched) for spec in specs) for specs in (signature.inputs, signature.outputs)
    )
    return f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"


def _tensor(spec: TensorSpec, *, batched: bool) -> str:
    shape = spec.shape[1:] if batched else spec.shape
    dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in shape)
    return f'  {{ name: "{spec.name}", data_type: {_TYPES[spec.dtype]}, dims: [ {dims} ] }}'


def _pixels_graph(packing: Packing, vision: ConsumerGraph) -> ConsumerGraph | None:
    """The first half of the bundle's graph of uint8 images, up to what the image encoder takes; None without one.

    Its records are the runtime's own preparation, which the contract holds against the original's.
    """
    manifest = packing.bundle.manifest
    part = next((part for part in manifest.parts if [spec.dtype for spec in part.signature.inputs] == ["uint8"]), None)
    if part is None:
        return None
    variant = next((variant for variant in part.variants if variant.precision == _FLOAT32), None)
    model = None if variant is None else open_model(packing.bundle.model_files(variant))
    found = None if model is None else _same_place(vision.model.graph.inputs[0], model.graph)
    if model is None or found is None:
        packing.notes.append("the graph of uint8 images could not be cut before the encoder: there is no ensemble")
        return None
    image, (prepared,), (taken,) = packing.image_spec, vision.signature.inputs, part.signature.inputs
    found.type, found.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(prepared.shape)
    model.graph.outputs[:] = [found]
    remove_dead_code(model)

    def records() -> Iterator[GoldenRecord]:
        for record in iterate_golden(packing.bundle, part.name):
            rows = record.inputs[taken.name]
            pixels = np.stack([preprocess_image(Image.fromarray(row), image) for row in rows])
            yield GoldenRecord(record.inputs, {str(found.name): pixels})

    signature = Signature((taken,), (replace(prepared, name=str(found.name)),), part.signature.axes)
    return renamed(ConsumerGraph(model, signature, records), {str(found.name): prepared.name})


def _same_place(pixels: ir.Value, graph: ir.Graph) -> ir.Value | None:
    """What goes in another graph into the nodes that read `pixels`, found by the weights that they read too."""
    for node, index in pixels.uses():
        weights = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value]
        for other in graph if weights else ():
            if other.op_type == node.op_type and len(other.inputs) == len(node.inputs):
                theirs = [value.const_value for value in other.inputs if value is not None and value.const_value]
                if len(theirs) == len(weights) and all(
                    ours.shape == tuple(their.shape) and np.array_equal(ours, their.numpy())
                    for ours, their in zip(weights, theirs, strict=True)
                ):
                    return other.inputs[index]
    return None
