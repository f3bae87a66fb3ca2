"""File names that a checkpoint states: plain names in its own directory, nothing else."""

from __future__ import annotations

import os
from importlib import resources

from vlm_export.errors import InputError

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
