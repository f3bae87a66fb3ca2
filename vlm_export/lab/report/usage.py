"""How to load a bundle in Python, JavaScript and C++, as code that names its own files, inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod

from vlm_export.bundle.manifest import Manifest, PartRecord
from vlm_export.specs.signature import Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec
from vlm_export.text_display import shown

# Kind of a task → a line of Python; `embed` has one for each encoder.
_TASK_LINES = {
    "match": 'print(model.match("photo.jpg", "a cat"))',
    "caption": 'print(model.caption("photo.jpg"))',
    "answer": 'print(model.answer("photo.jpg", "what colour is it?"))',
    "chat": 'print(model.answer("photo.jpg", "What is this?"))',
    "features": 'print(model.features("photo.jpg"))',
}
_JAVASCRIPT_ARRAYS = {
    "float32": "Float32Array",
    "float16": "Uint16Array",
    "int64": "BigInt64Array",
    "int32": "Int32Array",
    "uint8": "Uint8Array",
    "bool": "Uint8Array",
}
_CPP_TYPES = {
    "float32": "float",
    "float16": "Ort::Float16_t",
    "int64": "std::int64_t",
    "int32": "std::int32_t",
    "uint8": "std::uint8_t",
    "bool": "bool",
}


def usage_samples(manifest: Manifest, folder: str) -> list[tuple[str, str]]:
    """Name of a language → code that runs beside the bundle; the graphs' own interfaces are shown on the first part.

    Args:
        folder: how the code names the bundle.
    """
    part = manifest.parts[0]
    path = f"{folder}/{part.variants[0].file}"
    return [
        ("Python", _python(manifest, folder)),
        ("JavaScript (onnxruntime-node; onnxruntime-web in a browser)", _javascript(part, path)),
        ("C++ (ONNX Runtime)", _cpp(part, path)),
    ]


def _python(manifest: Manifest, folder: str) -> str:
    lines = [
        "import vlm_export  # pip install . in a clone; needs no PyTorch",
        "",
        f"model = vlm_export.load({folder!r})",
    ]
    for task in manifest.tasks:
        if isinstance(task, EmbedSpec):
            lines += ['images = model.encode_image(["photo.jpg"])  # rows of unit length'] if task.image else []
            lines += ['texts = model.encode_text(["a cat", "a dog"])'] if task.text else []
            lines += ["print(images @ texts.T)  # cosines"] if task.image and task.text else []
        else:
            lines.append(_TASK_LINES[task.kind])
    return "\n".join(lines)


def _javascript(part: PartRecord, path: str) -> str:
    output = json.dumps(part.signature.output_names[0])
    lines = [
        "// npm install onnxruntime-node; save this as usage.mjs beside the bundle, and run: node usage.mjs",
        'import * as ort from "onnxruntime-node";',
        "",
        f"const session = await ort.InferenceSession.create({json.dumps(path)});",
        "const feeds = {  // zeros, which your own inputs replace",
    ]
    for tensor, shape in _shapes(part.signature):
        array = f"new {_JAVASCRIPT_ARRAYS[tensor.dtype]}({prod(shape)})"
        lines.append(
            f"  {json.dumps(tensor.name)}: new ort.Tensor({json.dumps(tensor.dtype)}, {array}, {list(shape)}),"
            f"  // {_axes(tensor)}"
        )
    lines += [
        "};",
        "const results = await session.run(feeds);",
        f"console.log(results[{output}].dims, results[{output}].data);",
    ]
    return "\n".join(lines)


def _cpp(part: PartRecord, path: str) -> str:
    outputs = part.signature.output_names
    lines = [
        "// g++ -std=c++17 usage.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o usage",
        "#include <onnxruntime_cxx_api.h>",
        "",
        "#include <cstdint>",
        "#include <iostream>",
        "#include <memory>",
        "#include <vector>",
        "",
        "int main() {",
        "  Ort::Env env;",
        f"  Ort::Session session(env, ORT_TSTR({json.dumps(path)}), Ort::SessionOptions{{}});",
        "  auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);",
        "  std::vector<Ort::Value> values;  // zeros, which your own inputs replace",
    ]
    for number, (tensor, shape) in enumerate(_shapes(part.signature)):
        kind, count = _CPP_TYPES[tensor.dtype], prod(shape)
        size = ", ".join(map(str, shape))
        lines += [
            f"  auto data{number} = std::make_unique<{kind}[]>({count});  // {shown(tensor.name)}: {_axes(tensor)}",
            f"  std::vector<std::int64_t> shape{number}{{{size}}};",
            f"  values.push_back(Ort::Value::CreateTensor<{kind}>(",
            f"      memory, data{number}.get(), {count}, shape{number}.data(), shape{number}.size()));",
        ]
    lines += [
        f"  const char* inputs[] = {{{_quoted(part.signature.input_names)}}};",
        f"  const char* outputs[] = {{{_quoted(outputs)}}};",
        "  auto results = session.Run(",
        f"      Ort::RunOptions{{}}, inputs, values.data(), values.size(), outputs, {len(outputs)});",
        "  for (auto extent : results[0].GetTensorTypeAndShapeInfo().GetShape()) std::cout << extent << ' ';",
        "  std::cout << '\\n';",
        "}",
    ]
    return "\n".join(lines)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(json.dumps, names))


def _shapes(signature: Signature) -> list[tuple[TensorSpec, tuple[int, ...]]]:
    """Each input at its smallest sizes."""
    sizes = signature.related({axis.name: axis.minimum for axis in signature.axes})
    return [(tensor, tensor.concrete_shape(sizes)) for tensor in signature.inputs]


def _axes(tensor: TensorSpec) -> str:
    return shown(f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})")
