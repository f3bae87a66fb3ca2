"""Embeddings of many images or texts: every core decodes and computes, memory stays flat, nothing finished is lost.

Each worker takes a batch from its bytes to its vectors, with an engine whose operators have one thread: so no core
waits for another within an operator, and images are decoded while others are in the engine. Workers share the engine's
weights. What they return is put back into the order of the inputs.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.staging import check_not_there
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.bulk.folder import (
    EmbeddingsFolder,
    FolderState,
    ShardRecord,
    check_folder,
    embeddings_folder,
    reason_text,
)
from vlm_export.runtime.bulk.items import Inputs, Item, Scan, TableColumns
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.progress import Progress
from vlm_export.runtime.model import Model
from vlm_export.runtime.search.store import (
    COLUMNS,
    EmbeddingsMeta,
    ItemKind,
    MoreColumns,
    checked_suffix,
    pyarrow_modules,
    write_embeddings,
)

BATCH_SIZES: Mapping[ItemKind, int] = {"image": 16, "text": 32}
"""Rows of one run where the user states none."""
# Short texts are batched with short ones, of so many batches.
_TEXT_BATCHES = 16
# Of each worker: one that is computed, and one that waits.
_IN_FLIGHT = 2


@dataclass(frozen=True)
class EmbedOptions:
    """What the user may choose.

    Attributes:
        lists: files with the path of an image in each line, beside the inputs.
        columns: of tables among the inputs.
        batch_size: rows of one run; None: 16 images, with which a core computes faster than with more, or 32 texts.
        on_error: "skip" leaves out an image of a folder, list, table or archive that cannot be read, and says so;
            "stop" makes it an error. One that is named itself is always an error.
        resume: go on with what an earlier run left in the output folder.
        overwrite: replace the output.
        shard_format: of a folder; None: "parquet" where pyarrow is installed, else "npy".
        shard_items: items of a folder's shards.
        truncate: cut texts that are too long instead of refusing them.
    """

    lists: Sequence[Path] = ()
    columns: TableColumns = field(default_factory=TableColumns)
    batch_size: int | None = None
    on_error: Literal["skip", "stop"] = "skip"
    resume: bool = False
    overwrite: bool = False
    shard_format: Literal["parquet", "npy"] | None = None
    shard_items: int = 10_000
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("a run either resumes or overwrites", fix="choose one of --resume and --overwrite")
        for name in self.columns.keep:
            if name in COLUMNS:
                raise UsageError("a column has a name of ours", got=name, fix="rename it in the table")
        if self.shard_items < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise UsageError("batches and shards have at least one item")
        if self.on_error not in ("skip", "stop"):
            raise UsageError("an error skips or stops", expected="skip or stop", got=repr(self.on_error))


@dataclass(frozen=True)
class EmbedResult:
    """What was written.

    Attributes:
        scan: what the inputs held.
        rows, dimension: of the embeddings.
        skipped: items without an embedding in this run, and why.
        resumed: items that an earlier run had done.
        shards: files of a folder; 0 for a single file.
        seconds: of this run.
    """

    output: Path
    scan: Scan
    rows: int
    dimension: int
    skipped: Mapping[str, InputError]
    resumed: int
    shards: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What `embed --json` prints."""
        reasons = {name: error.to_json() for name, error in self.skipped.items()}
        return {
            "output": str(self.output),
            "kind": self.scan.kind,
            "count": self.rows,
            "dimension": self.dimension,
            "seconds": round(self.seconds, 4),
            "resumed": self.resumed,
            "shards": self.shards,
            "skipped": [*self.scan.others, *reasons],
            "other_files": self.scan.other_count,
            "unreadable": reasons,
        }


def embed(
    model: Model,
    inputs: Sequence[str | Path],
    output: str | Path,
    options: EmbedOptions | None = None,
    *,
    progress: Progress | None = None,
) -> EmbedResult:
    """Writes the embeddings of images or of texts to one file, or, shard by shard, to a folder.

    Args:
        model: from `load`; its `threads` are how many batches are computed at once, None for as many as there are
            cores.
        inputs: images, folders of images, `.tar` archives, `.csv` and `.parquet` tables of paths; or `.txt` files
            whose lines are texts.
        output: a `.npy` or `.parquet` file, which is there once it is whole; or a folder, which `resume` completes
            after an interruption. `search` reads both.
        progress: called after each batch.

    Raises:
        InputError: an input is damaged or cannot be embedded, or the inputs are not those of the run that is resumed.
        UsageError: the output exists, or options that do not go together.
        EnvironmentFailure: the disk or the memory refuses, or a package is missing.
    """
    options = options or EmbedOptions()
    run = _Run(model, Inputs([Path(path) for path in inputs], options.lists, options.columns), options, progress)
    return run.to_file(Path(output)) if is_file(output) else run.to_folder(Path(output))


