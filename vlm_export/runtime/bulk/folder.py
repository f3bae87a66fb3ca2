"""A folder of embeddings: shards that are whole or not there, and one JSON file that says what the folder is.

A shard is a file of embeddings (`runtime/search/store.py`) of so many items that follow one another in the inputs. It
also says, of all its items, how many there are, the sha256 of what names them, and which were skipped and why: so a run
that was killed goes on with the first shard that is missing, and finds out where the inputs have changed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np

from vlm_export.bundle.staging import delete, staged_file, staging
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.bulk.items import Item
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search.store import (
    Embeddings,
    EmbeddingsMeta,
    MoreColumns,
    embeddings_meta,
    embeddings_metadata,
    read_embeddings,
    write_embeddings,
)
from vlm_export.specs.codec import Spec, between

# Readers of Parquet leave out what begins with an underscore.
STATE_NAME = "_embeddings.json"
_PATTERN = f"part-{'[0-9]' * 6}"
_FORMATS = ("parquet", "npy")
_AGAIN = "embed into another folder, or replace this one with --overwrite"


@dataclass(frozen=True)
class Skipped(Spec):
    """An item without an embedding, and why."""

    item: str
    reason: str


@dataclass(frozen=True)
class ShardRecord(Spec):
    """What a shard says of the items that it was made of.

    Attributes:
        items: how many; those that were skipped are among them.
        sha256: of their names, places and columns.
        skipped: in their order.
    """

    items: Annotated[int, between(1)]
    sha256: str
    skipped: tuple[Skipped, ...]

    @property
    def rows(self) -> int:
        """Embeddings in the shard."""
        return self.items - len(self.skipped)


@dataclass(frozen=True)
class FolderState(Spec):
    """`_embeddings.json`.

    Attributes:
        format: of the shards.
        shard_items: items of every shard but the last.
        columns: names of what a table says of each item.
        truncate: whether texts are cut that are too long.
        complete: whether all inputs are in it; the numbers below are 0 until then.
        shards, rows: their number, and that of all embeddings.
        skipped: items without an embedding.
        shard_sha256: what the record of each shard says of its items, so that a shard of another run is noticed.
    """

    NEWER: ClassVar[frozenset[str]] = frozenset({"shard_sha256"})

    schema: Literal[1]
    meta: EmbeddingsMeta
    format: Literal["parquet", "npy"]
    shard_items: Annotated[int, between(1)]
    columns: tuple[str, ...]
    truncate: bool
    complete: bool = False
    shards: Annotated[int, between(0)] = 0
    rows: Annotated[int, between(0)] = 0
    skipped: Annotated[int, between(0)] = 0
    shard_sha256: tuple[str, ...] = ()


@dataclass
class EmbeddingsFolder:
    """A folder that is being filled, under its lock."""

    path: Path
    state: FolderState

    def shard(self, number: int) -> Path:
        """The file of the shard of that number, from 0."""
        return _shard(self.path, self.state, number)

    def finished_shard(self, number: int, items: Sequence[Item]) -> ShardRecord | None:
        """The record of a shard that an earlier run wrote, None where there is none.

        Raises:
            InputError: it was made of other items, or is damaged.
        """
        path = self.shard(number)
        if not path.exists():
            return None
        record = _record_of(path)
        meta = embeddings_meta(path)
        if meta != self.state.meta:
            raise InputError(
                "a shard was made by another model",
                where=str(path),
                expected=f"{self.state.meta.model} {self.state.meta.precision}",
                got=f"{meta.model} {meta.precision}",
                fix=_AGAIN,
            )
        if (record.items, record.sha256) != (len(items), _items_sha256(items)):
            raise InputError(
                "the inputs are not those of the run that is resumed",
                where=str(path),
                expected=f"the {record.items} items that this shard was made of",
                got=f"{len(items)} from {items[0].name} to {items[-1].name}: some were added, left out or moved",
                fix=f"give the same inputs in the same order; or {_AGAIN}",
            )
        return record

    def write_shard(
        self, number: int, items: Sequence[Item], vectors: FloatArray, skipped: Mapping[int, InputError]
    ) -> ShardRecord:
        """Writes a shard.

        Args:
            items: all that it is made of.
            vectors: float32 (rows, D), of those that were not skipped.
            skipped: number of an item of the shard → why it has no row.
        """
        reasons = tuple(Skipped(items[index].name, reason_text(error)) for index, error in sorted(skipped.items()))
        record = ShardRecord(len(items), _items_sha256(items), reasons)
        kept = [item for index, item in enumerate(items) if index not in skipped]
        columns = {name: [item.columns[at] for item in kept] for at, name in enumerate(self.state.columns)}
        write_embeddings(
            self.shard(number),
            [item.name for item in kept],
            vectors,
            self.state.meta,
            more=MoreColumns(columns, {"shard": record.to_json()}),
            is_result=False,
        )
        return record

    def finish(self, records: Sequence[ShardRecord]) -> None:
        """Says that the folder is complete.

        Args:
            records: of all shards, in their order.

        Raises:
            InputError: an earlier run wrote more shards than the inputs fill.
        """
        if self.shard(len(records)).exists():
            raise InputError(
                "the inputs are not those of the run that is resumed",
                where=str(self.shard(len(records))),
                expected=f"{len(records)} shards",
                got="more of them",
                fix=_AGAIN,
            )
        self.state = replace(
            self.state,
            complete=True,
            shards=len(records),
            rows=sum(record.rows for record in records),
            skipped=sum(len(record.skipped) for record in records),
            shard_sha256=tuple(record.sha256 for record in records),
        )
        _write_state(self.path, self.state, is_result=True)


@contextmanager
def embeddings_folder(path: Path, state: FolderState, *, resume: bool, overwrite: bool) -> Iterator[EmbeddingsFolder]:
    """A folder to fill, whose lock is held meanwhile.

    Args:
        state: what it is to hold.
        resume: go on with what an earlier run left there, or begin where there is nothing.
        overwrite: delete embeddings that are there.

    Raises:
        UsageError: something else is there, or embeddings and neither option.
        InputError: embeddings of another model, or in other shards, are to be gone on with.
        EnvironmentFailure: another process fills the folder, or the disk refuses.
    """
    path = path.absolute()
    check_folder(path, resume=resume, overwrite=overwrite)
    with staging(path) as staged:
        # Of killed runs: whoever writes here holds this lock.
        for name in (f"{_PATTERN}.*", STATE_NAME):
            for left in path.glob(f".{name}.vlm-export*"):
                delete(left)
        if (path / STATE_NAME).exists():
            if resume:
                _check_same(path, folder_state(path), state)
            else:
                # A shard that is left says itself what it is of.
                _write_state(path, state, is_result=False)
                for shard in [shard for known in _FORMATS for shard in path.glob(f"{_PATTERN}.{known}")]:
                    delete(shard)
        else:
            staged.path.mkdir()
            _write_state(staged.path, state, is_result=False)
            if path.is_dir():
                path.rmdir()
            os.rename(staged.path, path)
        yield EmbeddingsFolder(path, state)


def check_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder before long work is done for it; errors as in `embeddings_folder`."""
    path = path.absolute()
    if not path.parent.is_dir() or (os.path.lexists(path) and not path.is_dir()):
        got = "a file" if path.parent.is_dir() else f"{path.parent} is no directory"
        fix = "name a new folder in a directory that exists"
        raise EnvironmentFailure("the output cannot be written", where=str(path), got=got, fix=fix)
    if not (path / STATE_NAME).exists():
        if path.is_dir() and any(path.iterdir()):
            fix = "name a new folder"
            raise UsageError("the output holds no embeddings", where=str(path), got="other files", fix=fix)
    elif not resume and not overwrite:
        fix = "pass --resume to go on with it, or --overwrite to begin anew; or name another folder"
        raise UsageError("the output exists", where=str(path), fix=fix)


