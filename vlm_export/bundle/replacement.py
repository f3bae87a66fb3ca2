"""Puts a finished directory in the place of another, so that a crash leaves either one whole.

Where Linux can exchange two names in one step (renameat2 with RENAME_EXCHANGE, see rename(2)), the target never
disappears. Elsewhere the old directory is first renamed to a fixed name beside the target; if the process dies
before the second rename, `recover` puts it back.

Only a directory that holds nothing but a bundle's own files may be replaced or deleted.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, manifest_from_bytes
from vlm_export.bundle.staging import delete, new_staging_path, sync_directory
from vlm_export.bundle.strict_json import MAX_JSON_BYTES
from vlm_export.bundle.target_lock import short_name
from vlm_export.errors import InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def aside_path(target: Path) -> Path:
    """Where the old directory stands between the two renames."""
    return target.parent / f".{short_name(target)}.vlm-export.old"


def replace_directory(new: Path, target: Path) -> None:
    """Puts `new` at `target`, which may be absent, an empty directory or an old bundle; the caller holds the lock.

    The old directory, if any, stands at `new` afterwards, or is gone.
    """
    if is_empty_directory(target):
        target.rmdir()
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not exchange(new, target):
        _replace_in_two_steps(new, target)
    with suppress(OSError):
        # It is in place; what may be lost is only that this survives a power cut.
        sync_directory(target.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one step; False where the system cannot, and then nothing has changed."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _replace_in_two_steps(new: Path, target: Path) -> None:
    aside = aside_path(target)
    try:
        os.rename(target, aside)
        os.rename(new, target)
    finally:
        recover(target)


def recover(target: Path) -> None:
    """Finishes or undoes a replacement that was cut off; the caller holds the target's lock.

    With a bundle in place the old one is deleted, without it the old one becomes the target again. What stands at the
    old one's name and is no bundle, or holds more than a bundle, is somebody's and stays.
    """
    aside = aside_path(target)
    if not os.path.lexists(target) or is_empty_directory(target):
        if has_manifest(aside):
            if os.path.lexists(target):
                target.rmdir()
            os.rename(aside, target)
            sync_directory(target.parent)
    elif holds_only_a_bundle(aside) and holds_only_a_bundle(target):
        # Under a name that is never restored, because from here on it is incomplete.
        doomed = new_staging_path(target)
        os.rename(aside, doomed)
        delete(doomed)


def is_empty_directory(path: Path) -> bool:
    """Whether `path` is a directory, not a link to one, without entries."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


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
