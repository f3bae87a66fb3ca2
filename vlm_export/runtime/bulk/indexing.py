"""Builds an index of embeddings once, shard by shard, and opens what can be searched.

The shards of an approximate index are read three times: for a sample, of which the centres of lists are made; for the
list of each row; and to put the vectors where their lists lie in the file. So memory holds the sample, the names and
one shard, however many shards there are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.safe_files import check_path
from vlm_export.bundle.staging import check_not_there, staged_file
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.bulk.folder import STATE_NAME, embeddings_at, folder_shards
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.progress import Progress
from vlm_export.runtime.search.filters import column_of
from vlm_export.runtime.search.index import SearchIndex
from vlm_export.runtime.search.index_file import (
    LISTS,
    NAMES,
    VECTORS,
    ColumnRecord,
    IndexState,
    IndexWriter,
    ListsRecord,
    Recall,
    column_codes,
    column_texts,
    is_index,
    text_section,
)
from vlm_export.runtime.search.rows import (
    Lists,
    ListsLayout,
    centres_of,
    faiss_threads,
    faiss_version,
    list_count,
    nearest_centres,
    sample_size,
    written_lists,
)
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta, read_embeddings

Method: TypeAlias = Literal["auto", "exact", "approximate"]
EXACT_ROWS = 50_000
"""So many items are compared one by one: 50,000 x 512 numbers are read from memory in about ten milliseconds."""
RECALL_K, RECALL_TARGET = 10, 0.97
_QUERIES = 256
# Sums of another order; a candidate as near as the last of the exact ones is as good as that.
_EQUAL = 1e-6
_UNIT_TOLERANCE = 1e-3


@dataclass
class _Source:
    """Embeddings as an index takes them, shard by shard, as often as they are needed.

    Attributes:
        read: reads the shards once more, from the first on.
        names, columns: of the items, once all were read.
    """

    path: Path
    meta: EmbeddingsMeta
    rows: int
    read: Callable[[], Iterator[Embeddings]]
    progress: Progress
    times: int = 1
    done: int = 0
    names: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    _digests: list[str] = field(default_factory=list)

    def vectors(self) -> Iterator[tuple[int, FloatArray]]:
        """Number of the first row and float32 vectors (N, D) of each shard.

        Raises:
            InputError: vectors that are not of unit length, or not those of the time before.
        """
        row, is_first = 0, not self._digests
        for number, shard in enumerate(self.read()):
            vectors: FloatArray = np.ascontiguousarray(shard.vectors, "<f4")
            digest = hashlib.sha256(vectors.data).hexdigest()
            if is_first:
                _check_unit_rows(vectors, str(self.path))
                self._digests.append(digest)
                self.names.extend(shard.items)
                for name, texts in shard.columns.items():
                    self.columns.setdefault(name, []).extend(texts)
            elif self._digests[number] != digest:
                raise InputError("embeddings changed while an index was built of them", where=str(self.path))
            yield row, vectors
            row += len(vectors)
            self.done += len(vectors)
            self.progress(self.done, self.times * self.rows)


def open_index(path: str | Path) -> SearchIndex:
    """What can be searched: an index that `build_index` wrote, mapped; or a file or folder of embeddings, in memory.

    Raises:
        InputError: nothing of that kind, or damaged.
        EnvironmentFailure: a package is missing: faiss for an approximate index, pyarrow for Parquet.
    """
    check_path(path, "an index")
    return SearchIndex.mapped(Path(path)) if is_index(Path(path)) else SearchIndex.of(embeddings_at(path))


def build_index(
    embeddings: str | Path,
    output: str | Path,
    *,
    method: Method = "auto",
    recall: float = RECALL_TARGET,
    queries: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SearchIndex:
    """Writes an index of embeddings, which is there once it is whole, and opens it.

    Args:
        embeddings: a file or a folder that `embed` wrote.
        output: the index's file.
        method: "exact" compares a query with every item; "approximate" with those of the nearest inverted lists, made
            by faiss; "auto" is exact for up to `EXACT_ROWS` items.
        recall: the share of the 10 nearest that a search is to find: it compares as few lists as reach it. What was
            measured stands in `SearchIndex.lists`.
        queries: embeddings to measure the recall with, such as of texts for an index of images; None for 256 of the
            index's own, each without itself.
        overwrite: replace a file.
        threads: of the building; None for as many as there are cores.
        progress: called after each shard with how many vectors were read, of all the times that they are.

    Raises:
        InputError: embeddings that are damaged, not complete, of no unit length, or change meanwhile; queries of
            another model.
        UsageError: the output exists, or an argument is out of range.
        EnvironmentFailure: the disk refuses, or faiss is not installed.
    """
    check_path(embeddings, "the embeddings")
    check_path(output, "the index")
    if method not in ("auto", "exact", "approximate") or not 0 < recall <= 1:
        raise UsageError("an index is auto, exact or approximate, with a recall up to 1", got=f"{method}, {recall}")
    target = Path(output).absolute()
    check_not_there(target, overwrite=overwrite)
    source = _source(Path(embeddings), progress or (lambda done, total: None))
    asked = None if queries is None else _query_vectors(Path(queries), source.meta)
    with (
        environment_errors("building an index", target.parent),
        staged_file(target, "building an index", overwrite=overwrite) as staged,
    ):
        if method == "approximate" or (method == "auto" and source.rows > EXACT_ROWS):
            source.times = 3
            with faiss_threads(threads):
                _write_approximate(source, staged, recall, asked)
        else:
            _write_exact(source, staged)
    return SearchIndex.mapped(target)


def _source(path: Path, progress: Progress) -> _Source:
    if os.path.isfile(path / STATE_NAME):
        state, shards = folder_shards(path)
        source = _Source(path, state.meta, state.rows, shards, progress)
    else:
        embeddings = read_embeddings(path)
        source = _Source(path, embeddings.meta, len(embeddings.items), lambda: iter([embeddings]), progress)
    if not source.rows:
        raise InputError("there is nothing to index", where=str(path), got="no embeddings")
    return source


def _query_vectors(path: Path, meta: EmbeddingsMeta) -> FloatArray:
    found = embeddings_at(path)
    found.require_model(meta.identity, meta.model)
    if not found.items:
        raise InputError("there are no queries", where=str(path))
    return found.vectors[:_QUERIES]


def _check_unit_rows(vectors: FloatArray, where: str) -> None:
    """Products are cosines only of rows of unit length."""
    lengths = np.linalg.norm(vectors, axis=1)
    worst = float(lengths[np.argmax(np.abs(lengths - 1))]) if len(lengths) else 1.0
    if not abs(worst - 1) <= _UNIT_TOLERANCE:
        raise InputError(
            "embeddings have no unit length", where=where, expected="1", got=f"{worst:.4g}", fix="embed again"
        )


def _write_exact(source: _Source, staged: Path) -> None:
    dimension = 0

    def pieces() -> Iterator[memoryview]:
        nonlocal dimension
        for _, vectors in source.vectors():
            dimension = vectors.shape[1]
            yield vectors.data

    with staged.open("w+b") as file:
        writer = IndexWriter(file)
        writer.add(VECTORS, pieces())
        _finish(source, writer, dimension, None)


def _write_approximate(source: _Source, staged: Path, target: float, queries: FloatArray | None) -> None:
    count = list_count(source.rows)
    sample, own = _samples(source, sample_size(count))
    centres = centres_of(sample, count)
    del sample
    assigned = np.empty(source.rows, np.int64)
    for first, vectors in source.vectors():
        assigned[first : first + len(vectors)] = nearest_centres(vectors, centres)
    layout = ListsLayout(np.bincount(assigned, minlength=count).astype(np.uint64), centres.shape[1])
    with staged.open("w+b") as file:
        file.truncate(layout.size)
        content = np.memmap(file, np.uint8, "r+")
        _fill(source, assigned, list(written_lists(layout, centres, content)))
        content.flush()
        lists = Lists.mapped(staged, content, source.rows, layout.dimension, count, 1)
        record = _measured(lists, target, queries, own)
        writer = IndexWriter(file)
        writer.add_written(LISTS)
        _finish(source, writer, layout.dimension, record)


def _samples(source: _Source, size: int) -> tuple[FloatArray, Mapping[int, FloatArray]]:
    """Vectors of about so many rows, evenly spread, and those of the rows that recall is measured with."""
    asked = set(np.linspace(0, source.rows - 1, min(_QUERIES, source.rows), dtype=np.int64).tolist())
    step, parts, own = max(source.rows // size, 1), list[FloatArray](), dict[int, FloatArray]()
    for first, vectors in source.vectors():
        parts.append(vectors[-first % step :: step].copy())
        own |= {row: vectors[row - first].copy() for row in asked if first <= row < first + len(vectors)}
    return np.concatenate(parts), own


def _fill(
    source: _Source, assigned: npt.NDArray[np.int64], lists: Sequence[tuple[FloatArray, npt.NDArray[np.int64]]]
) -> None:
    """Puts each vector and its row number behind those that its list has by then."""
    filled = np.zeros(len(lists), np.int64)
    for first, vectors in source.vectors():
        chosen = assigned[first : first + len(vectors)]
        order = np.argsort(chosen, kind="stable")
        numbers, starts = np.unique(chosen[order], return_index=True)
        for number, rows in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            into_vectors, into_rows = lists[number]
            place = slice(filled[number], filled[number] + len(rows))
            into_vectors[place], into_rows[place] = vectors[rows], first + rows
            filled[number] += len(rows)


def _measured(lists: Lists, target: float, queries: FloatArray | None, own: Mapping[int, FloatArray]) -> ListsRecord:
    """How many lists a search compares: as few as reach the target."""
    rows = None if queries is not None else np.array(list(own), np.int64)
    asked = np.stack(list(own.values())) if queries is None else queries
    k = min(RECALL_K, max(len(lists) - (rows is not None), 1))
    exact = _scores(lists, asked, k, lists.count, rows)[:, -1:]
    probes, found = 1, 0.0
    while True:
        found = float((_scores(lists, asked, k, probes, rows) >= exact - _EQUAL).mean())
        if found >= target or probes == lists.count:
            break
        probes = min(2 * probes, lists.count)
    kind: Literal["items", "given"] = "given" if rows is None else "items"
    return ListsRecord(faiss_version(), lists.count, probes, Recall(round(found, 4), k, len(asked), kind))


def _scores(lists: Lists, queries: FloatArray, k: int, probes: int, own: npt.NDArray[np.int64] | None) -> FloatArray:
    """The scores of the k rows found for each query (Q, k), best first, without its own row."""
    rows, scores = lists.search(queries, k + (own is not None), probes)
    scores = np.where(rows < 0, -np.inf, scores)
    if own is not None:
        scores = np.where(rows == own[:, None], -np.inf, scores)
    best: FloatArray = -np.sort(-scores, axis=1)[:, :k]
    return best


def _finish(source: _Source, writer: IndexWriter, dimension: int, lists: ListsRecord | None) -> None:
    writer.add(NAMES, text_section(source.names))
    records = []
    for number, (name, texts) in enumerate(source.columns.items()):
        column = column_of(texts)
        records.append(ColumnRecord(name, len(column.texts)))
        writer.add(column_codes(number), [column.codes.data])
        writer.add(column_texts(number), text_section(column.texts))
    writer.finish(IndexState(1, source.meta, source.rows, dimension, tuple(records), lists, writer.sections))
