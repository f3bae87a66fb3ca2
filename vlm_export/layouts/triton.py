"""Triton: a model repository in `models/`, with a configuration for each encoder.

Facts: triton-inference-server/onnxruntime_backend and core, `docs/user_guide/model_configuration.md` (with
`max_batch_size` above 0 the first axis is the batch and stands in no `dims`) and `model_repository.md` (every folder of
a repository is a model, which is why this one lies in a folder of its own).
"""

from __future__ import annotations

from vlm_export.layouts.consumer_graph import ConsumerGraph
from vlm_export.layouts.packing import Packing
from vlm_export.specs.signature import TensorSpec

_MAX_BATCH = 64
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


def lay_out(packing: Packing) -> None:
    """A model for each encoder that the bundle has."""
    task = packing.embed
    for name, encoder, graph in (("vision", task.image, packing.image), ("text", task.text, packing.text)):
        if encoder is not None:
            found = graph()
            packing.add(name, f"models/{name}/1/model.onnx", found)
            path = packing.staging.file(f"models/{name}/config.pbtxt")
            path.write_text(_config(name, found), encoding="utf-8")
    if task.text is not None:
        packing.copy_tokenizer()
    packing.notes.append("the configuration was not tried with a Triton server")


def _config(name: str, graph: ConsumerGraph) -> str:
    inputs, outputs = (",\n".join(map(_tensor, specs)) for specs in (graph.signature.inputs, graph.signature.outputs))
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {_MAX_BATCH}\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
        "dynamic_batching { max_queue_delay_microseconds: 2000 }\n"
    )


def _tensor(spec: TensorSpec) -> str:
    dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in spec.shape[1:])
    return f'  {{ name: "{spec.name}", data_type: {_TYPES[spec.dtype]}, dims: [ {dims} ] }}'
