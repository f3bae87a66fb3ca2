"""Hugging Face Hub ids: the few files that are needed, of one resolved commit; no code of a repository is run."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlm_export.checkpoint.directory import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    SIDE_CONFIGS,
    SIDE_FILES,
    WEIGHTS_PRECEDENCE,
)
from vlm_export.checkpoint.formats.safetensors_file import ReadPrefixes, everything, read_index, select_shards
from vlm_export.checkpoint.seen_file import see_file
from vlm_export.errors import EnvironmentFailure, InputError, UsageError, install_fix

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 15.0
_CONFIGS = (CONFIG_FILE, *SIDE_CONFIGS, ADAPTER_CONFIG_FILE, *SIDE_FILES)
# Shards are named by an index; these are the only forms that transformers writes.
_SHARDS = {
    "model.safetensors.index.json": re.compile(r"model-\d{5}-of-\d{5}\.safetensors"),
    "pytorch_model.bin.index.json": re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"),
}


@dataclass(frozen=True)
class Snapshot:
    """A downloaded (or cached) directory and the commit that it is."""

    directory: Path
    revision: str


def fetch_snapshot(hub_id: str, revision: str | None = None, reads: ReadPrefixes = everything) -> Snapshot:
    """Downloads the allowed files of `hub_id`, or takes them from the local cache when there is no network.

    Args:
        reads: which keys of an index are read; shards without any are not downloaded.

    Raises:
        UsageError: the repository or revision does not exist, or access is not granted.
        InputError: no weights in a supported format, or a malformed index.
        EnvironmentFailure: no network and nothing cached, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise EnvironmentFailure(
            "hub ids need the package huggingface_hub",
            where=hub_id,
            got=str(error),
            fix=f"{install_fix('export')}; or download the files yourself and name their directory",
        ) from error
    # The HTTP library's own errors are not all OSErrors, and which library it is changed between versions.
    bases = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]
    no_connection: tuple[type[Exception], ...] = (OSError, *bases)
    try:
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=_TIMEOUT_SECONDS)
        commit = info.sha or ""
        names = wanted_files([sibling.rfilename for sibling in info.siblings or []])
        if indexes := [name for name in names if name in _SHARDS]:
            # The index first: it says which shards are read.
            path = huggingface_hub.snapshot_download(hub_id, revision=commit, allow_patterns=indexes)
            _, left_aside = select_shards(read_index(see_file(Path(path) / indexes[0])), reads)
            names = [name for name in names if name not in left_aside]
        path = huggingface_hub.snapshot_download(hub_id, revision=commit, allow_patterns=names)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_found(hub_id, revision, error) from error
    except no_connection as error:
        return _cached_snapshot(hub_id, revision, error)
    return _snapshot(hub_id, Path(path))


def wanted_files(names: Collection[str]) -> list[str]:
    """The files of a repository that are downloaded: config, side files, and the weights that come first.

    Of a LoRA adapter's repository these are its settings and its own weights.

    Raises:
        InputError: the repository has no weights in a supported format.
    """
    precedence = ADAPTER_WEIGHTS if ADAPTER_CONFIG_FILE in names else WEIGHTS_PRECEDENCE
    weights = next((name for name in precedence if name in names), None)
    if weights is None:
        raise InputError(
            "the repository has no weights in a supported format",
            expected=f"one of {', '.join(precedence)}",
            got=", ".join(sorted(names)[:10]) or "no files",
            fix="download the weights yourself and name the file or its directory",
        )
    shards = [name for name in names if weights in _SHARDS and _SHARDS[weights].fullmatch(name)]
    return [name for name in _CONFIGS if name in names] + [weights, *sorted(shards)]


def _cached_snapshot(hub_id: str, revision: str | None, cause: BaseException) -> Snapshot:
    import huggingface_hub

    allowed = [*_CONFIGS, *WEIGHTS_PRECEDENCE, *ADAPTER_WEIGHTS, "model-*.safetensors", "pytorch_model-*.bin"]
    try:
        path = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=allowed, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(
            "the checkpoint cannot be fetched from the Hugging Face Hub, and the local cache does not have it",
            where=hub_id + (f" at {revision}" if revision else ""),
            expected="a connection to the hub, or a cached snapshot",
            got=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"[:300],
            fix="connect to the network, or copy the files here by other means and name their directory",
        ) from error
    return _snapshot(hub_id, Path(path))


def _snapshot(hub_id: str, path: Path) -> Snapshot:
    # The cache names a snapshot's folder by its commit.
    if _COMMIT.fullmatch(path.name) is None:
        raise EnvironmentFailure(
            "the hub's local cache has an unexpected layout",
            where=f"{hub_id}: {path}",
            expected="a folder named by its commit",
            fix="clear the cache (hf cache), or name a directory of files instead",
        )
    return Snapshot(path, path.name)


def _not_found(hub_id: str, revision: str | None, error: BaseException) -> UsageError:
    return UsageError(
        "the Hugging Face Hub has no such repository or revision, or it is not public",
        where=hub_id + (f" at {revision}" if revision else ""),
        got=type(error).__name__,
        fix="check the spelling; for a repository that needs a login, download it yourself and name its directory",
    )