def folder_state(path: Path) -> FolderState:
    """What `_embeddings.json` of a folder says; InputError where there is none, or it is damaged."""
    name = path / STATE_NAME
    try:
        content = name.read_bytes()
    except OSError as error:
        raise machine_fault(error, str(name)) or InputError(
            "there are no embeddings in a folder",
            where=str(path),
            expected=STATE_NAME,
            got=error.strerror or str(error),
        ) from error
    return FolderState.from_json(json_object_from_bytes(content, str(name)), str(name), fix=_AGAIN)


def read_folder(path: Path) -> Embeddings:
    """All embeddings of a folder, in memory.

    Raises:
        InputError: the run that fills it is not over, or a shard is missing or damaged.
    """
    state, shards = folder_shards(path)
    found = list(shards())
    items = tuple(item for shard in found for item in shard.items)
    columns = {name: [text for shard in found for text in shard.columns[name]] for name in state.columns}
    return Embeddings(items, np.concatenate([shard.vectors for shard in found]), state.meta, columns)


def folder_shards(path: Path) -> tuple[FolderState, Callable[[], Iterator[Embeddings]]]:
    """What a complete folder says of itself, and what reads its shards one after the other; errors as `read_folder`."""
    state = folder_state(path)
    if not state.complete:
        raise InputError("the embeddings are not complete", where=str(path), fix="end the run: embed … --resume")
    if state.shard_sha256 and len(state.shard_sha256) != state.shards:
        raise _of_another_run(path)

    def shards() -> Iterator[Embeddings]:
        rows = 0
        for number in range(state.shards):
            file = _shard(path, state, number)
            shard = read_embeddings(file)
            rows += len(shard.items)
            if shard.meta != state.meta or set(shard.columns) != set(state.columns):
                raise _of_another_run(path)
            # Folders of older versions do not say it.
            if state.shard_sha256 and _record_of(file).sha256 != state.shard_sha256[number]:
                raise _of_another_run(path)
            yield shard
        if rows != state.rows:
            raise _of_another_run(path)

    return state, shards


