"""Atomic publication: a bundle is built in a temporary directory beside its target and put in place in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, manifest_from_bytes
from vlm_export.bundle.onnx_locations import check_variant_graph
from vlm_export.bundle.replacement import (
    aside_path,
    foreign_entries,
    has_manifest,
    is_empty_directory,
    recover,
    replace_directory,
)
from vlm_export.bundle.safe_files import check_utf8, map_in_threads, record_of_file, relative_files
from vlm_export.bundle.staging import check_name, delete, staging, sync_directory, sync_file
from vlm_export.errors import InputError, UsageError
from vlm_export.interrupts import point_of_no_return


@dataclass(frozen=True)
class Staging:
    """A bundle under construction.

    Attributes:
        path: the temporary directory; write files anywhere below it.
        target: where `commit` puts it.
        overwrite: whether it may replace a bundle there.
    """

    path: Path
    target: Path
    overwrite: bool

    def file(self, relative: str) -> Path:
        """The path of a file to be written, with its parent directories created."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, manifest: Manifest) -> Manifest:
        """Hashes and syncs every file, writes the manifest last and puts the directory in place.

        Returns:
            The manifest as it was written, with `files` filled.

        Raises:
            InputError: a link or special file, an odd file name, a variant whose files are missing or whose graph
                names other files, a manifest that would not open again.
            EnvironmentFailure: disk full, read-only, file size limit.
        """
        with environment_errors("publishing the bundle", self.target.parent):
            names = relative_files(self.path)
            complete = replace(manifest, files=map_in_threads(self._finished_file, names))
            for part in complete.parts:
                for variant in part.variants:
                    check_variant_graph(self.path, complete, variant)
            _write_manifest(self.path / MANIFEST_NAME, manifest_content(complete))
            for directory, _, _ in os.walk(self.path):
                sync_directory(Path(directory))
            check_target(self.target, self.overwrite)
            with point_of_no_return():
                replace_directory(self.path, self.target)
                # The old bundle, or nothing.
                delete(self.path)
        return complete

    def _finished_file(self, name: str) -> FileRecord:
        sync_file(self.path / name)
        return record_of_file(self.path, name)


@contextmanager
def publication(target: Path, *, overwrite: bool) -> Iterator[Staging]:
    """A temporary directory beside `target` that `Staging.commit` publishes; without a commit nothing remains.

    Holds the target's lock and first sweeps what killed exports left behind.

    Args:
        target: the bundle's directory: absent, empty, or with `overwrite` an older bundle.
        overwrite: replace an existing bundle.

    Raises:
        UsageError: the target exists without `overwrite`, is not a bundle, holds files that are not the bundle's,
            is a mount point, or has a name that is not UTF-8 or that leftovers have.
        EnvironmentFailure: another export holds the target, the place is read-only, the disk is too small or full.
    """
    target = _absolute(target)
    with environment_errors("writing the bundle", target.parent), _parents(target.parent), staging(target) as staged:
        _recover(target, overwrite)
        staged.path.mkdir()
        yield Staging(staged.path, target, overwrite)


def _absolute(target: Path) -> Path:
    absolute = Path(target).absolute()
    fix = "choose another name; ONNX files name their data files in UTF-8"
    check_utf8(absolute, UsageError, "the output path is not valid UTF-8", fix)
    if absolute.name in ("", ".."):
        raise UsageError("the output path names no directory of its own", where=str(target), fix="give it a name")
    return absolute


@contextmanager
def _parents(parent: Path) -> Iterator[None]:
    """The directories above the target, created where missing and removed again when the work fails."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    nearest = missing[-1].parent if missing else parent
    if not nearest.is_dir():
        raise UsageError(
            "the output path leads through something that is no directory",
            where=str(nearest),
            fix="choose a path below a directory",
        )
    parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def check_target(target: Path, overwrite: bool) -> None:
    """UsageError unless a bundle may be put at `target`: absent, empty, or with `overwrite` only a bundle."""
    check_name(target)
    if os.path.ismount(target):
        raise UsageError(
            "the output path is a mount point, and no directory can be put in its place",
            where=str(target),
            fix=f"name a directory below it, such as {target / 'bundle'}",
        )
    if not os.path.lexists(target) or is_empty_directory(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "link" if target.is_symlink() else "file"
        raise UsageError(f"the output path is a {kind}", where=str(target), fix="choose a directory's own path")
    if not has_manifest(target):
        raise UsageError(
            "the output directory holds something that is not a bundle; it is left as it is",
            where=str(target),
            expected=f"no directory, an empty one, or a bundle with {MANIFEST_NAME}",
            fix="choose another directory",
        )
    if not overwrite:
        raise UsageError("the output directory exists", where=str(target), fix="pass --overwrite to replace the bundle")
    _check_only_bundle_files(target)


def _check_only_bundle_files(target: Path) -> None:
    """UsageError when the bundle holds what its manifest does not list: it is somebody's."""
    try:
        foreign = foreign_entries(target)
    except InputError as error:
        raise UsageError(
            "the manifest of the bundle to be replaced cannot be read, so its files cannot be told from others",
            where=str(target / MANIFEST_NAME),
            got=error.what,
            fix="delete the directory yourself, or choose another",
        ) from error
    if foreign:
        raise UsageError(
            "the bundle to be replaced holds files, links or directories that no export wrote",
            where=str(target),
            got=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            fix="move them away, or delete the directory yourself",
        )


def _recover(target: Path, overwrite: bool) -> None:
    """Undoes or finishes a replacement that was cut off, if a bundle may be put at `target` before and after it."""
    check_target(target, overwrite)
    recover(target)
    check_target(target, overwrite)
    if os.path.lexists(aside_path(target)):
        raise UsageError(
            "what stands beside the output directory has the name that the old bundle gets for a moment",
            where=str(aside_path(target)),
            fix="move it away, or choose another output directory",
        )


def manifest_content(manifest: Manifest) -> bytes:
    """The content of the manifest's file, once it is found to open again.

    Raises:
        InputError: a value is out of the range that readers take, not finite, or too large.
    """
    what = "the bundle could not be opened again, so it is not made"
    fix = "correct the checkpoint's configuration, or the option that this value comes from"
    try:
        content = manifest.to_bytes()
        manifest_from_bytes(content)
    except InputError as error:
        got = f"{error.what}: {error.got}" if error.got else error.what
        raise InputError(what, where=error.where, expected=error.expected, got=got, fix=fix) from error
    except ValueError as error:
        raise InputError(what, where=MANIFEST_NAME, expected="JSON data", got=str(error), fix=fix) from error
    return content


def _write_manifest(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
