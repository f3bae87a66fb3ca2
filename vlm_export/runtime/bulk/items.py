"""What is embedded in bulk: images of files, folders, lists, tables and archives, and texts of files.

Items are named one after the other and read when their turn comes, so that a million of them take no memory. The same
inputs give the same items in the same order, which is what lets a run that was ended go on.
"""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from vlm_export.errors import InputError, UsageError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.images import MAX_STREAM_BYTES, ImageSource
from vlm_export.runtime.inputs.sources import IMAGE_SUFFIXES
from vlm_export.runtime.search.store import ItemKind, pyarrow_modules

TEXT_SUFFIX, ARCHIVE_SUFFIX, TABLE_SUFFIXES = ".txt", ".tar", (".csv", ".parquet")
_OTHERS_NAMED = 1000
_ROWS_READ = 4096


@dataclass(frozen=True)
class Item:
    """One image or text.

    Attributes:
        name: an image's path, `ARCHIVE/MEMBER`, what a table calls it, or the text itself.
        file: where an image lies; empty for a text.
        span: offset and size in bytes, of an image within an archive.
        columns: what a table says of it.
        is_named: the user named it itself, so that it is an error where it cannot be read.
    """

    name: str
    file: str = ""
    span: tuple[int, int] | None = None
    columns: tuple[str, ...] = ()
    is_named: bool = False

    def image(self) -> ImageSource:
        """What an image is decoded from; InputError where an archive is gone, or ends before it."""
        if self.span is None:
            # A pipe among many would be waited for.
            if not self.is_named and os.path.exists(self.file) and not os.path.isfile(self.file):
                raise InputError("an image is no regular file", where=self.name, got=self.file or "no path")
            return Path(self.file)
        offset, size = self.span
        if size > MAX_STREAM_BYTES:
            raise InputError(
                "an image of an archive is too large",
                where=self.name,
                expected=f"at most {MAX_STREAM_BYTES:,} bytes",
                got=f"{size:,} bytes",
            )
        try:
            with open(self.file, "rb") as archive:
                archive.seek(offset)
                content = archive.read(size)
        except OSError as error:
            raise machine_fault(error, self.file) or InputError(
                "an archive cannot be read", where=self.name, got=error.strerror or str(error)
            ) from error
        if len(content) != size:
            raise InputError(
                "an archive ends within an image", where=self.name, expected=f"{size} bytes", got=str(len(content))
            )
        return content


@dataclass(frozen=True)
class TableColumns:
    """Columns of a table: that of the images' paths, that of their names (None: the paths), and those to keep."""

    path: str = "path"
    name: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """What the inputs hold.

    Attributes:
        kind: of all items.
        count: of the items.
        others: files of folders and archives that are not named as images, the first thousand.
        other_count: of all of them.
    """

    kind: ItemKind
    count: int
    others: tuple[str, ...]
    other_count: int


@dataclass(frozen=True)
class Inputs:
    """What a user names.

    Attributes:
        paths: images, folders of images, `.tar` archives, `.csv` and `.parquet` tables of paths; or `.txt` files.
        lists: files with the path of an image in each line.
        columns: of tables.
    """

    paths: Sequence[Path]
    lists: Sequence[Path] = ()
    columns: TableColumns = field(default_factory=TableColumns)

    def __post_init__(self) -> None:
        tables = all(path.suffix.lower() in TABLE_SUFFIXES for path in self.paths) and not self.lists
        if not tables and self.columns != TableColumns():
            expected = f"inputs that all are {' or '.join(TABLE_SUFFIXES)}"
            raise UsageError("columns are those of tables", expected=expected, fix="embed the others by themselves")
        texts = [path for path in self.paths if path.suffix.lower() == TEXT_SUFFIX and not path.is_dir()]
        if texts and len(texts) < len(self.paths) + len(self.lists):
            raise UsageError("images and texts go to files of their own", fix="run embed twice")

    @property
    def kind(self) -> ItemKind:
        """Of all items."""
        of_texts = any(path.suffix.lower() == TEXT_SUFFIX and not path.is_dir() for path in self.paths)
        return "text" if of_texts else "image"

    def items(self, other: Callable[[str], None] = lambda _: None) -> Iterator[Item]:
        """Every item in order.

        Args:
            other: told of each file of a folder or archive that is not named as an image.

        Raises:
            InputError: an input is damaged, or holds no item.
            EnvironmentFailure: the machine does not let it be read.
        """
        for path in self.paths:
            yield from _not_empty(path, self._below(path, other))
        for path in self.lists:
            yield from _not_empty(path, (Item(line, line) for line in _lines(path)))

    def scan(self) -> Scan:
        """Counts the items, and finds what is wrong with the inputs before any work is done."""
        others: list[str] = []
        count = other_count = 0

        def other(name: str) -> None:
            nonlocal other_count
            other_count += 1
            if len(others) < _OTHERS_NAMED:
                others.append(name)

        for _ in self.items(other):
            count += 1
        return Scan(self.kind, count, tuple(others), other_count)

    def _below(self, path: Path, other: Callable[[str], None]) -> Iterator[Item]:
        suffix = path.suffix.lower()
        if path.is_dir():
            return _folder_items(path, other)
        if suffix == TEXT_SUFFIX:
            return (Item(line) for line in _lines(path))
        if suffix == ARCHIVE_SUFFIX:
            return _archive_items(path, other)
        if suffix in TABLE_SUFFIXES:
            return _table_items(path, self.columns)
        return iter([Item(str(path), str(path), is_named=True)])


