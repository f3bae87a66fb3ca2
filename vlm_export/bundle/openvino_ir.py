"""OpenVINO's own form of a graph: the network as XML (`.xml`), its constants in one file beside it (`.bin`).

Facts: openvinotoolkit/openvino at 2026.4, src/core/src/pass/serialize.cpp (a layer of the type `Const` has `data` with
`element_type`, `shape`, `offset` and `size`; equal constants share their bytes) and src/frontends/ir (the data file has
the name of the network's; no attribute names another file). Layers of OpenVINO's own operator sets alone are taken:
those of an extension would need a library that a bundle cannot carry.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.parsers import expat

from vlm_export.bundle.safe_files import opened_real_file
from vlm_export.errors import InputError

_DATA_SUFFIX = ".bin"
_MAX_NETWORK_BYTES = 64 << 20
_SPAN_BYTES = 64 << 20
_SEEN = " seen"  # no name of an attribute
_REFUSE = "do not use this bundle; export the model again"
_OPERATOR_SET = re.compile(r"opset[0-9]{1,3}")
# The element types of constants: the number of ONNX's TensorProto.DataType, and the bits of one value.
_ELEMENTS: Mapping[str, tuple[int, int]] = {
    **{"f32": (1, 32), "u8": (2, 8), "i8": (3, 8), "u16": (4, 16), "i16": (5, 16), "i32": (6, 32), "i64": (7, 64)},
    **{"boolean": (9, 8), "f16": (10, 16), "f64": (11, 64), "u32": (12, 32), "u64": (13, 64), "bf16": (16, 16)},
    **{"u4": (21, 4), "i4": (22, 4)},
}


@dataclass(frozen=True)
class IrConstant:
    """A constant of a network: its name, unique in the file, and where its values lie in the data file."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def data_file(graph: str) -> str:
    """The path of the constants of the graph at a path."""
    return str(PurePosixPath(graph).with_suffix(_DATA_SUFFIX))


def check_ir(root: Path, graph: str, data_sizes: Mapping[str, int]) -> None:
    """Checks that OpenVINO reads no other file for a graph, and of its data file nothing outside of it.

    Args:
        root: the bundle.
        graph: the network's path relative to it.
        data_sizes: path of each data file that the manifest lists for the graph → its size in bytes.

    Raises:
        InputError: no network of OpenVINO, another data file than the one that it reads, a constant that does not fit
            it, or an operator of an extension.
    """
    if set(data_sizes) != {data_file(graph)}:
        got = ", ".join(sorted(data_sizes)) or "none"
        raise InputError(
            "OpenVINO reads another data file for a graph than the manifest lists",
            where=str(root / graph),
            expected=data_file(graph),
            got=got,
            fix=_REFUSE,
        )
    for constant in read_ir(root, graph):
        if constant.offset + constant.size_bytes > data_sizes[data_file(graph)]:
            raise InputError(
                "a constant does not fit its data file",
                where=f"{root / graph}: {constant.name!r:.100}",
                expected=f"at most {data_sizes[data_file(graph)]} bytes, the size of the file",
                got=f"{constant.size_bytes} bytes from {constant.offset} on",
                fix=_REFUSE,
            )


def read_ir(root: Path, graph: str) -> tuple[IrConstant, ...]:
    """The constants of a network, in the order of its file; errors as in `check_ir`."""
    where = str(root / graph)
    with opened_real_file(root, graph) as descriptor, open(descriptor, "rb", closefd=False) as file:
        size = os.fstat(descriptor).st_size
        if not 0 < size <= _MAX_NETWORK_BYTES:
            raise _malformed(where, f"{size} bytes")
        reader = _Reader(where)
        try:
            # In one piece: of pieces, expat reads a long attribute again and again.
            reader.parser.Parse(file.read(), True)
        # ValueError: an encoding that expat does not have.
        except (expat.ExpatError, ValueError) as error:
            raise _malformed(where, str(error)) from error
    return tuple(reader.constants)


