"""Zip archives checked before anything in them is loaded: their end, names, sizes, compression, overlaps.

A member is found through its central directory entry, and its bytes through its local header; both must agree with
the file's real size, so that no later reader follows an offset or allocates a size that the file does not have.

Readers differ in how they look for the central directory: by a search, by its stated place, by the zip64 locator. An
archive that leaves any choice could show one directory to the check and another one to a later reader. So the records
must stand without gaps at the very end of the file and agree: directory, [zip64 record, zip64 locator], end record.
Format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.14 to 4.3.16.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from vlm_export.checkpoint.formats.identify import ZIP_MAGIC
from vlm_export.checkpoint.seen_file import SeenFile
from vlm_export.errors import InputError
from vlm_export.machine_faults import machine_fault

_END = struct.Struct("<4sHHHHIIH")
_END_MAGIC = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sIQI")
_LOCATOR_MAGIC = b"PK\x06\x07"
_RECORD = struct.Struct("<4sQHHIIQQQQ")
_RECORD_MAGIC = b"PK\x06\x06"
# A record states its size without its first two fields.
_RECORD_STATED_BYTES = _RECORD.size - 12
# What the end record holds where a number stands in the zip64 record instead: count, size, offset.
_IN_ZIP64 = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 16 << 20
# torch stores tensors uncompressed; only the code of a TorchScript archive is deflated, and it is small text.
MAX_INFLATED_BYTES = 64 << 20
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class CentralDirectory:
    """Where the central directory lies, and how many members it lists."""

    members: int
    size_bytes: int
    offset: int


def find_central_directory(file: BinaryIO) -> CentralDirectory:
    """The archive's one central directory; ValueError when it is cut off or could be read in another way."""
    file_bytes = file.seek(0, os.SEEK_END)
    if file_bytes < _END.size:
        raise ValueError("too short for a zip archive")
    position = file_bytes - _END.size
    magic, disk, first_disk, on_disk, *stated, comment_bytes = _unpack(file, _END, position)
    if magic != _END_MAGIC or comment_bytes != 0:
        raise ValueError("it does not end with the end of a central directory")
    if (disk, first_disk, on_disk) != (0, 0, stated[0]):
        raise ValueError("it is one of several parts")
    found = CentralDirectory(*stated)
    if position >= _LOCATOR.size and _unpack(file, _LOCATOR, position - _LOCATOR.size)[0] == _LOCATOR_MAGIC:
        position -= _LOCATOR.size + _RECORD.size
        found = _from_zip64(file, position)
        zip64 = (found.members, found.size_bytes, found.offset)
        if any(number not in pair for number, *pair in zip(stated, zip64, _IN_ZIP64, strict=True)):
            raise ValueError("its two ends of the central directory disagree")
    if found.offset + found.size_bytes != position:
        raise ValueError("its central directory does not end where the records after it begin")
    return found


def _from_zip64(file: BinaryIO, position: int) -> CentralDirectory:
    """What the record at `position` states, which must be the one that the locator behind it points to."""
    if position < 0:
        raise ValueError("too short for a zip64 archive")
    magic, size_bytes, _, _, disk, first_disk, on_disk, *stated = _unpack(file, _RECORD, position)
    _, locator_disk, located, disks = _unpack(file, _LOCATOR, position + _RECORD.size)
    if magic != _RECORD_MAGIC or size_bytes != _RECORD_STATED_BYTES or located != position:
        raise ValueError("its zip64 locator does not point to the record before it")
    if (disk, first_disk, locator_disk, disks, on_disk) != (0, 0, 0, 1, stated[0]):
        raise ValueError("it is one of several parts")
    return CentralDirectory(*stated)


def _unpack(file: BinaryIO, layout: struct.Struct, position: int) -> tuple[Any, ...]:
    file.seek(position)
    return layout.unpack(file.read(layout.size))


@dataclass(frozen=True)
class Member:
    """A member's bytes in the file: `size_bytes` from `offset`, or deflated to `stored_bytes` there."""

    offset: int
    size_bytes: int
    stored_bytes: int
    deflated: bool


@dataclass(frozen=True)
class ZipMembers:
    """A checked archive: its members by name, without the one top folder that torch puts around them."""

    file: SeenFile
    top: str
    members: Mapping[str, Member]

    @property
    def is_torchscript(self) -> bool:
        return "constants.pkl" in self.members

    def read(self, name: str, max_bytes: int) -> bytes:
        """The member's bytes, inflated; InputError when it is absent or larger than `max_bytes`."""
        member = self.members.get(name)
        if member is None:
            raise InputError("the archive lacks a member", where=str(self.file), expected=f"{self.top}/{name}")
        if member.size_bytes > max_bytes:
            raise self._error(f"{self.top}/{name}", f"at most {max_bytes} bytes", f"{member.size_bytes} bytes")
        with self.file.open() as opened:
            opened.seek(member.offset)
            raw = opened.read(member.stored_bytes)
        if member.deflated:
            raw = self._inflate(name, raw, member.size_bytes)
        return raw

    def _inflate(self, name: str, raw: bytes, size_bytes: int) -> bytes:
        try:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size_bytes + 1)
        except zlib.error as error:
            raise self._error(f"{self.top}/{name}", "DEFLATE data", str(error)) from error
        if len(inflated) != size_bytes:
            raise self._error(f"{self.top}/{name}", f"{size_bytes} bytes", "another size")
        return inflated

    def _error(self, member: str, expected: str, got: str) -> InputError:
        return InputError(
            "a member of the archive is damaged or unsafe",
            where=f"{self.file}: {member}",
            expected=expected,
            got=got,
            fix="do not trust this file; get the checkpoint from its publisher",
        )


