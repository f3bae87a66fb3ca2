"""The end of a zip archive, in the one layout that torch and zipfile write.

Readers differ in how they look for the central directory: by a search, by its stated place, by the zip64 locator. An
archive that leaves any choice could show one directory to the check and another one to a later reader. So the records
must stand without gaps at the very end of the file and agree: directory, [zip64 record, zip64 locator], end record.
Format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.14 to 4.3.16.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

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