def constant_digests(root: Path, graph: str, constants: Sequence[IrConstant]) -> dict[str, str]:
    """Name of a constant → sha256 of its bytes, of those that `read_ir` found in a graph that was checked."""
    with opened_real_file(root, data_file(graph)) as descriptor:
        if not os.fstat(descriptor).st_size:
            return {constant.name: hashlib.sha256().hexdigest() for constant in constants}
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return {constant.name: _digest(view, constant) for constant in constants}


def _digest(view: memoryview, constant: IrConstant) -> str:
    digest, end = hashlib.sha256(), constant.offset + constant.size_bytes
    for start in range(constant.offset, end, _SPAN_BYTES):
        with view[start : min(start + _SPAN_BYTES, end)] as span:
            digest.update(span)
    return digest.hexdigest()


class _Reader:
    """Collects the constants while the file is parsed, and refuses what is no network of OpenVINO."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.constants: list[IrConstant] = []
        self._names: set[str] = set()
        self._depth = 0
        self._layers: list[dict[str, str]] = []
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        if not self._depth and name != "net":
            raise _malformed(self.where, f"an element {name!r:.60}")
        self._depth += 1
        if name == "layer":
            self._layers.append(dict(attributes))
            kind = attributes.get("type", "")
            # OpenVINO knows some names of other case, and ends the process on one without its values.
            if kind != "Const" and kind.lower() in ("const", "constant"):
                raise _malformed(self.where, f"a layer of the type {kind!r}")
            if not _OPERATOR_SET.fullmatch(attributes.get("version", "")):
                raise InputError(
                    f"the graph uses an operator {attributes.get('type', '')!r:.60} that OpenVINO itself does not have",
                    where=self.where,
                    expected="layers of its operator sets, as opset1",
                    got=repr(attributes.get("version", ""))[:60],
                    fix=_REFUSE,
                )
        elif name == "data":
            layer = self._layers[-1] if self._layers else {}
            if layer.get("type") == "Const":
                self.constants.append(self._constant(layer, attributes))
                layer[_SEEN] = "1"
            elif "offset" in attributes:
                raise _malformed(self.where, f"values in a layer of the type {layer.get('type', '')!r:.60}")

    def _end(self, name: str) -> None:
        self._depth -= 1
        if name == "layer":
            layer = self._layers.pop()
            if layer.get("type") == "Const" and _SEEN not in layer:
                raise _malformed(self.where, f"a constant {layer.get('name', '')!r:.60} without values")

    def _refuse_doctype(self, *_: object) -> NoReturn:
        raise _malformed(self.where, "a document type, with which XML can name other files")

    def _constant(self, layer: Mapping[str, str], data: Mapping[str, str]) -> IrConstant:
        name = layer.get("name", "")
        if name in self._names:
            name = f"{name}#{layer.get('id', '')}.{len(self.constants)}"
        self._names.add(name)
        kind, bits = _ELEMENTS.get(data.get("element_type", ""), (0, 0))
        sizes = [size.strip() for size in data.get("shape", "").split(",")]
        shape = tuple(self._number(size) for size in sizes if size)
        offset, size = (self._number(data.get(key, "")) for key in ("offset", "size"))
        if not kind or size != (prod(shape) * bits + 7) // 8:
            got = f"{data.get('element_type', '')} of the shape {list(shape)[:16]} in {size} bytes"
            raise _malformed(self.where, f"a constant {name!r:.60} of {got[:120]}")
        return IrConstant(name, kind, shape, offset, size)

    def _number(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise _malformed(self.where, f"{text!r:.60} where a number is expected")
        return int(text)


def _malformed(where: str, got: str) -> InputError:
    return InputError(
        "a file is no network of OpenVINO",
        where=where,
        expected="XML whose root is 'net', with constants of known types",
        got=got,
        fix=_REFUSE,
    )
