"""SOURCE → Checkpoint: a file, a directory, a name from `configs/`, or a Hugging Face Hub id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_export.bundle.safe_files import check_utf8
from vlm_export.checkpoint.directory import (
    ADAPTER_CONFIG_FILE,
    Directory,
    find_side_configs,
    has_described_config,
    read_directory,
    read_side_config,
    scan_directory,
)
from vlm_export.checkpoint.formats.adapters import adapter_folder, base_of, merge_adapter, read_adapter
from vlm_export.checkpoint.formats.safetensors_file import ReadPrefixes, everything
from vlm_export.checkpoint.formats.weights_file import read_weights_file
from vlm_export.checkpoint.names import hidden_name, is_there, source_kind
from vlm_export.checkpoint.seen_file import Progress, SeenFile, check_sha256, hash_file, see_file
from vlm_export.checkpoint.sources.download import fetch_url
from vlm_export.checkpoint.sources.hub import fetch_snapshot
from vlm_export.checkpoint.sources.known import KnownCheckpoint, load_known, packaged_path
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.family import Checkpoint

TOKENIZER_FILE = "tokenizer.json"


def open_checkpoint(
    source: str,
    *,
    base: str | None = None,
    expected_sha256: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    reads: ReadPrefixes = everything,
) -> Checkpoint:
    """Opens a checkpoint read-only; no tensor is read yet and nothing in it is executed.

    Args:
        source: an existing path, else a name from `configs/`, else a hub id `owner/name`.
        base: what a LoRA adapter is put on, None: what its settings name.
        expected_sha256: pins the weights file (of an adapter, its base's); overrides the config's own.
        revision: commit, branch or tag of a hub id.
        progress: called while files are downloaded and hashed.
        reads: told the keys of an index, says which are read. Shards that hold none of them are not downloaded, not
            opened, and need not be there.

    Raises:
        UsageError: `source` names nothing, or an option does not apply to it.
        InputError: the files are damaged, unsafe, or not the pinned ones.
        EnvironmentFailure: no network where it is needed, or a full disk.
    """
    wanted = _Wanted(source, base, expected_sha256, revision, progress, reads)
    kind = source_kind(source)
    if kind == "path" and (folder := adapter_folder(Path(source))) is not None:
        return _open_adapter(wanted, folder)
    if kind == "hub":
        return _open_hub(wanted, source)
    if base is not None:
        raise _no_adapter(source)
    if kind == "known":
        return _open_known(wanted, load_known(source))
    with _telling_of_hidden_name(source):
        _refuse_revision(wanted)
        return _open_path(wanted, Path(source))


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `open_checkpoint`."""

    source: str
    base: str | None
    sha256: str | None
    revision: str | None
    progress: Progress | None
    reads: ReadPrefixes


def _open_adapter(wanted: _Wanted, path: Path) -> Checkpoint:
    adapter = read_adapter(path)
    name = base_of(adapter, wanted.base)
    if is_there(name) and adapter_folder(Path(name)) is not None:
        raise InputError(
            "the base of the adapter is an adapter itself",
            where=wanted.source,
            got=name,
            fix="merge that one first (peft: merge_and_unload, then save_pretrained), and name the result with --base",
        )
    try:
        opened = open_checkpoint(
            name,
            expected_sha256=wanted.sha256,
            revision=wanted.revision,
            progress=wanted.progress,
            reads=wanted.reads,
        )
    except VlmExportError as error:
        if wanted.base is None:
            error.where = f"{name}, which {wanted.source}/{ADAPTER_CONFIG_FILE} names as the base" + (
                f" ({error.where})" if error.where not in (None, name) else ""
            )
            error.fix = f"name the base's directory or file with --base{f'; or {error.fix}' if error.fix else ''}"
        raise
    return merge_adapter(wanted.source, adapter, opened, wanted.progress)


def _no_adapter(source: str) -> UsageError:
    return UsageError(
        "--base is for LoRA adapters, and the source is none",
        where=source,
        expected=f"a directory with {ADAPTER_CONFIG_FILE}",
        fix="leave --base out",
    )


@contextmanager
def _telling_of_hidden_name(source: str) -> Iterator[None]:
    """An error about a path says that a known checkpoint has the same name, which the user may have meant."""
    try:
        yield
    except VlmExportError as error:
        error.fix = "; ".join(part for part in (hidden_name(source), error.fix) if part)
        raise


def _refuse_revision(wanted: _Wanted) -> None:
    if wanted.revision is not None:
        raise UsageError("only hub ids have revisions", where=wanted.source, got=f"revision {wanted.revision}")


def _open_path(wanted: _Wanted, path: Path) -> Checkpoint:
    what = "the source's path is not valid UTF-8, and torch opens no other"
    check_utf8(path, UsageError, what, fix="rename it, or copy it to another place")
    if path.is_dir():
        return _open_directory(wanted, scan_directory(path, wanted.reads))
    if not path.is_file():
        raise InputError("the source is neither a file nor a directory", where=wanted.source)
    if path.name.endswith(".index.json"):
        return _open_directory(wanted, scan_directory(path.parent, wanted.reads, path))
    # The pinned sha256 before anything is parsed.
    seen = see_file(path)
    file = hash_file(seen, path.name, wanted.progress)
    check_sha256(file, wanted.sha256, where=wanted.source)
    stored = read_weights_file(seen)
    if has_described_config(path.parent, stored):
        return _open_directory(wanted, scan_directory(path.parent, wanted.reads, path))
    opened = Checkpoint(
        wanted.source,
        stored.format,
        (file,),
        stored.tensors,
        stored.read,
        notes=stored.notes,
        check_unchanged=seen.check_unchanged,
    )
    return _with_side_configs(opened, find_side_configs(path.parent, stored), wanted.progress)


def _open_directory(wanted: _Wanted, directory: Directory) -> Checkpoint:
    if wanted.sha256 is not None and len(directory.weight_files) != 1:
        raise UsageError(
            "a sha256 pins one weights file, and this checkpoint has several",
            where=wanted.source,
            got=f"{len(directory.weight_files)} shards",
            fix="pin a hub revision instead",
        )
    files = []
    for file in directory.files:
        files.append(hash_file(file, file.path.name, wanted.progress))
        if wanted.sha256 is not None and file in directory.weight_files:
            check_sha256(files[-1], wanted.sha256, where=str(file))
    stored = read_directory(directory)
    opened = Checkpoint(
        source=wanted.source,
        format=stored.format,
        files=tuple(files),
        tensors=stored.tensors,
        read=stored.read,
        config=directory.config,
        side_files={name: file.path for name, file in directory.side_files.items()},
        notes=stored.notes,
        shards_left_aside=directory.left_aside,
        check_unchanged=directory.check_unchanged,
    )
    return _with_side_configs(opened, find_side_configs(directory.path, stored), wanted.progress)


def _with_side_configs(opened: Checkpoint, files: Sequence[SeenFile], progress: Progress | None) -> Checkpoint:
    if not files:
        return opened
    for file in files:
        opened = _with_file(opened, file, file.path.name, progress)
    # A config.json beside them describes other weights, which transformers reads.
    return replace(opened, config=None, side_configs={file.path.name: read_side_config(file) for file in files})


def _with_file(opened: Checkpoint, file: SeenFile, name: str, progress: Progress | None) -> Checkpoint:
    """The checkpoint with one more file that is read, which must stay as it is, too."""

    def check_unchanged() -> None:
        opened.check_unchanged()
        file.check_unchanged()

    return replace(opened, files=(*opened.files, hash_file(file, name, progress)), check_unchanged=check_unchanged)


def _open_hub(wanted: _Wanted, hub_id: str) -> Checkpoint:
    snapshot = fetch_snapshot(hub_id, wanted.revision, wanted.reads)
    if adapter_folder(snapshot.directory) is not None:
        opened = _open_adapter(replace(wanted, revision=None), snapshot.directory)
    elif wanted.base is not None:
        raise _no_adapter(wanted.source)
    else:
        opened = _open_directory(wanted, scan_directory(snapshot.directory, wanted.reads))
    return replace(opened, revision=snapshot.revision)


def _open_known(wanted: _Wanted, known: KnownCheckpoint) -> Checkpoint:
    wanted = replace(wanted, sha256=wanted.sha256 or known.sha256)
    if known.source.hub is not None:
        return _open_hub(replace(wanted, revision=wanted.revision or known.revision), known.source.hub)
    _refuse_revision(wanted)
    if known.source.url is not None:
        path = fetch_url(known.source.url, wanted.sha256, wanted.progress)
    else:
        path = packaged_path(known.source.file or "")
    opened = _open_path(wanted, path)
    if known.tokenizer is None:
        return opened
    tokenizer = see_file(packaged_path(known.tokenizer))
    opened = _with_file(opened, tokenizer, TOKENIZER_FILE, wanted.progress)
    return replace(opened, side_files={TOKENIZER_FILE: tokenizer.path})
