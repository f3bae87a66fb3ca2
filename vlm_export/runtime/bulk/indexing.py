"""Builds an index of embeddings once, shard by shard, and opens what can be searched.

The shards are read twice: the graph, whose size is known only at its end, stands first in the file, and the vectors
behind it. So memory holds the graph with its vectors of 8 bits, the names and one shard, however many shards there are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from vlm_export.runtime.search.filters import column_of
from vlm_export.runtime.search.graph import Graph
from vlm_export.runtime.search.index import EXACT_ROWS, SearchIndex
from vlm_export.runtime.search.index_file import (
    GRAPH,
    NAMES,
    VECTORS,
    ColumnRecord,
    GraphRecord,
    IndexState,
    IndexWriter,
    Recall,
    column_codes,
    column_texts,
    is_index,
    text_section,
)
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta, read_embeddings

Method: TypeAlias = Literal["auto", "exact", "graph"]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many vectors are in the graph and how many there are."""

RECALL_K, RECALL_TARGET = 10, 0.97
_QUERIES = 256
_EXPANSIONS = (32, 64, 128, 256, 512, 1024)
_ROWS_COMPARED = 1 << 15
# Sums of another order; a candidate as near as the last of the exact ones is as good as that.
_EQUAL = 1e-6
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Source:
    """Embeddings as an index takes them.

    Attributes:
        shards: reads them once more, from the first on.
    """

    path: Path
    meta: EmbeddingsMeta
    rows: int
    shards: Callable[[], Iterator[Embeddings]]


def open_index(path: str | Path) -> SearchIndex:
    """What can be searched: an index that `build_index` wrote, mapped; or a file or folder of embeddings, in memory.

    Raises:
        InputError: nothing of that kind, or damaged.
        EnvironmentFailure: a package is missing: usearch for an approximate index, pyarrow for Parquet.
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
        method: "exact" compares a query with every item; "graph" makes an approximate index with usearch; "auto" is
            exact for up to `EXACT_ROWS` items.
        recall: the share of the 10 nearest that a search is to find: it keeps as few candidates as reach it. What was
            measured stands in `SearchIndex.graph`, and may be less.
        queries: embeddings to measure the recall with, such as of texts for an index of images; None for 256 of the
            index's own, each without itself.
        overwrite: replace a file.
        threads: of the building; None for as many as there are cores.
        progress: called after each shard.

    Raises:
        InputError: embeddings that are damaged, not complete, of no unit length, or change meanwhile; queries of
            another model.
        UsageError: the output exists, or an argument is out of range.
        EnvironmentFailure: the disk refuses, or usearch is not installed.
    """
    check_path(embeddings, "the embeddings")
    check_path(output, "the index")
    if method not in ("auto", "exact", "graph") or not 0 < recall <= 1:
        raise UsageError("an index is auto, exact or graph, with a recall up to 1", got=f"{method}, {recall}")
    target = Path(output).absolute()
    check_not_there(target, overwrite=overwrite)
    source = _source(Path(embeddings))
    asked = None if queries is None else _query_vectors(Path(queries), source.meta)
    with (
        environment_errors("building an index", target.parent),
        staged_file(target, "building an index", overwrite=overwrite) as staged,
    ):
        if method == "graph" or (method == "auto" and source.rows > EXACT_ROWS):
            _write(source, staged, _graph(source, staged, threads or 0, progress), recall, asked)
        else:
            _write(source, staged, None, recall, asked)
    return SearchIndex.mapped(target)


def _source(path: Path) -> _Source:
    if os.path.isfile(path / STATE_NAME):
        state, shards = folder_shards(path)
        source = _Source(path, state.meta, state.rows, shards)
    else:
        embeddings = read_embeddings(path)
        source = _Source(path, embeddings.meta, len(embeddings.items), lambda: iter([embeddings]))
    if not source.rows:
        raise InputError("there is nothing to index", where=str(path), got="no embeddings")
    return source


def _query_vectors(path: Path, meta: EmbeddingsMeta) -> FloatArray:
    found = embeddings_at(path)
    found.require_model(meta.identity, meta.model)
    if not found.items:
        raise InputError("there are no queries", where=str(path))
    return found.vectors


def _graph(source: _Source, staged: Path, threads: int, progress: Progress | None) -> tuple[Graph, Sequence[str]]:
    """The graph of all vectors, written to the staged file, and the sha256 of each shard's vectors."""
    graph, done, digests = None, 0, list[str]()
    for shard in source.shards():
        graph = graph or Graph(shard.vectors.shape[1], _EXPANSIONS[0])
        graph.add(done, shard.vectors, threads)
        digests.append(hashlib.sha256(shard.vectors.data).hexdigest())
        done += len(shard.items)
        if progress is not None:
            progress(done, source.rows)
    assert graph is not None
    graph.save(staged)
    return graph, digests


