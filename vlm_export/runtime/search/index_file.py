"""The file of an index: sections of bytes, one behind the other, and at the end a JSON object that says what they are.

The vectors come first: float32 (N, D), or inverted lists, whose library maps a file from its beginning. Then come
texts: the items' names, and of each column its distinct texts and uint32 (N,) that choose among them. All of it is
mapped, and read when it is needed, so that a large index opens as fast as a small one. The file ends with the length of
the JSON object and `MAGIC`; like a file of embeddings it is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, overload

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.manifest import Sha256
from vlm_export.bundle.safe_files import record_from_descriptor
from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.search.filters import Column
from vlm_export.runtime.search.rows import AGAIN
from vlm_export.runtime.search.store import EmbeddingsMeta
from vlm_export.specs.codec import Spec, between

MAGIC = b"VLMINDX1"
LISTS, VECTORS, NAMES = "lists", "vectors", "names"
_TAIL = struct.Struct("<Q8s")
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Section(Spec):
    """Where bytes stand in the file, and their sha256."""

    offset: Annotated[int, between(0)]
    size_bytes: Annotated[int, between(0)]
    sha256: Sha256


@dataclass(frozen=True)
class Recall(Spec):
    """How much of what an exact search finds an approximate one finds, measured when the index was built.

    Attributes:
        value: the share, 0 to 1, of the `k` nearest.
        queries: how many were asked.
        of: "items": the index's own vectors, each without itself; "given": vectors of the user, such as of texts.
    """

    value: Annotated[float, between(0, 1)]
    k: Annotated[int, between(1)]
    queries: Annotated[int, between(1)]
    of: Literal["items", "given"]


@dataclass(frozen=True)
class ListsRecord(Spec):
    """The inverted lists of an approximate index.

    Attributes:
        library: its name and version, as "faiss 1.15.1".
        count: how many lists there are.
        probes: how many of them a search compares; more find more and take longer.
    """

    library: str
    count: Annotated[int, between(1)]
    probes: Annotated[int, between(1)]
    recall: Recall


@dataclass(frozen=True)
class ColumnRecord(Spec):
    """A column: its name, and how many distinct texts it has."""

    name: str
    texts: Annotated[int, between(1)]


@dataclass(frozen=True)
class IndexState(Spec):
    """The JSON object at the end of an index.

    Attributes:
        columns: what is known of each item.
        lists: None: every search is exact.
        sections: by name.
    """

    schema: Literal[1]
    meta: EmbeddingsMeta
    rows: Annotated[int, between(1)]
    dimension: Annotated[int, between(1)]
    columns: tuple[ColumnRecord, ...]
    lists: ListsRecord | None
    sections: Mapping[str, Section]


class TextArray(Sequence[str]):
    """Texts of a mapped section: int64 (N,) where each ends, then all of them in UTF-8, file names byte for byte."""

    def __init__(self, section: npt.NDArray[np.uint8], count: int, where: str) -> None:
        if len(section) < 8 * count:
            raise InputError("texts of an index are cut off", where=where, fix=AGAIN)
        self._ends, self._content = section[: 8 * count].view("<i8"), section[8 * count :]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self._content[max(start, 0) : max(int(self._ends[index]), 0)].tobytes().decode("utf-8", _FILE_NAMES)


_FILE_NAMES = "surrogateescape"


def text_section(texts: Iterable[str]) -> Iterator[bytes]:
    """What `TextArray` reads."""
    encoded = [text.encode("utf-8", _FILE_NAMES) for text in texts]
    yield np.cumsum([len(text) for text in encoded], dtype="<i8").tobytes()
    yield b"".join(encoded)


class IndexWriter:
    """Writes sections behind what a file holds by then, and its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sections = file, dict[str, Section]()

    def add(self, name: str, chunks: Iterable[Any]) -> None:
        """A section from pieces that have the buffer protocol."""
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))
        offset, digest = self.file.tell(), hashlib.sha256()
        for chunk in chunks:
            self.file.write(chunk)
            digest.update(chunk)
        self.sections[name] = Section(offset, self.file.tell() - offset, digest.hexdigest())

    def add_written(self, name: str) -> None:
        """A section of all that the file holds by then."""
        self.file.seek(0)
        record = record_from_descriptor(self.file.fileno())
        self.sections[name] = Section(0, record.size_bytes, record.sha256)
        self.file.seek(0, os.SEEK_END)

    def finish(self, state: IndexState) -> None:
        """The JSON object; its `sections` are those that were written."""
        data = json.dumps({**state.to_json(), "sections": {k: s.to_json() for k, s in self.sections.items()}})
        content = data.encode("ascii")
        self.file.write(content)
        self.file.write(_TAIL.pack(len(content), MAGIC))