def _of_another_run(path: Path) -> InputError:
    return InputError("shards of another run lie in a folder of embeddings", where=str(path), fix=_AGAIN)


def embeddings_at(path: str | Path) -> Embeddings:
    """All embeddings of a file or of a folder; errors as in `read_embeddings` and `read_folder`."""
    return read_folder(Path(path)) if os.path.isfile(Path(path, STATE_NAME)) else read_embeddings(path)


def skipped_items(path: Path) -> Iterator[Skipped]:
    """The items of a complete folder that have no embedding, read shard by shard."""
    state = folder_state(path)
    for number in range(state.shards):
        yield from _record_of(_shard(path, state, number)).skipped


def reason_text(error: InputError) -> str:
    """Why an item was skipped, in a line."""
    return f"{error.what} ({error.got})" if error.got else error.what


def _shard(path: Path, state: FolderState, number: int) -> Path:
    return path / f"part-{number:06d}.{state.format}"


def _record_of(path: Path) -> ShardRecord:
    return ShardRecord.from_json(embeddings_metadata(path).get("shard"), str(path), fix=_AGAIN)


def _items_sha256(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        for text in (item.name, item.file, str(item.span), *item.columns):
            part = text.encode("utf-8", "surrogateescape")
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write_state(path: Path, state: FolderState, *, is_result: bool) -> None:
    with staged_file(path / STATE_NAME, "writing embeddings", overwrite=True, is_result=is_result) as staged:
        staged.write_text(json.dumps(state.to_json(), indent=1), encoding="utf-8")


def _check_same(path: Path, found: FolderState, wanted: FolderState) -> None:
    begun, now = (
        {
            **state.meta.to_json(),
            "--shard-format": state.format,
            "--shard-items": state.shard_items,
            "--truncate": state.truncate,
        }
        for state in (found, wanted)
    )
    for name, value in begun.items():
        if name != "model" and now[name] != value:
            raise InputError(
                f"the run that is resumed was begun with another value of {name}",
                where=str(path),
                expected=str(value),
                got=str(now[name]),
                fix=f"resume with the same bundle and options; or {_AGAIN}",
            )
    if found.columns != wanted.columns:
        raise InputError(
            "the run that is resumed keeps other columns",
            where=str(path),
            expected=", ".join(found.columns) or "none",
            got=", ".join(wanted.columns) or "none",
            fix=_AGAIN,
        )
