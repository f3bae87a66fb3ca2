"""Files below a directory that may be hostile: real files only, never through a link or outside, and their sha256."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vlm_export.bundle.manifest import FileRecord, checked_relative_name
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.machine_faults import machine_fault

_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8
Key = TypeVar("Key")
Value = TypeVar("Value")
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def relative_files(root: Path) -> list[str]:
    """Every file below `root` as a plain relative name, sorted; InputError when one is a link or a special file."""
    names = []
    for top, directories, files in os.walk(root):
        for name in (*directories, *files):
            relative = Path(top, name).relative_to(root).as_posix()
            checked_relative_name(relative, str(root))
            if name in files or os.path.islink(os.path.join(top, name)):
                _check_real_file(os.lstat(root / relative), root / relative)
                names.append(relative)
    return sorted(names)


@contextmanager
def opened_real_file(root: Path, name: str) -> Iterator[int]:
    """A read-only descriptor of the file `name` below `root`.

    Raises:
        InputError: the name leaves `root`; the file is absent, a link, hard-linked or special; or a directory on
            the way is a link.
    """
    checked_relative_name(name, str(root))
    path = root
    *directories, _ = name.split("/")
    for segment in directories:
        path = path / segment
        if not stat.S_ISDIR(_status(path).st_mode):
            raise _not_real(path, "a directory on the way to a file is a link or no directory")
    path = root / name
    before = _status(path)
    _check_real_file(before, path)
    with _input_errors(path):
        descriptor = os.open(path, _OPEN_FLAGS)
    try:
        after = os.fstat(descriptor)
        _check_real_file(after, path)
        if not os.path.samestat(before, after):
            raise InputError("a file was exchanged while it was being opened", where=str(path), fix="open it again")
        with _input_errors(path):
            yield descriptor
    finally:
        os.close(descriptor)


def record_of_file(root: Path, name: str) -> FileRecord:
    """Size and sha256 of the real file `name` below `root`; InputError as in `opened_real_file`."""
    with opened_real_file(root, name) as descriptor:
        return record_from_descriptor(descriptor)


def record_from_descriptor(descriptor: int) -> FileRecord:
    """Size and sha256 of what can be read from an open file, from its position to its end."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def map_in_threads(function: Callable[[Key], Value], keys: Iterable[Key]) -> Mapping[Key, Value]:
    """`function` of each key, run side by side; the first error, in the order of the keys, is raised.

    hashlib releases the interpreter lock on large buffers, so that threads hash side by side.
    """
    ordered = list(dict.fromkeys(keys))
    threads = min(len(ordered), os.cpu_count() or 1, _MAX_THREADS)
    if threads <= 1:
        return {key: function(key) for key in ordered}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(ordered, pool.map(function, ordered), strict=True))


def check_path(path: object, what: str) -> None:
    """UsageError for what a caller passes as a path and is none, as None is."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{what} is named by its path", expected="a string or a Path", got=repr(path)[:100])


def check_utf8(path: Path, error: type[VlmExportError], what: str, fix: str) -> None:
    """Raises `error` unless the path is valid UTF-8: engines and torch open no other, ONNX files hold no other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as cause:
        raise error(what, where=repr(os.fsencode(path)), fix=fix) from cause


@contextmanager
def _input_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _status(path: Path) -> os.stat_result:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            "a file of the bundle is missing", where=str(path), fix="copy the whole directory again, or export again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> VlmExportError:
    return machine_fault(error, str(path)) or InputError(
        "a file of the bundle cannot be read", where=str(path), got=str(error.strerror)
    )


def _check_real_file(status: os.stat_result, path: Path) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _not_real(path, "a file of the bundle is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise _not_real(path, "a file of the bundle is no regular file")
    if status.st_nlink > 1:
        raise _not_real(path, "a file of the bundle has several names (hard links)")


def _not_real(path: Path, what: str) -> InputError:
    return InputError(
        what,
        where=str(path),
        expected="a real file below the bundle, so that nothing outside can change it",
        fix="copy the bundle with links followed: cp -rL, then open the copy",
    )
