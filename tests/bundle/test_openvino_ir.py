"""Networks of OpenVINO are read as data; what would make it read elsewhere is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlm_export.bundle.manifest import is_ir
from vlm_export.bundle.openvino_ir import check_ir, constant_digests, data_file, read_ir
from vlm_export.errors import InputError

CONSTANT = '<data element_type="f32" shape="2, 3" offset="8" size="24"/>'
LAYER = f'<layer id="1" name="weight" type="Const" version="opset1">{CONSTANT}</layer>'


def network(root: Path, layers: str = LAYER, start: str = '<?xml version="1.0"?>') -> Path:
    (root / "m.xml").write_text(f'{start}<net name="m" version="11"><layers>{layers}</layers></net>', encoding="utf-8")
    (root / "m.bin").write_bytes(bytes(8) + np.arange(6, dtype=np.float32).tobytes())
    return root


def test_constants_and_their_digests(tmp_path: Path) -> None:
    scalar = '<layer id="2" name="weight" type="Const" version="opset1">'
    scalar += '<data element_type="i64" shape="" offset="0" size="8"/></layer>'
    root = network(
        tmp_path, LAYER + scalar + '<layer id="3" name="x" type="Add" version="opset1"><data a="b"/></layer>'
    )
    check_ir(root, "m.xml", {"m.bin": 32})
    first, second = read_ir(root, "m.xml")
    assert (first.name, first.data_type, first.shape, first.offset, first.size_bytes) == ("weight", 1, (2, 3), 8, 24)
    # Names that OpenVINO gives twice become two.
    assert (second.data_type, second.shape) == (7, ())
    assert second.name != first.name
    digests = constant_digests(root, "m.xml", read_ir(root, "m.xml"))
    assert set(digests) == {first.name, second.name}
    changed = bytearray((root / "m.bin").read_bytes())
    changed[31] ^= 1
    (root / "m.bin").write_bytes(changed)
    assert {
        name
        for name, digest in constant_digests(root, "m.xml", read_ir(root, "m.xml")).items()
        if digests[name] != digest
    } == {"weight"}


def test_names_of_files() -> None:
    assert data_file("openvino/text_model.xml") == "openvino/text_model.bin"
    assert is_ir(Path("a") / "m.xml")
    assert not is_ir("m.onnx")


@pytest.mark.parametrize(
    ("layers", "start"),
    [
        (LAYER.replace('size="24"', 'size="20"'), ""),  # does not hold its shape
        (LAYER.replace('offset="8"', 'offset="-8"'), ""),
        (LAYER.replace('offset="8"', 'offset="1e3"'), ""),
        (LAYER.replace("f32", "f31"), ""),
        ("<layer>", ""),  # ends before it begins
        (LAYER, '<!DOCTYPE net SYSTEM "other.xml">'),
        (LAYER, '<!DOCTYPE net [<!ENTITY a "b">]>'),
        ("", "<other/>"),
        (LAYER, '<?xml version="1.0" encoding="UTF-7"?>'),
        (LAYER.replace('"Const"', '"Constant"'), ""),
        (LAYER.replace('"Const"', '"const"'), ""),
        (LAYER.replace('"Const"', '"Relu"'), ""),  # with values
        (LAYER.replace(CONSTANT, ""), ""),  # without them
        # Behind another layer within it, the constant's values are still its own.
        (LAYER.replace(CONSTANT, f'<layer version="opset1"/>{CONSTANT}').replace('"8"', '"1e3"'), ""),
    ],
)
def test_what_is_no_network(tmp_path: Path, layers: str, start: str) -> None:
    with pytest.raises(InputError, match=r"no network of OpenVINO|that OpenVINO itself does not have"):
        check_ir(network(tmp_path, layers, start), "m.xml", {"m.bin": 32})


def test_operators_of_extensions(tmp_path: Path) -> None:
    layers = '<layer id="1" name="x" type="Mine" version="extension"/>'
    with pytest.raises(InputError, match="operator 'Mine'"):
        check_ir(network(tmp_path, layers), "m.xml", {"m.bin": 32})


def test_data_files(tmp_path: Path) -> None:
    """Of the file of the same name only, and not beyond its end."""
    root = network(tmp_path)
    for listed in ({}, {"other.bin": 32}, {"m.bin": 32, "other.bin": 32}):
        with pytest.raises(InputError, match="another data file"):
            check_ir(root, "m.xml", listed)
    with pytest.raises(InputError, match="does not fit its data file"):
        check_ir(root, "m.xml", {"m.bin": 31})
    (root / "m.xml").write_bytes(b"")
    with pytest.raises(InputError, match="no network"):
        check_ir(root, "m.xml", {"m.bin": 32})
