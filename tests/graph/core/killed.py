"""Graph writing, killed or interrupted at each file operation: every graph is old or new, with its own weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.bundle.staging import staging
from vlm_export.cli.main import main
from vlm_export.errors import EnvironmentFailure, UsageError
from vlm_export.graph.core.files import Storage, open_model, save_model, save_models

INLINE, EXTERNAL = Storage(external=False), Storage(external=True)
SHARDS = Storage(external=True, shard_bytes=2000)
SIZE = 20


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; only a lost machine does, and syncing is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def model_of(generation: int) -> ir.Model:
    """Adds its number twice, from two matrices that hold it, and says it as the graph's name."""
    matrix = np.full((SIZE, SIZE), generation, np.float32)
    x = ir.val("x", ir.DataType.FLOAT, [SIZE, SIZE])
    weights = [ir.Value(name=f"w{i}", const_value=ir.tensor(matrix + 0), shape=x.shape, type=x.type) for i in range(2)]
    first = ir.node("Add", [x, weights[0]], num_outputs=1)
    second = ir.node("Add", [first.outputs[0], weights[1]], num_outputs=1)
    (y,) = second.outputs
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x], [y], nodes=[first, second], initializers=weights, name=f"g{generation}", opset_imports={"": 18}
    )
    return ir.Model(graph, ir_version=10)


def generation_of(path: Path) -> int:
    """What a stranger reads: onnx's loader finishes nothing, and refuses hard links, as ONNX Runtime does."""
    proto = onnx.load(path)
    generation = int(proto.graph.name[1:])
    for tensor in proto.graph.initializer:
        assert (onnx.numpy_helper.to_array(tensor) == generation).all()
    return generation


@pytest.mark.parametrize(
    ("old", "new"),
    [(INLINE, INLINE), (EXTERNAL, EXTERNAL), (INLINE, EXTERNAL), (EXTERNAL, INLINE), (EXTERNAL, SHARDS)],
    ids=["one file", "external", "to external", "to one file", "to shards"],
)
def test_killed_while_replacing(harness: ModuleType, tmp_path: Path, old: Storage, new: Storage) -> None:
    path, seen = tmp_path / "out" / "m.onnx", list[int]()
    path.parent.mkdir()
    save_model(model_of(1), path, storage=old)

    def write() -> None:
        save_model(model_of(2), path, storage=new, overwrite=True)

    killed = harness.kill_and_repeat_at_each_step(path.parent, write, lambda: seen.append(generation_of(path)), write)
    assert killed > 5
    # Of each child: what the kill left, and what the next run made of it.
    assert seen[1::2] == [2] * (killed + 1)
    assert seen[0::2] == sorted(seen[0::2])
    assert seen[0] == 1


@pytest.mark.parametrize("storage", [INLINE, EXTERNAL], ids=["one file", "external"])
def test_killed_while_writing_anew(harness: ModuleType, tmp_path: Path, storage: Storage) -> None:
    """The next run needs no --overwrite, unless the killed one had put the graph in place."""
    path, there = tmp_path / "out" / "m.onnx", list[bool]()
    path.parent.mkdir()

    def check() -> None:
        there.append(path.exists())
        assert not there[-1] or generation_of(path) == 1

    def write() -> None:
        save_model(model_of(1), path, storage=storage)

    def repeat() -> None:
        try:
            write()
        except UsageError:
            assert there[-1]
            save_model(model_of(1), path, storage=storage, overwrite=True)

    assert harness.kill_and_repeat_at_each_step(path.parent, write, check, repeat) > 5
    assert all(there[1::2])
    assert there[0::2] == sorted(there[0::2])


