"""`bisect` of a model above protobuf's 2 GB: no more memory than a plain run of the two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

_WIDTH, _LAYERS, _FAULTY = 9000, 7, 4
_PLAIN = """
import resource, sys
import numpy, onnxruntime
for path in sys.argv[1:]:
    session = onnxruntime.InferenceSession(path)
    session.run(None, {"x": numpy.ones((8, 9000), numpy.float32)})
    del session
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
_BISECT = """
import json, resource, sys
from vlm_export.lab.bisect import bisect
(found,) = bisect(*sys.argv[1:])
print(json.dumps([[region.path for region in found.regions if region.parts],
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def write_model(path: Path, faulty: int | None) -> None:
    weights, nodes, last = [], [], "x"
    with path.with_suffix(".bin").open("wb") as file:
        for layer in range(_LAYERS):
            values = np.random.default_rng(layer).standard_normal((_WIDTH, _WIDTH), dtype=np.float32) / 95
            if layer == faulty:
                values[3, 4] *= -1
            weight = TensorProto(name=f"blocks.{layer}.fc.weight", data_type=TensorProto.FLOAT, dims=values.shape)
            weight.data_location = TensorProto.EXTERNAL
            stated = {"location": path.with_suffix(".bin").name, "offset": file.tell(), "length": values.nbytes}
            for key, value in stated.items():
                weight.external_data.add(key=key, value=str(value))
            file.write(values.tobytes())
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [last, weight.name], [f"product{layer}"]))
            nodes.append(helper.make_node("Relu", [f"product{layer}"], [f"layer{layer}"]))
            last = f"layer{layer}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", _WIDTH]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.slow
def test_memory_above_two_gigabytes(tmp_path: Path) -> None:
    graphs = [tmp_path / "sound.onnx", tmp_path / "faulty.onnx"]
    write_model(graphs[0], None)
    write_model(graphs[1], _FAULTY)
    assert graphs[0].with_suffix(".bin").stat().st_size > 1 << 31
    plain, found = (
        subprocess.run([sys.executable, "-c", code, *map(str, graphs)], capture_output=True, text=True, check=True)
        for code in (_PLAIN, _BISECT)
    )
    named, peak = json.loads(found.stdout)
    assert named == [f"blocks.{_FAULTY}.fc"]
    assert peak <= 1.3 * int(plain.stdout)
