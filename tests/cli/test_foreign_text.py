"""What untrusted files and arguments say never moves a terminal's cursor, and never forges a line of ours."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from vlm_export.text_display import escaped_json, shown, shown_lines

Cli = Callable[..., Any]
FORGED = "vlm-export: all good"
HOSTILE = f"\x1b]0;pwned\x07\x1b[2J\n{FORGED}\r\x9b31m\u202eolleh\u200b\u2028\x7f"


def assert_harmless(text: str) -> None:
    hidden = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not hidden, ascii(text)
    assert not [line for line in text.split("\n") if line.startswith(FORGED)], text


@pytest.fixture
def harmless(cli: Cli) -> Cli:
    """Runs a command; nothing that it prints is obeyed by a terminal."""

    def run(*arguments: object) -> Any:
        result = cli(*arguments)
        assert_harmless(result.out)
        assert_harmless(result.err)
        assert result.status != 70, result.err
        return result

    return run


def test_hidden_characters_become_escapes() -> None:
    assert shown("caf\u00e9 \u732b \U0001f600") == "caf\u00e9 \u732b \U0001f600"
    assert shown("a\x1b\n\x9b\u202e\udce9") == "a\\x1b\\n\\x9b\\u202e\\udce9"
    assert shown("x" * 300) == "x" * 200 + "…"
    assert shown_lines("a\nb\x1b\t") == "a\nb\\x1b\\t"
    data = {"\x9b\u202e": "\U000e0041\x7f\n\u00e9"}
    document = escaped_json(json.dumps(data, ensure_ascii=False))
    assert json.loads(document) == data
    assert_harmless(document)


def safetensors_with_key(path: Path) -> None:
    header = json.dumps({HOSTILE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def safetensors_with_dtype(path: Path) -> None:
    header = json.dumps({"a": {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def archive_with_global(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02c" + b"x\x1b[2Jy\nz\x1b[31m\n.")
        archive.writestr("a/data/0", bytes(48))


def archive_with_key(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({HOSTILE: None}, protocol=2))
        archive.writestr("a/data/0", bytes(48))


def archive_with_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr(f"a/{HOSTILE}", bytes(48))


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (safetensors_with_key, ".safetensors"),
        (safetensors_with_dtype, ".safetensors"),
        (archive_with_global, ".pth"),
        (archive_with_key, ".pth"),
        (archive_with_member, ".pth"),
    ],
)
def test_checkpoints(harmless: Cli, tmp_path: Path, write: Callable[[Path], None], suffix: str) -> None:
    for name in ("model", HOSTILE):
        path = tmp_path / f"{name}{suffix}"
        write(path)
        for options in ((), ("--json",)):
            assert harmless("inspect", path, *options).status == 3
        assert harmless("export", path, "-o", tmp_path / HOSTILE, "--quiet").status == 3


def test_config_of_a_directory(harmless: Cli, tmp_path: Path) -> None:
    safetensors_with_key(tmp_path / "model.safetensors")
    for config in ({"model_type": HOSTILE}, {"model_type": "clip", "vision_config": HOSTILE, "text_config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert harmless("inspect", tmp_path).status in (2, 3)


def test_arguments_and_names_of_images(harmless: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = Path(shutil.copy(image_path, folder / f"{HOSTILE}.png"))
    vectors = tmp_path / "x.npy"
    assert harmless("classify", pair, image, HOSTILE, "cat", "--truncate").status == 0
    data = harmless("classify", pair, image, HOSTILE, "cat", "--truncate", "--json").data
    assert {entry["label"] for entry in data["labels"]} == {HOSTILE, "cat"}
    assert harmless("embed", pair, folder, "-o", vectors).status == 0
    assert FORGED in harmless("search", pair, vectors, "cat").out
    for verb in (
        ("search", pair, f"{HOSTILE}.npy", "cat"),
        ("embed", pair, HOSTILE, "-o", tmp_path / "y.npy"),
        ("inspect", HOSTILE),
        ("inspect", pair, f"--{HOSTILE}"),
        ("classify", HOSTILE, image, "cat"),
        ("verify", pair, "--source", HOSTILE),
        (HOSTILE,),
    ):
        assert harmless(*verb).status in (2, 3)


def hostile_graph(path: Path) -> Path:
    """Every name of a model: graph, nodes, tensors, axes, operators, domains, producer, weights."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Relu", [HOSTILE], ["y"], name=HOSTILE),
        helper.make_node(HOSTILE, ["y"], [f"{HOSTILE}2"], name=f"{HOSTILE}2", domain=HOSTILE),
        helper.make_node("Add", ["y", f"{HOSTILE}w"], ["z"], name=f"{HOSTILE}3"),
    ]
    graph = helper.make_graph(
        nodes,
        HOSTILE,
        [value(HOSTILE, TensorProto.FLOAT, [HOSTILE, 2])],
        [value("z", TensorProto.FLOAT, [HOSTILE, 2]), value(f"{HOSTILE}2", TensorProto.FLOAT, None)],
        initializer=[helper.make_tensor(f"{HOSTILE}w", TensorProto.FLOAT, [2], [1.0, 2.0])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(HOSTILE, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, producer_name=HOSTILE), str(path))
    return path


def test_graph_verbs(harmless: Cli, tmp_path: Path) -> None:
    model = hostile_graph(tmp_path / f"{HOSTILE}.onnx")
    out = tmp_path / "out.onnx"
    assert harmless("graph", "show", model).status == 0
    assert harmless("graph", "find", model, "Relu -> *").status == 0
    for verb in (
        ("graph", "check", model),
        ("graph", "find", model, HOSTILE),
        ("graph", "verify", model, model),
        ("graph", "store", model, "-o", out, "--verify"),
        ("graph", "split", model, "--at", HOSTILE, "-o", out, "--second", tmp_path / "second.onnx"),
        ("graph", "rename", model, HOSTILE, f"{HOSTILE}x", "-o", out, "--overwrite"),
        ("graph", "apply", model, tmp_path / HOSTILE, "-o", out),
        ("graph", "show", tmp_path / HOSTILE),
    ):
        harmless(*verb)


def failing_graph(path: Path) -> None:
    """A text part that ONNX Runtime loads and fails to run, in a node with a hostile name."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], name=HOSTILE),
        helper.make_node("ReduceMean", ["rows"], ["text_embeds"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [value("text_embeds", TensorProto.FLOAT, ["batch", 12])],
        initializer=[helper.make_tensor("table", TensorProto.FLOAT, [1, 12], [1.0] * 12)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def test_the_engines_own_log(spawn: Cli, pair: Path, tmp_path: Path, relist: Cli) -> None:
    """ONNX Runtime logs node names to the process's stderr, past Python's streams."""
    failing_graph(pair / "onnx" / "text_model.onnx")
    relist(pair)
    (tmp_path / "t.txt").write_text("a cat\n", encoding="utf-8")
    result = spawn("embed", pair, tmp_path / "t.txt", "-o", tmp_path / "x.npy", "--quiet")
    assert result.status == 3
    assert_harmless(result.err)
    assert result.err.count("vlm-export: ") - result.err.count(FORGED) == 1