class IndexFile:
    """An index file that is open, its sections mapped."""

    def __init__(self, path: Path) -> None:
        """Reads what the file says of itself.

        Raises:
            InputError: no index, or one that is cut off or contradicts itself.
        """
        self.path = path
        with _reading(path) as file:
            self._status = os.fstat(file.fileno())
            self.size = self._status.st_size
            file.seek(max(self.size - _TAIL.size, 0))
            tail = file.read()
            length, magic = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, b"")
            self.end = self.size - _TAIL.size - length
            if magic != MAGIC:
                got = "it does not end as an index does"
                raise InputError("a file is no index, or was cut off", where=str(path), got=got, fix=AGAIN)
            if self.end < 0 or length > MAX_JSON_BYTES:
                raise self.damage("its end says that it is larger than it is")
            file.seek(self.end)
            data = json_object_from_bytes(file.read(length), str(path))
            self.state = IndexState.from_json(data, str(path), fix=AGAIN)
            # As a plain array: numpy's class of mapped ones takes time in each operation.
            self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))
        sections = sorted(self.state.sections.values(), key=lambda section: section.offset)
        for section, after in zip(sections, [*(s.offset for s in sections[1:]), self.end], strict=True):
            if section.offset + section.size_bytes > after:
                raise self.damage("its sections do not fit in it")

    def damage(self, got: str) -> InputError:
        """The error for a file that is not as it was built."""
        return InputError("an index is damaged", where=str(self.path), got=got, fix=AGAIN)

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """A section, mapped: uint8 (size,); InputError where there is none."""
        section = self.state.sections.get(name)
        if section is None:
            raise self.damage(f"it has no section {name}")
        return self._bytes[section.offset : section.offset + section.size_bytes]

    def first_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """A section that stands at the beginning of the file, where a library reads it; InputError elsewhere."""
        found = self.bytes_of(name)
        if self.state.sections[name].offset:
            raise self.damage(f"the section {name} does not begin the file")
        return found

    def check_same(self) -> None:
        """InputError where the path leads to another file by now, which a library has opened without a check."""
        now = os.stat(self.path)
        if not os.path.samestat(now, self._status) or now.st_mtime_ns != self._status.st_mtime_ns:
            raise InputError("an index was replaced while it was opened", where=str(self.path), fix="open it again")

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A section as an array of that dtype and shape; InputError where it has another size."""
        found = self.bytes_of(name)
        # Python's integers: what the file says may be large.
        wanted = np.dtype(dtype).itemsize
        for length in shape:
            wanted *= length
        if len(found) != wanted or self.state.sections[name].offset % _ALIGNMENT:
            raise self.damage(f"the section {name} has {len(found)} bytes instead of {wanted}, or stands askew")
        return found.view(dtype).reshape(shape)

    def column(self, number: int) -> Column:
        """A column, mapped; InputError where its sections have other sizes."""
        count = self.state.columns[number].texts
        texts = TextArray(self.bytes_of(column_texts(number)), count, str(self.path))
        return Column(self.array(column_codes(number), "<u4", (self.state.rows,)), texts)

    def check_hashes(self) -> None:
        """Reads the whole file; InputError where a section is not what was written."""
        for name, section in self.state.sections.items():
            found, digest = self.bytes_of(name), hashlib.sha256()
            for start in range(0, len(found), _CHUNK_BYTES):
                digest.update(found[start : start + _CHUNK_BYTES].data)
            if digest.hexdigest() != section.sha256:
                raise self.damage(f"the section {name} has another sha256")


def column_codes(number: int) -> str:
    """The section of a column's choices."""
    return f"column.{number}.codes"


def column_texts(number: int) -> str:
    """The section of a column's distinct texts."""
    return f"column.{number}.texts"


def is_index(path: Path) -> bool:
    """Whether a path names a file that ends as an index does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(-len(MAGIC), os.SEEK_END)
            return file.read() == MAGIC
    except (OSError, ValueError):
        # Too short, or the system refuses: readers of embeddings say what is wrong.
        return False


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        if not path.is_file():
            got = "a directory" if path.is_dir() else "no such file"
            raise InputError("there is no index", where=str(path), got=got, fix=AGAIN)
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise machine_fault(error, str(path)) or InputError(
            "an index cannot be read", where=str(path), got=error.strerror or str(error)
        ) from error
