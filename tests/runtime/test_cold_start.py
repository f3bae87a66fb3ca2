"""The earliest result: weights that are mapped and compared by size, and what a first embedding does not import."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError

# The tiny bundle is written anew with onnx, which the environment without torch lacks.
pytestmark = pytest.mark.needs_torch
IDS = [[1, 2, 524], [1, 7, 524]]
DATA = "onnx/text_model.onnx_data"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, relist: Callable[[Path], None]) -> Path:
    """The tiny bundle with the weights of its text part in a file of their own."""
    import onnx

    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "pair"))
    with_data_file(folder, "text", onnx.load(folder / "onnx" / "text_model.onnx"), relist)
    return folder


def with_data_file(bundle: Path, part: str, model: Any, relist: Callable[[Path], None]) -> Path:
    """Makes a graph that of a part, with its weights in a file of their own, which is returned."""
    import onnx

    graph, data = f"onnx/{part}_model.onnx", f"onnx/{part}_model.onnx_data"
    onnx.save_model(model, bundle / graph, save_as_external_data=True, location=Path(data).name, size_threshold=1024)
    manifest = json.loads((bundle / "vlm_export.json").read_text())
    (record,) = (record for record in manifest["parts"] if record["name"] == part)
    record["variants"][0]["external_data"] = [data]
    manifest["files"][data] = {"size_bytes": 0, "sha256": "0" * 64}
    (bundle / "vlm_export.json").write_text(json.dumps(manifest))
    relist(bundle)
    return bundle / data


def changed(path: Path) -> None:
    """Another byte, and the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_mapped_weights_give_the_same_vectors(bundle: Path, tiny_model: Model) -> None:
    model = load(bundle, threads=1, weights="mapped")
    for again in (model, pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(again.encode_ids(IDS), tiny_model.encode_ids(IDS), atol=1e-6)


HELD = """
import json, sys
import numpy as np
import onnxruntime
from vlm_export import load
from vlm_export.bundle.memory import anonymous_bytes
before = anonymous_bytes()
model = load(sys.argv[1], threads=1, weights=sys.argv[2])
model.session.engine("vision")
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells what a process holds")
def test_mapped_weights_are_not_copied(tiny_bundle: Path, tmp_path: Path, relist: Callable[[Path], None]) -> None:
    from onnx import TensorProto, helper, numpy_helper

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "heavy"))
    draw, sizes = np.random.default_rng(0), (3 * 24 * 24, 6000, 12)
    weights = [
        numpy_helper.from_array(draw.standard_normal(shape, dtype=np.float32), f"w{number}")
        for number, shape in enumerate(pairwise(sizes))
    ]
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w0"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w1"], ["image_embeds"]),
    ]
    shapes: dict[str, list[str | int | None]] = {"pixel_values": ["batch", 3, 24, 24], "image_embeds": ["batch", 12]}
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "vision", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = with_data_file(bundle, "vision", model, relist)
    held = {
        how: int(subprocess.run([sys.executable, "-c", HELD, bundle, how], check=True, stdout=subprocess.PIPE).stdout)
        for how in ("packed", "mapped")
    }
    assert held["mapped"] < 0.1 * data.stat().st_size
    assert held["packed"] > 0.9 * data.stat().st_size


def test_weights_are_compared_by_size_where_it_is_asked_for(bundle: Path) -> None:
    changed(bundle / DATA)
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1).encode_ids(IDS)
    model = load(bundle, threads=1, verify="size")
    for again in (model, pickle.loads(pickle.dumps(model))):
        assert again.encode_ids(IDS).shape[0] == 2
    with (bundle / DATA).open("ab") as file:
        file.write(b"0")
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1, verify="size").encode_ids(IDS)


def test_a_graph_is_compared_whole_in_any_case(bundle: Path) -> None:
    changed(bundle / "onnx" / "text_model.onnx")
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1, verify="size").encode_ids(IDS)


@pytest.mark.parametrize("option", [{"verify": "no"}, {"weights": "paked"}])
def test_unknown_words_are_refused(bundle: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"full or by size|weights cannot be"):
        load(bundle, **option)


def test_a_first_embedding_imports_no_bar(bundle: Path) -> None:
    code = (
        "import sys; from vlm_export import load\n"
        f"load({str(bundle)!r}, threads=1).encode_ids({IDS!r})\n"
        "assert not {'tqdm', 'torch', 'onnx', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