def check_zip(file: SeenFile) -> ZipMembers:
    """The members of a zip archive that torch wrote.

    Raises:
        InputError: the archive is cut off or inconsistent, a name is unsafe, or a member inflates beyond the limit.
    """
    try:
        with file.open() as opened:
            infos, directory_offset = _read_directory(file, opened)
            _check_infos(file, infos)
            members = {info.filename: _locate(file, opened, info, directory_offset) for info in infos}
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError, OverflowError) as error:
        raise machine_fault(error, str(file)) or InputError(
            "the zip archive is cut off or damaged",
            where=str(file),
            got=f"{file.size_bytes} bytes: {error}",
            fix="download or copy the file again and compare its size and sha256 with its publisher's",
        ) from error
    _check_overlaps(file, infos, members, directory_offset)
    tops = {name.split("/", 1)[0] for name in members}
    if len(tops) != 1:
        raise _unsafe(file, "members", "one top folder, as torch writes it", f"{len(tops)} top names")
    top = tops.pop()
    return ZipMembers(file, top, {name[len(top) + 1 :]: member for name, member in members.items()})


def _read_directory(file: SeenFile, opened: BinaryIO) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of the central directory, and where it begins."""
    directory = find_central_directory(opened)
    # Before its entries are read, each of which takes far more memory than it has bytes.
    if directory.members > MAX_MEMBERS or directory.size_bytes > MAX_DIRECTORY_BYTES:
        raise _unsafe(file, "central directory", f"1 to {MAX_MEMBERS} members", f"{directory.members}")
    with zipfile.ZipFile(opened) as archive:
        infos = archive.infolist()
        if (len(infos), archive.start_dir) != (directory.members, directory.offset):
            raise ValueError(f"a central directory of {len(infos)} members at byte {archive.start_dir}")
        return infos, directory.offset


def _check_infos(file: SeenFile, infos: list[zipfile.ZipInfo]) -> None:
    if not 1 <= len(infos) <= MAX_MEMBERS:
        raise _unsafe(file, "central directory", f"1 to {MAX_MEMBERS} members", f"{len(infos)}")
    names = set()
    inflated_bytes = 0
    for info in infos:
        if info.filename in names:
            raise _unsafe(file, info.filename, "each name once", "the name stands twice")
        names.add(info.filename)
        _check_info(file, info)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            inflated_bytes += info.file_size
    if inflated_bytes > MAX_INFLATED_BYTES:
        raise _unsafe(
            file, "compressed members", f"at most {MAX_INFLATED_BYTES} bytes in all", f"{inflated_bytes} bytes"
        )


def _check_info(file: SeenFile, info: zipfile.ZipInfo) -> None:
    name = info.filename
    parts = name.split("/")
    if len(parts) < 2 or "\\" in name or "\0" in name or ":" in parts[0] or {"", ".", ".."} & set(parts):
        raise _unsafe(file, name, "a relative name without '..'", repr(name[:200]))
    if info.flag_bits & _ENCRYPTED:
        raise _unsafe(file, name, "no encryption", "an encrypted member")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _unsafe(file, name, "a stored or deflated member", f"compression method {info.compress_type}")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise _unsafe(file, name, f"{info.compress_size} bytes", f"a stated size of {info.file_size} bytes")


def _locate(file: SeenFile, opened: BinaryIO, info: zipfile.ZipInfo, directory_offset: int) -> Member:
    opened.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(opened.read(_LOCAL_HEADER.size))
    magic, method, name_bytes, extra_bytes = header[0], header[3], header[9], header[10]
    name = opened.read(name_bytes).decode("utf-8", "replace")
    if magic != ZIP_MAGIC or method != info.compress_type or name != info.orig_filename:
        raise _unsafe(file, info.filename, "equal local and central headers", f"local name {name[:200]!r}")
    offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if offset + info.compress_size > directory_offset:
        raise _unsafe(file, info.filename, f"data before byte {directory_offset}", f"{info.compress_size} at {offset}")
    return Member(offset, info.file_size, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED)


def _check_overlaps(
    file: SeenFile, infos: list[zipfile.ZipInfo], members: Mapping[str, Member], directory_offset: int
) -> None:
    ordered = sorted(infos, key=lambda info: info.header_offset)
    if ordered[0].header_offset != 0:
        raise _unsafe(file, ordered[0].filename, "the first member at byte 0", f"at {ordered[0].header_offset}")
    ends = [info.header_offset for info in ordered[1:]] + [directory_offset]
    for info, end in zip(ordered, ends, strict=True):
        member = members[info.filename]
        if member.offset + member.stored_bytes > end:
            raise _unsafe(file, info.filename, f"an end before byte {end}", "members that overlap")


def _unsafe(file: SeenFile, member: str, expected: str, got: str) -> InputError:
    return InputError(
        "the zip archive is not one that torch writes and is not opened",
        where=f"{file}: {member[:200]}",
        expected=expected,
        got=got,
        fix="get the checkpoint from its publisher; repacked archives must be saved again with torch.save",
    )
