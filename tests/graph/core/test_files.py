"""Models written and read: storage, atomicity, untrusted files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError, UsageError, VlmExportError
from vlm_export.graph.core import files
from vlm_export.graph.core.files import Storage, open_model, save_model, save_models
from vlm_export.graph.edits.io_edits import rename_tensor

SEEDS = range(40)
_EVERYTHING = Storage(external=True, threshold_bytes=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("storage", [Storage(), _EVERYTHING, Storage(external=True, shard_bytes=64, threshold_bytes=4)])
def test_what_is_written_is_read_again(random_graphs: ModuleType, tmp_path: Path, seed: int, storage: Storage) -> None:
    case = random_graphs.random_model(seed)
    before = random_graphs.normal_form(case.model)
    written = save_model(case.model, tmp_path / "m.onnx", storage=storage)
    assert sorted(path.name for path in written) == sorted(os.listdir(tmp_path))
    assert random_graphs.normal_form(case.model) == before
    model = open_model(tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx")
    inline = save_model(model, tmp_path / "again.onnx", storage=Storage(external=False))
    assert len(inline) == 1
    assert random_graphs.normal_form(open_model(inline[0])) == before


def _weighted(count: int = 4, same: bool = False) -> ir.Model:
    """Products by matrices of 64 x 64: 16 KiB each."""
    x, nodes, weights = ir.val("x", ir.DataType.FLOAT, ["N", 64]), list[ir.Node](), list[ir.Value]()
    value, shared = x, ir.tensor(np.eye(64, dtype=np.float32))
    for index in range(count):
        tensor = shared if same else ir.tensor(np.full((64, 64), index, np.float32))
        weights.append(ir.Value(name=f"w{index}", const_value=tensor, shape=ir.Shape([64, 64]), type=x.type))
        node = ir.node("MatMul", [value, weights[-1]], num_outputs=1, name=f"n{index}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"v{index}", x.type, x.shape
        nodes.append(node)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, name="g", opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def test_shards_are_filled_in_order(tmp_path: Path) -> None:
    written = save_model(_weighted(5), tmp_path / "m.onnx", storage=Storage(external=True, shard_bytes=33000))
    assert [path.name for path in written] == ["m.onnx", "m.onnx_data", "m.onnx_data_1", "m.onnx_data_2"]
    assert [path.stat().st_size for path in written[1:]] == [32768, 32768, 16384]


def test_a_shared_tensor_is_written_once_and_stays_shared(tmp_path: Path) -> None:
    written = save_model(_weighted(5, same=True), tmp_path / "m.onnx", storage=Storage(external=True))
    assert written[1].stat().st_size == 16384
    again = save_model(open_model(written[0]), tmp_path / "n.onnx", storage=Storage(external=True))
    assert again[1].stat().st_size == 16384


def test_large_weights_leave_the_graph_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(save_model(_weighted(), tmp_path / "small.onnx")) == 1
    monkeypatch.setattr(files, "DEFAULT_EXTERNAL_BYTES", 1000)
    assert len(save_model(_weighted(), tmp_path / "large.onnx")) == 2
    monkeypatch.setattr(files, "PROTO_LIMIT_BYTES", 10000)
    with pytest.raises(GraphError, match="2 GB"):
        save_model(_weighted(), tmp_path / "huge.onnx", storage=Storage(external=False))
    assert not (tmp_path / "huge.onnx").exists()


def test_a_model_may_replace_its_own_files(tmp_path: Path, random_graphs: ModuleType) -> None:
    path, storage = tmp_path / "m.onnx", Storage(external=True)
    save_model(_weighted(), path, storage=storage)
    model = open_model(path)
    with pytest.raises(UsageError, match="exists"):
        save_model(model, path, storage=storage)
    # Another order and layout of the weights, so that old offsets would read wrong values.
    rename_tensor(model, "w0", "last")
    for _ in range(2):
        save_model(model, path, storage=storage, overwrite=True)
        for name, number in (("last", 0), ("w1", 1), ("w2", 2), ("w3", 3)):
            for holder in (model, open_model(path)):
                tensor = holder.graph.initializers[name].const_value
                assert tensor is not None
                assert (tensor.numpy() == number).all()
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx_data"]
    save_model(model, path, storage=Storage(external=False), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx_data"]
    assert random_graphs.compute(open_model(path), [{"x": np.eye(64, dtype=np.float32)}])[0]["v3"].sum() == 0


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_weights_that_another_model_reads_are_not_replaced(tmp_path: Path) -> None:
    storage = Storage(external=True)
    save_model(_weighted(2), tmp_path / "b.onnx", storage=storage)
    shutil.copy(tmp_path / "b.onnx", tmp_path / "a.onnx")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    before = _files_beside_links(tmp_path)
    model, other = open_model(tmp_path / "a.onnx"), _weighted(3)
    for target in ("b.onnx", "b.onnx_data", "link/b.onnx"):
        with pytest.raises(UsageError, match="weights that an input reads"):
            save_model(model, tmp_path / target, storage=storage, overwrite=True)
        with pytest.raises(UsageError, match="weights that an input reads"):
            save_model(other, tmp_path / target, storage=storage, overwrite=True, opened=[model])
    assert _files_beside_links(tmp_path) == before
    # Its own graph may be replaced together with the weights, by whatever name; so may others' graphs alone.
    save_model(other, tmp_path / "b.onnx", storage=Storage(external=False), overwrite=True, opened=[model])
    save_model(open_model(tmp_path / "a.onnx"), tmp_path / "link" / "a.onnx", storage=storage, overwrite=True)
    assert len(open_model(tmp_path / "a.onnx").graph) == 2


def _files_beside_links(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.is_symlink()}


def test_a_model_written_over_another_place_belongs_there(tmp_path: Path) -> None:
    storage = Storage(external=True)
    for name in ("a.onnx", "b.onnx"):
        save_model(_weighted(2), tmp_path / name, storage=storage)
    model = open_model(tmp_path / "a.onnx")
    save_model(model, tmp_path / "b.onnx", storage=storage, overwrite=True)
    # Its tensors lie in b.onnx_data now.
    save_model(model, tmp_path / "a.onnx", storage=storage, overwrite=True)
    save_model(model, tmp_path / "a.onnx", storage=storage, overwrite=True)
    assert len(_files(tmp_path)) == 4


def test_several_models_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    storage = Storage(external=True)
    pair = [(_weighted(1), tmp_path / "1.onnx"), (_weighted(2), tmp_path / "2.onnx")]
    (tmp_path / "2.onnx_data").write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        save_models(pair, storage=storage)
    (tmp_path / "2.onnx_data").unlink()
    for name in ("1.onnx", "1.onnx_data"):
        with pytest.raises(UsageError, match="same name"):
            save_models([pair[0], (pair[1][0], tmp_path / name)], storage=storage, overwrite=True)
    assert _files(tmp_path) == {}
    written = save_models(pair, storage=storage)
    assert [path.name for path in written] == ["1.onnx", "1.onnx_data", "2.onnx", "2.onnx_data"]
    assert [len(open_model(tmp_path / name).graph) for name in ("1.onnx", "2.onnx")] == [1, 2]
    # The second reads what the first replaces.
    second = open_model(tmp_path / "2.onnx")
    save_models([(_weighted(3), tmp_path / "2.onnx"), (second, tmp_path / "1.onnx")], storage=storage, overwrite=True)
    for model in (second, open_model(tmp_path / "1.onnx")):
        tensor = model.graph.initializers["w1"].const_value
        assert tensor is not None
        assert (tensor.numpy() == 1).all()


@pytest.mark.parametrize("after", range(10))
def test_a_failure_while_writing_two_leaves_both_old_or_both_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    storage = Storage(external=True)
    names = ("1.onnx", "2.onnx")
    save_models([(_weighted(1), tmp_path / name) for name in names], storage=storage)
    old, calls, real = _files(tmp_path), [0], os.replace

    def fails(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    failed = False
    try:
        save_models([(_weighted(3), tmp_path / name) for name in names], storage=storage, overwrite=True)
    except VlmExportError:
        failed = True
    monkeypatch.undo()
    assert calls[0] > after
    assert (_files(tmp_path) == old) == failed
    assert [len(open_model(tmp_path / name).graph) for name in names] == [1 if failed else 3] * 2
    assert sorted(_files(tmp_path)) == sorted(old)


def _metadata(tensor: onnx.TensorProto) -> list[tuple[str, str]]:
    return sorted((entry.key, entry.value) for entry in tensor.metadata_props)


@pytest.mark.parametrize("storage", [Storage(external=False), _EVERYTHING])
def test_metadata_of_tensors_stays_as_it_is(tmp_path: Path, storage: Storage) -> None:
    proto = ir.to_proto(_weighted(2))
    constant = proto.graph.node.add(op_type="Constant", output=["c"]).attribute.add(name="value")
    constant.type = onnx.AttributeProto.TENSOR
    constant.t.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), "c"))
    for tensor in (proto.graph.initializer[0], constant.t):
        tensor.doc_string = "what it is"
        tensor.metadata_props.add(key="scale", value="3")
        tensor.metadata_props.add(key="origin", value="here")
    (tmp_path / "0.onnx").write_bytes(proto.SerializeToString())
    written = [onnx.load(tmp_path / "0.onnx")]
    for number in range(3):
        save_model(open_model(tmp_path / f"{number}.onnx"), tmp_path / f"{number + 1}.onnx", storage=storage)
        written.append(onnx.load(tmp_path / f"{number + 1}.onnx"))
    for saved in written[1:]:
        for before, now in (
            (proto.graph.initializer[0], saved.graph.initializer[0]),
            (constant.t, saved.graph.node[-1].attribute[0].t),
        ):
            assert _metadata(now) == _metadata(before)
            assert now.doc_string == before.doc_string
        assert saved == written[1]


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("after", range(4))
def test_a_failure_while_writing_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    path, storage = tmp_path / "m.onnx", Storage(external=True)
    save_model(_weighted(2), path, storage=storage)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model, calls, real = _weighted(3), [0], getattr(os, name)

    def fails(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == after + 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, fails)
    failed = False
    try:
        save_model(model, path, storage=storage, overwrite=True)
    except VlmExportError:
        failed = True
    monkeypatch.undo()
    found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert (found == old) == failed
    assert len(open_model(path).graph) == (2 if failed else 3)


def test_a_model_of_external_attributes_is_written_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save_model(_weighted(1), tmp_path / "data" / "m.onnx", storage=_EVERYTHING)
    model = open_model(tmp_path / "data" / "m.onnx")
    weight = model.graph.initializers["w0"]
    constant = ir.node("Constant", [], {"value": weight.const_value}, num_outputs=1, name="c")
    model.graph.insert_before(model.graph[0], constant)
    constant.outputs[0].name = "c"
    weight.replace_all_uses_with(constant.outputs[0])
    model.graph.initializers.pop("w0")
    save_model(model, tmp_path / "n.onnx")
    tensor = open_model(tmp_path / "n.onnx").graph[0].attributes["value"].as_tensor()
    assert tensor.numpy().shape == (64, 64)


def _proto(path: Path) -> onnx.ModelProto:
    save_model(_weighted(1), path, storage=Storage(external=True))
    return onnx.load(path, load_external_data=False)


def _entry(proto: onnx.ModelProto, key: str, value: str) -> None:
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value


def _branch(owner: onnx.ModelProto | onnx.FunctionProto) -> onnx.GraphProto:
    """A new graph inside a graph inside a node, in a list of graphs."""
    nodes = owner.graph.node if isinstance(owner, onnx.ModelProto) else owner.node
    outer = nodes.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    inner = outer.g.node.add(op_type="Many", domain="d").attribute.add(name="g", type=onnx.AttributeProto.GRAPHS)
    graph: onnx.GraphProto = inner.graphs.add()
    return graph


def _in_function(proto: onnx.ModelProto) -> onnx.FunctionProto:
    function: onnx.FunctionProto = proto.functions.add(name="f", domain="d")
    return function


def _sparse_constant(proto: onnx.ModelProto) -> None:
    attribute = proto.graph.node.add(op_type="Constant").attribute.add(name="sparse_value")
    attribute.type = onnx.AttributeProto.SPARSE_TENSOR
    attribute.sparse_tensor.SetInParent()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda proto: _entry(proto, "location", "../x"), "outside the model's directory"),
        (lambda proto: _entry(proto, "location", "/etc/hosts"), "outside the model's directory"),
        (lambda proto: _entry(proto, "location", "link"), "outside the model's directory"),
        (lambda proto: _entry(proto, "location", "gone"), "is missing"),
        (lambda proto: _entry(proto, "offset", "4096"), "too short"),
        (lambda proto: _entry(proto, "length", "4096"), "too short"),
        (lambda proto: proto.training_info.add(), "training information cannot be kept"),
        (lambda proto: proto.graph.sparse_initializer.add(), "sparse initializers cannot be kept"),
        (lambda proto: _branch(proto).sparse_initializer.add(), "sparse initializers cannot be kept"),
        (lambda proto: _branch(_in_function(proto)).sparse_initializer.add(), "sparse initializers cannot be kept"),
        (lambda proto: _sparse_constant(proto), "sparse tensors of attributes cannot be kept"),
        (lambda proto: proto.graph.output[0].type.map_type.SetInParent(), "Map types are not supported"),
        (lambda proto: proto.graph.node.append(proto.graph.node[0]), "is made twice"),
    ],
)
def test_bad_models_are_named(tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x").write_bytes(bytes(1 << 16))
    (folder / "link").symlink_to(tmp_path / "x")
    proto = _proto(folder / "m.onnx")
    spoil(proto)
    (folder / "bad.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError) as caught:
        open_model(folder / "bad.onnx")
    assert re.search(message, str(caught.value))
    assert "contribut" not in str(caught.value)
    assert ("malformed" in str(caught.value)) == (message == "malformed")


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"version https://git-lfs", b"\x00" * 100])
def test_other_files_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"no graph|not an ONNX model"):
        open_model(tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="does not exist"):
        open_model(tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="directory does not exist"):
        save_model(_weighted(1), tmp_path / "no" / "m.onnx")