def _write(
    source: _Source,
    staged: Path,
    built: tuple[Graph, Sequence[str]] | None,
    recall: float,
    queries: FloatArray | None,
) -> None:
    names: list[str] = []
    columns: dict[str, list[str]] = {}
    dimension = 0

    def vectors() -> Iterator[memoryview]:
        nonlocal dimension
        for number, shard in enumerate(source.shards()):
            content = np.ascontiguousarray(shard.vectors, "<f4").data
            if built is not None and hashlib.sha256(content).hexdigest() != built[1][number]:
                raise InputError("embeddings changed while an index was built of them", where=str(source.path))
            _check_unit_rows(shard.vectors, str(source.path))
            names.extend(shard.items)
            for name, texts in shard.columns.items():
                columns.setdefault(name, []).extend(texts)
            dimension = shard.vectors.shape[1]
            yield content

    with staged.open("r+b" if built is not None else "w+b") as file:
        writer = IndexWriter(file)
        if built is not None:
            writer.add_written(GRAPH)
        writer.add(VECTORS, vectors())
        writer.add(NAMES, text_section(names))
        records = []
        for number, (name, texts) in enumerate(columns.items()):
            column = column_of(texts)
            records.append(ColumnRecord(name, len(column.texts)))
            writer.add(column_codes(number), [column.codes.data])
            writer.add(column_texts(number), text_section(column.texts))
        file.flush()
        graph = None
        if built is not None:
            offset = writer.sections[VECTORS].offset
            mapped = np.memmap(staged, "<f4", "r", offset, (len(names), dimension))
            graph = _measured(built[0], np.asarray(mapped), recall, queries)
        writer.finish(IndexState(1, source.meta, len(names), dimension, tuple(records), graph, writer.sections))


def _check_unit_rows(vectors: FloatArray, where: str) -> None:
    """Products are cosines only of rows of unit length."""
    lengths = np.linalg.norm(vectors, axis=1)
    worst = float(lengths[np.argmax(np.abs(lengths - 1))]) if len(lengths) else 1.0
    if not abs(worst - 1) <= _UNIT_TOLERANCE:
        raise InputError(
            "embeddings have no unit length", where=where, expected="1", got=f"{worst:.4g}", fix="embed again"
        )


def _measured(graph: Graph, vectors: FloatArray, target: float, queries: FloatArray | None) -> GraphRecord:
    """Searches with as few candidates as reach the target, and says what they reach."""
    own = None
    if queries is None:
        own = np.unique(np.linspace(0, len(vectors) - 1, min(_QUERIES, len(vectors)), dtype=np.int64))
        queries = vectors[own]
    queries = queries[:_QUERIES]
    k = min(RECALL_K, max(len(vectors) - (own is not None), 1))
    worst = _kth_scores(vectors, queries, k, own)
    found = 0.0
    for expansion in _EXPANSIONS:
        graph.expansion = expansion
        found = _share_found(graph, vectors, queries, k, own, worst)
        if found >= target:
            break
    kind: Literal["items", "given"] = "given" if own is None else "items"
    return GraphRecord(graph.library, graph.expansion, Recall(round(found, 4), k, len(queries), kind))


def _kth_scores(
    vectors: FloatArray, queries: FloatArray, k: int, own: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.float32]:
    """The exact cosine of each query's k-th nearest row, without its own row."""
    best = np.empty((len(queries), 0), np.float32)
    for first in range(0, len(vectors), _ROWS_COMPARED):
        scores = queries @ vectors[first : first + _ROWS_COMPARED].T
        if own is not None:
            inside = np.flatnonzero((own >= first) & (own < first + scores.shape[1]))
            scores[inside, own[inside] - first] = -np.inf
        best = np.concatenate([best, scores], axis=1)
        if best.shape[1] > k:
            best = np.partition(best, best.shape[1] - k, axis=1)[:, -k:]
    worst: npt.NDArray[np.float32] = best.min(axis=1)
    return worst


def _share_found(
    graph: Graph,
    vectors: FloatArray,
    queries: FloatArray,
    k: int,
    own: npt.NDArray[np.int64] | None,
    worst: npt.NDArray[np.float32],
) -> float:
    found = 0
    for number, query in enumerate(queries):
        rows = graph.nearest(query, max(graph.expansion, k + 1))
        if own is not None:
            rows = rows[rows != own[number]]
        found += min(int(np.count_nonzero(vectors[rows] @ query >= worst[number] - _EQUAL)), k)
    return found / (k * len(queries))