def is_file(output: str | Path) -> bool:
    """Whether an output is one file, and not a folder of shards, whose name has no suffix or ends with a slash.

    Raises:
        UsageError: a file of another kind.
    """
    path = Path(output)
    if str(output).endswith(("/", os.sep)) or not path.suffix:
        return False
    if path.suffix.lower() not in (".npy", ".parquet") and path.is_dir():
        return False
    checked_suffix(path)
    return True


@dataclass(frozen=True)
class _Batch:
    """Items of a shard that are computed together."""

    shard: int
    items: Sequence[Item]


@dataclass(frozen=True)
class _Embedded:
    """What became of a batch: rows of those items that are not in `skipped`, float32 (rows, D)."""

    batch: _Batch
    rows: FloatArray
    skipped: Mapping[int, InputError]


class _Run:
    """One run over all inputs."""

    def __init__(self, model: Model, inputs: Inputs, options: EmbedOptions, progress: Progress | None) -> None:
        self.model, self.inputs, self.options, self.progress = model, inputs, options, progress
        self.start, self.done, self.total = time.perf_counter(), 0, 0
        self.skipped = dict[str, InputError]()
        self.dimension = model.embedding.embed_dim
        self.batch_size = options.batch_size or BATCH_SIZES[inputs.kind]
        self.meta = EmbeddingsMeta(inputs.kind, model.manifest.name, model.identity, model.precision)

    def to_file(self, output: Path) -> EmbedResult:
        if self.options.resume:
            raise UsageError("a file is whole or not there", where=str(output), fix="resume a folder: -o FOLDER")
        check_not_there(output.absolute(), overwrite=self.options.overwrite)
        scan = self.inputs.scan()
        names: list[str] = []
        columns: list[tuple[str, ...]] = []
        vectors: list[FloatArray] = []
        with self._embedded(scan, (_Batch(0, items) for items in self._batches(self.inputs.items()))) as results:
            for found in results:
                kept = [item for index, item in enumerate(found.batch.items) if index not in found.skipped]
                names += [item.name for item in kept]
                columns += [item.columns for item in kept]
                vectors.append(found.rows)
        self._check_any(len(names))
        kept_columns = dict(zip(self.options.columns.keep, zip(*columns, strict=True), strict=True))
        more = MoreColumns(kept_columns)
        write_embeddings(output, names, np.concatenate(vectors), self.meta, more=more, overwrite=self.options.overwrite)
        return self._result(output, scan, len(names), 0, 0)

    def to_folder(self, output: Path) -> EmbedResult:
        shard_format = self.options.shard_format or _default_format()
        if shard_format == "parquet":
            pyarrow_modules()
        columns = tuple(self.options.columns.keep)
        state = FolderState(
            1, self.meta, shard_format, self.options.shard_items, columns, truncate=self.options.truncate
        )
        check_folder(output, resume=self.options.resume, overwrite=self.options.overwrite)
        scan = self.inputs.scan()
        with (
            environment_errors("writing embeddings", output.parent),
            embeddings_folder(output, state, resume=self.options.resume, overwrite=self.options.overwrite) as folder,
        ):
            finished: dict[int, ShardRecord] = {}
            todo = self._unfinished(folder, finished)
            with self._embedded(scan, todo) as results:
                written = {number: self._write(folder, number, parts) for number, parts in _by_shard(results)}
            records = [record for _, record in sorted((finished | written).items())]
            rows = sum(record.rows for record in records)
            self._check_any(rows)
            folder.finish(records)
        return self._result(output, scan, rows, sum(record.items for record in finished.values()), len(records))

    def _unfinished(self, folder: EmbeddingsFolder, finished: dict[int, ShardRecord]) -> Iterator[_Batch]:
        """Batches of the shards that are missing; those that are there are put into `finished`."""
        items = self.inputs.items()
        number = 0
        while chunk := list(islice(items, self.options.shard_items)):
            record = folder.finished_shard(number, chunk)
            if record is None:
                yield from (_Batch(number, batch) for batch in self._batches(iter(chunk)))
            else:
                finished[number] = record
                self._advance(record.items)
            number += 1

    def _write(self, folder: EmbeddingsFolder, number: int, parts: Sequence[_Embedded]) -> ShardRecord:
        items: list[Item] = []
        skipped: dict[int, InputError] = {}
        for part in parts:
            skipped |= {len(items) + index: error for index, error in part.skipped.items()}
            items += part.batch.items
        return folder.write_shard(number, items, np.concatenate([part.rows for part in parts]), skipped)

    def _batches(self, items: Iterator[Item]) -> Iterator[Sequence[Item]]:
        size = self.batch_size * (_TEXT_BATCHES if self.inputs.kind == "text" else 1)
        while batch := list(islice(items, size)):
            yield batch

    @contextmanager
    def _embedded(self, scan: Scan, batches: Iterator[_Batch]) -> Iterator[Iterator[_Embedded]]:
        """What becomes of the batches, in their order; nothing is computed any more when the block ends."""
        self.total = scan.count
        workers = self.model.session.threads or os.cpu_count() or 1
        if scan.count <= self.batch_size:
            # One batch: all cores compute it.
            model, workers = self.model, 1
        else:
            model = Model(self.model.session.for_workers(workers))
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[_Embedded]] = deque()

            def results() -> Iterator[_Embedded]:
                for batch in batches:
                    waiting.append(pool.submit(self._compute, model, batch))
                    if len(waiting) >= _IN_FLIGHT * workers:
                        yield self._taken(waiting.popleft())
                while waiting:
                    yield self._taken(waiting.popleft())

            try:
                yield results()
            finally:
                for future in waiting:
                    future.cancel()

    def _taken(self, future: Future[_Embedded]) -> _Embedded:
        found = future.result()
        for index, error in found.skipped.items():
            item = found.batch.items[index]
            if item.is_named or self.options.on_error == "stop":
                raise error
            # What led to it would be kept with it, for each of perhaps many.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self.skipped[item.name] = error
        self._advance(len(found.batch.items))
        return found

    def _compute(self, model: Model, batch: _Batch) -> _Embedded:
        size, skipped = self.batch_size, dict[int, InputError]()
        if self.inputs.kind == "text":
            texts = [item.name for item in batch.items]
            return _Embedded(batch, model.encode_text(texts, truncate=self.options.truncate, batch_size=size), {})
        sources = []
        numbers = []
        for index, item in enumerate(batch.items):
            try:
                sources.append(item.image())
                numbers.append(index)
            except InputError as error:
                skipped[index] = error

        def unreadable(number: int, error: InputError) -> None:
            # What comes from an archive has no path of its own.
            error.where = batch.items[numbers[number]].name
            skipped[numbers[number]] = error

        rows = model.encode_image(sources, batch_size=size, unreadable=unreadable)
        return _Embedded(batch, rows, skipped)

    def _advance(self, items: int) -> None:
        self.done += items
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _check_any(self, rows: int) -> None:
        if not rows:
            raise none_readable(self.done, list(self.skipped.values())[-1] if self.skipped else None)

    def _result(self, output: Path, scan: Scan, rows: int, resumed: int, shards: int) -> EmbedResult:
        seconds = time.perf_counter() - self.start
        return EmbedResult(output, scan, rows, self.dimension, self.skipped, resumed, shards, seconds)


def none_readable(count: int, last: InputError | None) -> InputError:
    """The error for a run that skipped all of its items, with that of the last one; None where an earlier run did."""
    what = f"none of the {count} images can be read"
    if last is None:
        return InputError(what, got="an earlier run skipped them all")
    return InputError(what, where=last.where, got=f"of the last one: {reason_text(last)}", fix=last.fix)


def _by_shard(results: Iterator[_Embedded]) -> Iterator[tuple[int, list[_Embedded]]]:
    """Shard numbers with all of their batches, in order."""
    parts: list[_Embedded] = []
    for found in results:
        if parts and parts[0].batch.shard != found.batch.shard:
            yield parts[0].batch.shard, parts
            parts = []
        parts.append(found)
    if parts:
        yield parts[0].batch.shard, parts


def _default_format() -> Literal["parquet", "npy"]:
    return "parquet" if find_spec("pyarrow") else "npy"