def _not_empty(path: Path, items: Iterator[Item]) -> Iterator[Item]:
    first = next(items, None)
    if first is None:
        if path.is_dir():
            raise InputError("the folder holds no images", where=str(path), expected=", ".join(sorted(IMAGE_SUFFIXES)))
        what = "the text file has no lines" if path.suffix.lower() == TEXT_SUFFIX else "a file names no images"
        raise InputError(what, where=str(path))
    yield first
    yield from items


def _folder_items(folder: Path, other: Callable[[str], None]) -> Iterator[Item]:
    """Images below a folder in the order of their paths; links to folders are not followed."""
    open_folders = [(str(folder), iter(_entries(str(folder))))]
    while open_folders:
        parent, names = open_folders[-1]
        name = next(names, None)
        if name is None:
            open_folders.pop()
            continue
        path = os.path.join(parent, name)
        if name.endswith("/"):
            below = path.removesuffix("/")
            open_folders.append((below, iter(_entries(below))))
        # os.path: links that lead to themselves are no files, and no error.
        elif Path(name).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path):
            yield Item(path, path)
        else:
            other(path)


def _entries(folder: str) -> list[str]:
    """Names in a folder in their order, with a slash behind those of folders. Names alone: there may be a million."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in entries]
        return sorted(names, key=lambda name: name.removesuffix("/"))
    except OSError as error:
        # Its images would be missing without a word.
        where = os.fsdecode(error.filename or folder)
        raise InputError("a folder cannot be read", where=where, got=error.strerror or str(error)) from error


def _archive_items(path: Path, other: Callable[[str], None]) -> Iterator[Item]:
    """Images of an archive that is not compressed, such as a shard of WebDataset, in its order."""
    try:
        # Not "r:*": what is compressed has no place that could be read alone.
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = f"{path}/{member.name}"
                if member.size < 0:
                    # tarfile would go back, and never end.
                    raise InputError("an archive has a member of a negative size", where=name, got=str(member.size))
                if member.isreg() and not member.issparse() and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    yield Item(name, str(path), (member.offset_data, member.size))
                elif not member.isdir():
                    other(name)
                # tarfile remembers every member.
                archive.members = []  # type: ignore[attr-defined]  # the stubs leave it out
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        fault = machine_fault(error, str(path)) if isinstance(error, OSError) else None
        raise fault or InputError(
            "an archive cannot be read", where=str(path), expected="a .tar file, not compressed", got=str(error)
        ) from error


def _table_items(path: Path, columns: TableColumns) -> Iterator[Item]:
    wanted = (columns.path, *([columns.name] if columns.name else []), *columns.keep)
    read = _csv_rows if path.suffix.lower() == ".csv" else _parquet_rows
    for row in read(path, wanted):
        file = row[columns.path]
        yield Item(row[columns.name or columns.path], file, columns=tuple(row[name] for name in columns.keep))


def _csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[Mapping[str, str]]:
    with _text_file(path) as file:
        reader = csv.DictReader(file)
        try:
            _check_columns(path, wanted, reader.fieldnames or ())
            for row in reader:
                yield {name: row[name] or "" for name in wanted}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                "a table cannot be read", where=f"{path}: line {reader.line_num}", got=str(error)
            ) from error


def _parquet_rows(path: Path, wanted: Sequence[str]) -> Iterator[Mapping[str, str]]:
    pa, pq = pyarrow_modules()
    try:
        with pq.ParquetFile(path) as table:
            _check_columns(path, wanted, table.schema_arrow.names)
            kind = table.schema_arrow.field(wanted[0]).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError("a table's paths are no texts", where=f"{path}: {wanted[0]}", got=str(kind))
            for batch in table.iter_batches(batch_size=_ROWS_READ, columns=list(dict.fromkeys(wanted))):
                texts = [batch.column(name).cast(pa.string()).to_pylist() for name in wanted]
                for row in zip(*texts, strict=True):
                    yield {name: text or "" for name, text in zip(wanted, row, strict=True)}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = machine_fault(error, str(path)) if isinstance(error, OSError) else None
        raise fault or InputError("a table cannot be read", where=str(path), got=str(error)) from error


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[Any]) -> None:
    for name in wanted:
        if name not in found:
            raise InputError(
                "a table lacks a column",
                where=str(path),
                expected=name,
                got=", ".join(map(str, found)) or "no columns",
                fix="name the column of paths with --path-column, that of names with --name-column",
            )


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file that are not empty."""
    with _text_file(path) as file:
        try:
            # Only line ends divide texts; `splitlines` would also cut at form feeds and the like.
            yield from filter(None, (line.strip() for line in file))
        except UnicodeDecodeError as error:
            raise InputError("a text file is not UTF-8", where=str(path), got=str(error)) from error
        except OSError as error:
            _refuse_file(path, error)


def _text_file(path: Path) -> TextIO:
    if path.exists() and not path.is_file():
        # It is read twice: to count, and to embed.
        raise InputError("a list is no regular file", where=str(path), fix="write it to a file first")
    try:
        return path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else "\n")
    except OSError as error:
        _refuse_file(path, error)


def _refuse_file(path: Path, error: OSError) -> NoReturn:
    raise machine_fault(error, str(path)) or InputError(
        "a text file cannot be read", where=str(path), got=error.strerror or str(error)
    ) from error
