"""Run by test_large.py in a process of its own: edits a generated model and prints its peak of anonymous memory.

Arguments: a directory, the number of layers, and the width of each: width² half-precision weights.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.files import open_model, save_model
from vlm_export.graph.core.inference import validate
from vlm_export.graph.edits.dtypes import set_dtype
from vlm_export.graph.edits.extract import extract
from vlm_export.graph.edits.io_edits import rename_tensor


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise OSError("the system does not tell RssAnon")


@contextmanager
def sampled(peaks: dict[str, int], name: str) -> Iterator[None]:
    """Notes the highest sample while the block runs."""
    done = threading.Event()
    peaks[name] = anonymous_bytes()

    def sample() -> None:
        while not done.is_set():
            peaks[name] = max(peaks[name], anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def generate(path: Path, layers: int, width: int) -> None:
    """A chain of products and Relus over external weights: multiples of the identity, written a row at a time."""
    size = width * width * 2
    with path.with_name(f"{path.name}_data").open("wb") as file:
        for layer in range(layers):
            for row in range(width):
                line = np.zeros(width, np.float16)
                line[row] = 1 + layer % 2
                file.write(line.tobytes())
    kind = ir.TensorType(ir.DataType.FLOAT16)
    value = x = ir.val("x", ir.DataType.FLOAT16, ["batch", width])
    nodes, weights = list[ir.Node](), list[ir.Value]()
    for layer in range(layers):
        name, shape = f"layer.{layer}.weight", ir.Shape([width, width])
        tensor = ir.ExternalTensor(
            f"{path.name}_data", layer * size, size, kind.dtype, shape=shape, name=name, base_dir=str(path.parent)
        )
        weights.append(ir.Value(name=name, type=kind, shape=ir.Shape([width, width]), const_value=tensor))
        product = ir.node("MatMul", [value, weights[-1]], num_outputs=1, name=f"product.{layer}")
        relu = ir.node("Relu", product.outputs, num_outputs=1, name=f"relu.{layer}")
        for node, made in ((product, f"product.{layer}.out"), (relu, f"relu.{layer}.out")):
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = made, kind, ir.Shape(["batch", width])
        nodes += [product, relu]
        value = relu.outputs[0]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, name="large", opset_imports={"": 18})
    path.write_bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def main(folder: Path, layers: int, width: int) -> None:
    source = folder / "large.onnx"
    generate(source, layers, width)
    peaks = {"start": anonymous_bytes()}
    with sampled(peaks, "rename"):
        model = open_model(source)
        rename_tensor(model, "x", "pixels")
        rename_tensor(model, "layer.0.weight", "first")
        validate(model)
        save_model(model, folder / "renamed.onnx")
    with sampled(peaks, "extract"):
        part = extract(open_model(source), ["relu.0.out"], [f"product.{layers - 1}.out"])
        save_model(part, folder / "part.onnx")
    with sampled(peaks, "dtype"):
        model = open_model(source)
        set_dtype(model, {"x": "float32", f"relu.{layers - 1}.out": "float32"})
        save_model(model, folder / "float32.onnx")
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
