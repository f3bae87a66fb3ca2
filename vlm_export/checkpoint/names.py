"""What SOURCE names, and the file names that a checkpoint states: plain ones in its own directory, nothing else."""

from __future__ import annotations

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Literal

from vlm_export.checkpoint.sources.known import known_names
from vlm_export.errors import InputError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PATH_MARKS = ("/", "\\")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".onnx", ".zip", ".gz")
# The longest name of a file on the usual systems.
_LONGEST_BYTES = 255


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name on every system: no separator, no drive, no '..', no control character, short."""
    is_name = name not in ("", ".", "..") and name.isprintable() and not set("/\\:\0") & set(name)
    return is_name and _bytes(name) <= _LONGEST_BYTES


def check_plain_name(name: str, where: str) -> None:
    """InputError when a checkpoint states a name that could lead out of its directory, or that no file can have."""
    if _bytes(name) > _LONGEST_BYTES:
        raise InputError(
            "a checkpoint names a file with a name that is too long for any file",
            where=where,
            expected=f"a name of at most {_LONGEST_BYTES} bytes",
            got=f"{_bytes(name)} bytes: {name[:80]!r}…",
            fix="the file is damaged or made up; get it from its publisher",
        )
    if not is_plain_name(name):
        raise InputError(
            "a checkpoint names a file outside its directory",
            where=where,
            expected="a plain file name",
            got=repr(name[:200]),
            fix="do not trust this checkpoint; get it from its publisher",
        )


def _bytes(name: str) -> int:
    return len(name.encode(errors="surrogatepass"))


def hidden_name(source: str) -> str:
    """A sentence where SOURCE is a path that has a known checkpoint's name, which it hides; "" otherwise."""
    if not is_plain_name(source) or not os.path.lexists(source):
        return ""
    if not resources.files("vlm_export.configs").joinpath(f"{source}.yaml").is_file():
        return ""
    return (
        f"./{source} in this directory was taken, not the known checkpoint {source}: "
        f"rename ./{source}, or run the command in another directory, to get that one"
    )


def source_kind(source: str) -> Literal["path", "known", "hub"]:
    """What SOURCE is: a path, a known name, or a Hub id `owner/name`; UsageError where it names nothing."""
    if is_there(source):
        return "path"
    if source in known_names():
        return "known"
    if is_hub_id(source) and not source.endswith(_FILE_SUFFIXES):
        return "hub"
    raise _names_nothing(source)


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return _HUB_ID.fullmatch(source) is not None and ".." not in source and "--" not in source


def is_there(source: str) -> bool:
    """Whether SOURCE is a path of something."""
    try:
        return source != "" and Path(source).exists()
    except (OSError, ValueError):
        return False


def _names_nothing(source: str) -> UsageError:
    """A path that is not there, or a word that is no known name."""
    if source.endswith(_FILE_SUFFIXES) or any(mark in source for mark in _PATH_MARKS) or source.startswith("~"):
        return UsageError("there is no such file or directory", where=source, fix="check the path")
    near = difflib.get_close_matches(source, known_names(), n=1)
    return UsageError(
        "the source is no file, no directory, no known name and no hub id",
        where=source,
        expected="an existing path, a known name, or owner/name",
        fix=f"did you mean {near[0]!r}?" if near else "vlm-export inspect lists the known names",
    )
