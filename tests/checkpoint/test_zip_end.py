"""The end of a zip archive: one directory for every reader, or none."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlm_export.checkpoint.formats.zipcheck import check_zip, find_central_directory
from vlm_export.checkpoint.seen_file import see_file

Refusal = Callable[..., str]
END, LOCATOR, RECORD = 22, 20, 56


def members(parts: dict[str, bytes], base: int) -> tuple[bytes, bytes]:
    """Stored members that begin at byte `base` of the file, and their central directory."""
    body, directory = b"", b""
    for name, raw in parts.items():
        offset, sizes = base + len(body), struct.pack("<III", zlib.crc32(raw), len(raw), len(raw))
        lengths = struct.pack("<HH", len(name), 0)
        body += b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 0, 0, 0) + sizes + lengths + name.encode() + raw
        directory += b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 0) + sizes + lengths
        directory += struct.pack("<HHHII", 0, 0, 0, 0, offset) + name.encode()
    return body, directory


def record(directory: bytes, offset: int, count: int) -> bytes:
    return b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), offset)


def locator(offset: int) -> bytes:
    return b"PK\6\7" + struct.pack("<IQI", 0, offset, 1)


END_OF_ZIP64 = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def test_two_directories(tmp_path: Path, refusal: Refusal) -> None:
    """zipfile reads the record before the locator; torch reads the one that the locator points to, in a member."""
    hidden, hidden_directory = members({"a/data.pkl": b"hidden", "a/version": b"3\n"}, 30 + len("a/pad"))
    start = 30 + len("a/pad") + len(hidden)
    pad = hidden + hidden_directory + record(hidden_directory, start, 2)
    body, directory = members({"a/pad": pad, "a/data.pkl": b"shown"}, 0)
    shown = body + directory + record(directory, len(body), 2)
    path = tmp_path / "x.pt"
    path.write_bytes(shown + locator(start + len(hidden_directory)) + END_OF_ZIP64)
    assert torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") == b"hidden"
    assert "does not point to the record before it" in refusal(path)
    path.write_bytes(shown + locator(len(body) + len(directory)) + END_OF_ZIP64)
    assert check_zip(see_file(path)).read("data.pkl", 100) == b"shown"


@pytest.mark.parametrize("zip64", [False, True])
def test_what_torch_and_zipfile_write(tmp_path: Path, zip64: bool) -> None:
    path = tmp_path / "x.pt"
    if zip64:
        torch.save({"w": torch.ones(2)}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", b"c")
    raw = path.read_bytes()
    assert (raw[-END - LOCATOR :][:4] == b"PK\6\7") is zip64
    found = find_central_directory(io.BytesIO(raw))
    with zipfile.ZipFile(path) as archive:
        assert (found.members, found.offset) == (len(archive.infolist()), archive.start_dir)


def changed(raw: bytes, end: int, layout: str, value: int) -> bytes:
    """The bytes with the number that stands `end` bytes before their end replaced."""
    size = struct.calcsize(layout)
    return raw[:-end] + struct.pack(layout, value) + raw[len(raw) - end + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + b"\0",
        lambda raw: raw[:-1],
        lambda raw: raw[:30],
        lambda raw: b"",
        lambda raw: changed(raw, 2, "<H", 1) + b"c",
        lambda raw: changed(raw, END - 4, "<H", 1),
        lambda raw: changed(raw, END - 8, "<H", 1),
        lambda raw: changed(raw, END - 12, "<I", 1),
        lambda raw: changed(raw, END - 16, "<I", 1),
        lambda raw: changed(raw, END + LOCATOR - 4, "<I", 1),
        lambda raw: changed(raw, END + LOCATOR - 8, "<Q", 0),
        lambda raw: changed(raw, END + LOCATOR - 16, "<I", 2),
        lambda raw: changed(raw, END + LOCATOR, "<I", 0),
        lambda raw: changed(raw, END + LOCATOR + RECORD, "<I", 0),
        lambda raw: changed(raw, END + LOCATOR + RECORD - 4, "<Q", 45),
        lambda raw: changed(raw, END + LOCATOR + RECORD - 24, "<Q", 1),
        lambda raw: changed(raw, END + LOCATOR + RECORD - 40, "<Q", 1),
        lambda raw: changed(raw, END + LOCATOR + RECORD - 48, "<Q", 1),
        lambda raw: raw[: -END - LOCATOR - RECORD] + b"\0" + raw[-END - LOCATOR - RECORD :],
        lambda raw: raw[: -END - LOCATOR] + b"\0" + raw[-END - LOCATOR :],
        lambda raw: raw[:-END] + b"\0" + raw[-END:],
        lambda raw: b"\0" + raw,
    ],
)
def test_any_other_layout(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"it|too short"):
        find_central_directory(io.BytesIO(change(path.read_bytes())))