@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "anew"])
def test_killed_while_writing_two(harness: ModuleType, tmp_path: Path, exists: bool) -> None:
    """As `split` does: each graph is whole at once, and both are of one run when this project reads them."""
    paths, seen = [tmp_path / "out" / name for name in ("1.onnx", "2.onnx")], list[int]()
    paths[0].parent.mkdir()
    if exists:
        save_models([(model_of(1), path) for path in paths], storage=EXTERNAL)

    def check() -> None:
        assert all(generation_of(path) in (1, 2) for path in paths if path.exists())
        for path in paths:
            if path.exists():
                open_model(path)
        found = {generation_of(path) if path.exists() else 0 for path in paths}
        assert len(found) == 1
        seen.extend(found)

    def write() -> None:
        save_models([(model_of(2), path) for path in paths], storage=EXTERNAL, overwrite=exists)

    def repeat() -> None:
        try:
            write()
        except UsageError:
            assert not exists
            assert seen[-1] == 2
            save_models([(model_of(2), path) for path in paths], storage=EXTERNAL, overwrite=True)

    assert harness.kill_and_repeat_at_each_step(paths[0].parent, write, check, repeat) > 10
    assert set(seen[0::2]) == {int(exists), 2}
    assert set(seen[1::2]) == {2}


def test_naive_renames_would_be_caught(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: weights that are replaced under the graph that reads them."""
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    save_model(model_of(1), path, storage=EXTERNAL)
    monkeypatch.setattr("vlm_export.graph.core.transaction_files.evasive_name", lambda staged, target: None)

    def write() -> None:
        save_model(model_of(2), path, storage=EXTERNAL, overwrite=True)

    with pytest.raises(AssertionError):
        harness.kill_and_repeat_at_each_step(path.parent, write, lambda: generation_of(path), write)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupted_verb_says_what_it_did(harness: ModuleType, tmp_path: Path, number: signal.Signals) -> None:
    path, source, seen = tmp_path / "out" / "m.onnx", tmp_path / "source.onnx", list[tuple[int, int]]()
    path.parent.mkdir()
    save_model(model_of(1), path, storage=EXTERNAL)
    save_model(model_of(2), source)

    def check(status: int) -> None:
        seen.append((status, generation_of(path)))
        save_model(model_of(1), path, storage=EXTERNAL, overwrite=True)
        assert sorted(os.listdir(path.parent)) == ["m.onnx", "m.onnx_data"]

    command = ["graph", "store", str(source), "-o", str(path), "--external", "--overwrite", "--quiet"]
    assert harness.interrupt_at_each_step(lambda: main(command), check, number) > 10
    assert set(seen) == {(130, 1), (0, 2)}


def test_what_is_being_written_is_not_swept(harness: ModuleType, tmp_path: Path) -> None:
    """A verb's staged files, while another verb and an embedding are written beside them."""
    target = tmp_path / "m.onnx"

    def hold(ready: Callable[[], None]) -> None:
        with staging(target) as staged:
            staged.path.mkdir()
            (staged.path / "half").write_bytes(b"half")
            ready()
            os.read(os.pipe()[0], 1)

    with harness.running(hold) as pid:
        save_model(model_of(3), tmp_path / "n.onnx", storage=EXTERNAL)
        (staged,) = tmp_path.glob(f".m.onnx.vlm-export-{pid}-*.tmp")
        assert (staged / "half").read_bytes() == b"half"
        with pytest.raises(EnvironmentFailure, match=f"held by process {pid}"):
            save_model(model_of(3), target)
    save_model(model_of(3), tmp_path / "k.onnx")
    assert sorted(os.listdir(tmp_path)) == ["k.onnx", "n.onnx", "n.onnx_data"]


def test_what_only_has_the_name_of_a_commit_stays(tmp_path: Path) -> None:
    commit = tmp_path / ".m.onnx.vlm-export.commit"
    (commit / "1").mkdir(parents=True)
    (commit / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="get for a moment"):
        save_model(model_of(1), tmp_path / "m.onnx")
    save_model(model_of(1), tmp_path / "n.onnx")
    open_model(tmp_path / "n.onnx")
    assert (commit / "thesis.tex").read_text() == "years of work"
