"""File names that a checkpoint states: plain names in its own directory, nothing else."""

from __future__ import annotations

from vlm_export.errors import InputError


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name on every system: no separator, no drive, no '..', no control character."""
    return name not in ("", ".", "..") and name.isprintable() and not set("/\\:\0") & set(name)


def check_plain_name(name: str, where: str) -> None:
    """InputError when a checkpoint states a name that could lead out of its directory."""
    if not is_plain_name(name):
        raise InputError(
            "a checkpoint names a file outside its directory",
            where=where,
            expected="a plain file name",
            got=repr(name[:200]),
            fix="do not trust this checkpoint; get it from its publisher",
        )
