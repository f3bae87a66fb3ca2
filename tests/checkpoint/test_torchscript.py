"""TorchScript archives written to mislead: foreign globals, tensors outside their storage, structures without end."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.checkpoint.formats.pickle_data import load_pickle_data
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError

Refusal = Callable[..., str]


def test_generic_names_devices_and_nesting(tmp_path: Path, writer: Any) -> None:
    inner = writer.module({"weight": writer.tensor(), "training": b"\x88", "hook": b"N"})
    root = writer.module({"layers": writer.module({"0": inner}), "note": writer.text("x"), "scale": b"G" + bytes(8)})
    raw = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    checkpoint = open_checkpoint(str(writer.archive(tmp_path / "x.pt", root, {"0": raw})))
    assert list(checkpoint.tensors) == ["layers.0.weight"]
    assert checkpoint.read("layers.0.weight").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_transposed_tensor(tmp_path: Path, writer: Any) -> None:
    root = writer.module({"w": writer.tensor(size=b"K\3K\2", stride=b"K\1K\3")})
    raw = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    checkpoint = open_checkpoint(str(writer.archive(tmp_path / "x.pt", root, {"0": raw})))
    assert checkpoint.read("w").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_unaligned_storage(tmp_path: Path, writer: Any) -> None:
    # zipfile does not align members; the names' lengths put the storage at an odd place.
    raw = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    for name in ("0", "00", "000", "0000"):
        root = writer.module({"w": writer.tensor(storage=name)})
        checkpoint = open_checkpoint(str(writer.archive(tmp_path / f"{name}.pt", root, {name: raw}, aligned=False)))
        assert checkpoint.read("w").flatten().tolist() == list(range(6))


def test_empty_tensor(tmp_path: Path, writer: Any) -> None:
    root = writer.module({"w": writer.tensor(size=b"K\0K\3")})
    assert open_checkpoint(str(writer.archive(tmp_path / "x.pt", root))).read("w").shape == (0, 3)


@pytest.mark.parametrize(
    "name",
    ["posix\nsystem", "builtins\neval", "builtins\ngetattr", "torch\nload", "torch.hub\nload", "torch._utils\nx",
     "torch.jit._pickle\nx", "__torch__x\nNode", "os.__torch__\nNode", "collections\nCounter"],
)  # fmt: skip
def test_foreign_globals_are_named(tmp_path: Path, writer: Any, name: str, refusal: Refusal) -> None:
    module, _, attribute = name.partition("\n")
    root = writer.module({"w": writer.tensor(), "x": b"c" + name.encode() + b"\n"})
    message = refusal(writer.archive(tmp_path / "x.pt", root))
    assert f"global {module}.{attribute}" in message


@pytest.mark.parametrize(
    "tensor",
    [
        {"elements": 7},
        {"elements": 1 << 29},
        {"size": b"K\3K\3"},
        {"stride": b"K\4K\1"},
        {"stride": b"K\0K\0", "size": b"M\xff\xffM\xff\xff"},
        {"stride": b"J\xff\xff\xff\xffK\1"},
        {"size": b"J\xff\xff\xff\xffK\3"},
        {"size": b"K\6"},
        {"size": b"\x8a\x07\xff\xff\xff\xff\xff\xff\x7fK\3"},
        {"size": b"K\1" * 17, "stride": b"K\1" * 17},
        {"size": b"\x88K\3"},
        {"size": b"NK\3"},
        {"storage": "1"},
        {"storage": "../constants.pkl"},
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, writer: Any, tensor: dict[str, Any], refusal: Refusal) -> None:
    root = writer.module({"w": writer.tensor(**tensor)})
    assert "tensor w" in refusal(writer.archive(tmp_path / "x.pt", root))


def test_module_that_contains_itself(tmp_path: Path, writer: Any, refusal: Refusal) -> None:
    root = b"c__torch__\nNode\n)\x81q\0}(" + writer.text("me") + b"h\0" + writer.text("w") + writer.tensor() + b"ub"
    assert "without end" in refusal(writer.archive(tmp_path / "x.pt", root))


def test_module_shared_exponentially(tmp_path: Path, writer: Any, refusal: Refusal) -> None:
    # Each level refers twice to the level below: 2**60 paths from 60 objects.
    opcodes = writer.module({"w": writer.tensor()}) + b"q\0"
    for level in range(60):
        below = b"h" + bytes([level])
        opcodes += b"c__torch__\nNode\n)\x81}(" + writer.text("a") + below + writer.text("b") + below + b"ubq"
        opcodes += bytes([level + 1])
    assert "archive" in refusal(writer.archive(tmp_path / "x.pt", opcodes))


def test_many_names_for_the_same_bytes(tmp_path: Path, writer: Any, refusal: Refusal) -> None:
    elements = 1 << 18
    tensor = writer.tensor(elements=elements, size=b"J" + elements.to_bytes(4, "little"), stride=b"K\1")
    root = writer.module({f"w{i}": tensor for i in range(10)})
    path = writer.archive(tmp_path / "x.pt", root, {"0": bytes(4 * elements)})
    assert "same bytes" in refusal(path)


def test_a_name_that_stands_twice(tmp_path: Path, writer: Any, refusal: Refusal) -> None:
    root = writer.module({"a": writer.module({"b": writer.tensor()}), "a.b": writer.tensor()})
    assert "twice" in refusal(writer.archive(tmp_path / "x.pt", root))


@pytest.mark.parametrize(
    "opcodes",
    [b"r\xff\xff\xff\x7f", b"h\x07", b"t", b"0", b"iposix\nsystem\n", b"\x82\x01", b"}(NNu", b"K\1K\1R", b"K\1}b",
     b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\x7fabc", b"", b"((((", b"\x94", b"cposix system\n"],
)  # fmt: skip
def test_damaged_pickles(tmp_path: Path, writer: Any, opcodes: bytes, refusal: Refusal) -> None:
    message = refusal(writer.archive(tmp_path / "x.pt", opcodes))
    assert "fix:" in message or "holds no tensors" in message


def test_big_endian_is_refused(tmp_path: Path, writer: Any, refusal: Refusal) -> None:
    path = writer.archive(tmp_path / "x.pt", writer.module({"w": writer.tensor()}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arch/byteorder", b"big")
    assert "little-endian" in refusal(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_end_in_one_error_type(raw: bytes) -> None:
    with suppress(InputError):
        load_pickle_data(b"\x80\x02" + raw, "test", lambda _: True)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_plain_data_equals_pickles_own_reading(value: Any) -> None:
    assert load_pickle_data(pickle.dumps(value, 2), "test", lambda _: False) == value
