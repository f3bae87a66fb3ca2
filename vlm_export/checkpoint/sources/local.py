"""A known checkpoint as far as this machine has it: nothing here asks the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm_export.checkpoint.directory import scan_directory
from vlm_export.checkpoint.formats.safetensors_file import ReadPrefixes, everything
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.download import cached_path
from vlm_export.checkpoint.sources.known import KnownCheckpoint
from vlm_export.errors import InputError
from vlm_export.family import Checkpoint


def open_local(known: KnownCheckpoint, reads: ReadPrefixes = everything) -> Checkpoint | None:
    """The checkpoint of a config, if it is part of this installation or was downloaded before; None otherwise.

    Raises:
        InputError: the files are damaged, unsafe, or not the pinned ones.
    """
    source = known.source
    if source.url is not None:
        path = cached_path(source.url, known.sha256)
        if not path.is_file():
            return None
        return replace(open_checkpoint(str(path), expected_sha256=known.sha256, reads=reads), source=known.name)
    if source.hub is None:
        return open_checkpoint(known.name, reads=reads)
    snapshot = _local_snapshot(source.hub, known.revision)
    if snapshot is None or not _is_complete(snapshot, reads):
        return None
    opened = open_checkpoint(str(snapshot), expected_sha256=known.sha256, reads=reads)
    return replace(opened, source=known.name, revision=snapshot.name)


def _local_snapshot(hub_id: str, revision: str | None) -> Path | None:
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None


def _is_complete(snapshot: Path, reads: ReadPrefixes) -> bool:
    """Whether weights are there: other programs may have fetched a config alone, and downloads may have stopped."""
    try:
        scan_directory(snapshot, reads)
    except InputError:
        return False
    return True
