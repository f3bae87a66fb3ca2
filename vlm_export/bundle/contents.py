"""What in a directory is a bundle's own: only a directory that holds nothing else may be replaced or deleted."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NoReturn

from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, manifest_from_bytes
from vlm_export.bundle.strict_json import MAX_JSON_BYTES
from vlm_export.errors import InputError


def has_manifest(root: Path) -> bool:
    """Whether `root` is a directory, not a link to one, in which a manifest lies."""
    return not root.is_symlink() and (root / MANIFEST_NAME).is_file()


def foreign_entries(root: Path) -> list[str]:
    """What below `root` no export wrote, as sorted relative names.

    Files that the manifest does not list, links of any kind, and directories (`name/`) in which no listed file lies.

    Raises:
        InputError: the manifest cannot be read, so nothing can be told from anything.
        OSError: a directory cannot be read.
    """
    files = {PurePosixPath(name) for name in (*_manifest(root).files, MANIFEST_NAME)}
    directories = {parent for name in files for parent in name.parents}
    foreign = []
    for top, below, names in os.walk(root, onerror=_fail):
        here = PurePosixPath(Path(top).relative_to(root).as_posix())
        others = [name for name in below if here / name not in directories or (root / here / name).is_symlink()]
        foreign += [f"{here / name}/" for name in others]
        foreign += [str(here / name) for name in names if here / name not in files or (root / here / name).is_symlink()]
        below[:] = [name for name in below if name not in others]
    return sorted(foreign)


def holds_only_a_bundle(root: Path) -> bool:
    """Whether `root` is a bundle's directory and everything in it was written by an export."""
    try:
        return has_manifest(root) and not foreign_entries(root)
    except InputError:
        return False


def _manifest(root: Path) -> Manifest:
    with (root / MANIFEST_NAME).open("rb") as file:
        return manifest_from_bytes(file.read(MAX_JSON_BYTES + 1))


def _fail(error: OSError) -> NoReturn:
    raise error
